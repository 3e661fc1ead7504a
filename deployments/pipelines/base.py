"""What the engine expects of a model family, and the row that passes between them."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Generator, Hashable, Sequence

    from deployments.contract import TaskRequest
    from deployments.images import Picture

Pixels = NDArray[np.uint8]
"""`H x W x 3` sRGB, or `H x W` grey; uint8."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a request takes of a model, as far as its sizes and parameters tell.

    Attributes:
        steps: passes of the network.
        step_px: network pixels of each, see `Pipeline.cost_px`; the mean, if they differ.
        stage_px: working pixels of what comes before and after the passes.
    """

    steps: int
    step_px: int
    stage_px: int


@dataclass(slots=True, eq=False)
class Row:
    """One request inside the engine.

    Attributes:
        request: complete: every field has its final value.
        pixels: what the model sees, `H x W x 3`; from `Pipeline.fit`.
        seed: of this row's own random generator.
        deadline_s: on the clock of `time.monotonic`; past it the row is dropped.
        future: gets the output of `Pipeline.finish`, or the row's error.
        state: whatever the pipeline keeps for the row.
        trace: the request's span context, if it is traced.
        steps, steps_left: of the model; `Pipeline.begin` sets the latter, the engine counts down.
        cost_px: network pixels of each step, see `Pipeline.cost_px`.
        company: rows of all its passes so far, itself counted in each.
        arrived_s: on the engine's clock.
        queue_s, run_s, vae_s: seconds waiting, being stepped, and being begun and finished.
        compute_s: the row's share of the seconds its groups ran, and all of `vae_s`.
    """

    request: TaskRequest
    pixels: Pixels
    seed: int
    deadline_s: float
    future: Future[Pixels] = field(default_factory=Future[Pixels])
    state: object = None
    trace: object = None
    steps: int = 0
    steps_left: int = 0
    cost_px: int = 1
    company: int = 0
    arrived_s: float = 0.0
    queue_s: float = 0.0
    run_s: float = 0.0
    vae_s: float = 0.0
    compute_s: float = 0.0

    @property
    def batch_size(self) -> int:
        """Rows of its passes, itself among them: the mean, rounded."""
        return round(self.company / max(self.steps - self.steps_left, 1))

    def cancel(self) -> None:
        """Give the row up; the engine drops it before its next step. Safe to call twice."""
        self.future.cancel()

    @property
    def cancelled(self) -> bool:
        return self.future.cancelled()


class Pipeline(Protocol):
    """One model, loaded.

    Guarantees asked of an implementation:
        - `fit`, `restore`, `work` and `cost_px` are pure and may run on any thread, several at a
          time;
        - `begin` and `finish` run on one thread, `step` on another; they share no module that
          keeps state between calls;
        - `begin` and `finish` yield after every bounded piece of work, and may be called again;
        - if `step` raises, no row it was given has changed, so that the engine may try again with
          fewer rows.
    """

    def fit(self, picture: Picture, request: TaskRequest) -> Pixels:
        """What the model will see of `picture`: scaled and padded to a size it was made for."""
        ...

    def work(self, width_px: int, height_px: int, request: TaskRequest) -> Work:
        """What a picture of this size will take, for estimates."""
        ...

    def cost_px(self, row: Row) -> int:
        """Pixels the network works on in one step of the row: its working size, twice with
        guidance. At least 1.
        """
        ...

    def begin(self, row: Row) -> Generator[None, None, None]:
        """Prepare `row.state` and say in `row.steps_left` how many steps it takes, at least 1."""
        ...

    def key(self, row: Row) -> Hashable:
        """Rows with equal keys may share a step."""
        ...

    def step(self, rows: Sequence[Row]) -> None:
        """Advance rows of one key together by one step."""
        ...

    def finish(self, row: Row) -> Generator[None, None, Pixels]:
        """The stepped row's pixels.

        Raises:
            ModelFailed: the result holds NaN.
        """
        ...

    def restore(self, output: Pixels, picture: Picture, request: TaskRequest) -> Picture:
        """The result for the client, from the model's output and the original picture."""
        ...

    def to(self, device: str) -> None:
        """Move the weights; while no row is in flight."""
        ...
