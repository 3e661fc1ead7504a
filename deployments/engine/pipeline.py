"""What the engine expects of a model family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Generator, Hashable, Sequence

    from deployments.contract import ImageRequest
    from deployments.engine.row import Pixels, Row
    from deployments.images import Picture


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

    def fit(self, picture: Picture, request: ImageRequest) -> Pixels:
        """What the model will see of `picture`: scaled and padded to a size it was made for."""
        ...

    def work(self, width_px: int, height_px: int, request: ImageRequest) -> Work:
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

    def restore(self, output: Pixels, picture: Picture, request: ImageRequest) -> Picture:
        """The result for the client, from the model's output and the original picture."""
        ...

    def to(self, device: str) -> None:
        """Move the weights; while no row is in flight."""
        ...
