"""One request in the engine."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext

    from deployments.notes import Note

Pixels = NDArray[np.uint8]
"""`H x W x 3` sRGB, or `H x W` grey; uint8."""

RequestT_co = TypeVar("RequestT_co", covariant=True)


@dataclass(slots=True, eq=False)
class Whole:
    """A request of which each result, or each tile of it, is a row. All of them share it.

    Attributes:
        since_s: when it came, on the engine's clock.
        rows: how many there are.
        waiting: rows that the engine has not got yet.
    """

    since_s: float
    rows: int = 0
    waiting: int = 0


class Place(NamedTuple):
    """Where a tile lies in its picture, px from the left and from the top."""

    left_px: int
    top_px: int


@dataclass(frozen=True, slots=True, eq=False)
class RowInput(Generic[RequestT_co]):
    """What the caller gives.

    Attributes:
        request: complete: every field has its final value.
        pixels: what the model sees, from `Pipeline.fit`; `H x W x 3`.
        seed: of this row's own random generator.
        deadline_s: on the engine's clock; the engine drops the row once it has passed.
        trace: the request's span context, if it is traced.
        notes: what was lost or chosen so far; the pipeline adds its own in `begin`.
        place: of a tile; None for a row that is a whole picture.
        whole: the request that the row is a part of; None if it is all of it.
        mask: `H x W` uint8, of the size of `pixels`: 255 where the model may change them, 0 where
            it may not; None where it may everywhere. Only family img2img reads it.
    """

    request: RequestT_co
    pixels: Pixels
    seed: int
    deadline_s: float
    trace: SpanContext | None = None
    notes: list[Note] = field(default_factory=list["Note"])
    place: Place | None = None
    whole: Whole | None = None
    mask: Pixels | None = None


@dataclass(slots=True, eq=False)
class Progress:
    """What the engine measures; only the engine writes it.

    Attributes:
        cost_px: network pixels of each step, see `Pipeline.cost_px`.
        steps: passes the row takes in all; until it has begun 0, or an estimate.
        steps_left: passes still to come.
        pass_rows: rows of all its passes so far, added up; the row itself counts in each.
        arrived_s: on the engine's clock.
        stepping_s: seconds of its passes.
        staging_s: seconds of its `begin` and `finish`.
        compute_s: its share of the seconds of its passes, and all of `staging_s`.
    """

    cost_px: int = 1
    steps: int = 0
    steps_left: int = 0
    pass_rows: int = 0
    arrived_s: float = 0.0
    stepping_s: float = 0.0
    staging_s: float = 0.0
    compute_s: float = 0.0

    @property
    def work_px(self) -> int:
        """Network pixels of all steps."""
        return self.steps * self.cost_px

    @property
    def work_left_px(self) -> int:
        """Network pixels of the steps still to come."""
        return self.steps_left * self.cost_px

    @property
    def batch_size(self) -> int:
        """Rows of its passes so far, itself among them: the mean, rounded."""
        return round(self.pass_rows / max(self.steps - self.steps_left, 1))


@dataclass(slots=True, eq=False)
class Row:
    """A result, or one tile of it: what came in, what comes out, and what lies between.

    Attributes:
        input: what the caller gives.
        future: gets the pixels of `Pipeline.finish`, or the row's error.
        state: what `Pipeline.begin` returned. Only the pipeline looks into it.
        progress: what the engine measures.
    """

    input: RowInput[Any]
    future: Future[Pixels] = field(default_factory=Future[Pixels])
    state: Any = None
    progress: Progress = field(default_factory=Progress)

    def cancel(self) -> None:
        """Give the row up: the engine drops it before its next step. May be called twice."""
        self.future.cancel()

    def forget(self) -> None:
        """Let go of what the model made, once it was used."""
        self.state = None
        self.future = Future[Pixels]()
        self.future.cancel()

    @property
    def cancelled(self) -> bool:
        return self.future.cancelled()
