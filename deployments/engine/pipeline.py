"""What the engine asks of a model family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Generator, Hashable, Sequence

    from deployments.engine.grouping import GroupLimits
    from deployments.engine.preparation import Preparation
    from deployments.engine.row import Pixels, RowInput
    from deployments.images import Picture

RequestT = TypeVar("RequestT", contravariant=True)
StateT = TypeVar("StateT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Work:
    """What a request costs a model, as far as sizes and parameters tell.

    Attributes:
        steps: passes of the network.
        step_px: network pixels of each, see `Pipeline.cost_px`; the mean, if they differ.
        stage_px: working pixels of what comes before and after the passes.
    """

    steps: int
    step_px: int
    stage_px: int


class Pipeline(Protocol[RequestT, StateT]):
    """One loaded model.

    `RequestT` is the request the family reads, `StateT` what it keeps of a row between steps.

    An implementation guarantees:
        - `fit`, `restore`, `work` and `cost_px` are pure and may run on several threads at a time;
        - `begin` and `finish` run on one thread, `step` on another; they share no module that
          keeps state between calls;
        - `begin` and `finish` yield after every bounded piece of work, and may be called again;
        - if `step` raises, every state is as it was, so that the engine can try again with fewer
          rows.
    """

    def fit(self, picture: Picture | None, request: RequestT) -> Pixels:
        """What the model sees: the picture, scaled or padded to a size the model was made for.

        Args:
            picture: None for a task that needs none.
            request: complete.
        """
        ...

    def work(self, width_px: int, height_px: int, request: RequestT) -> Work:
        """What a picture of this size will cost, for estimates."""
        ...

    def cost_px(self, row: RowInput[RequestT]) -> int:
        """Pixels the network works on in one step: the working size, twice that with guidance.

        At least 1.
        """
        ...

    def begin(self, row: RowInput[RequestT]) -> Generator[None, None, StateT]:
        """The state of the row before its first step.

        What the model will not do as the request asks goes into `row.notes`.
        """
        ...

    def steps(self, state: StateT) -> int:
        """How many steps a row that has just begun takes, at least 1."""
        ...

    def key(self, state: StateT) -> Hashable:
        """Rows with equal keys may share the next step."""
        ...

    def step(self, states: Sequence[StateT]) -> None:
        """Advance rows of one key by one step, in place."""
        ...

    def preview(self, row: RowInput[RequestT], state: StateT) -> Pixels | None:
        """A small picture of a row between its steps, on any thread; None if there is none."""
        ...

    def finish(self, state: StateT) -> Generator[None, None, Pixels]:
        """The pixels of a row after its last step.

        Raises:
            ModelFailed: the result holds NaN.
        """
        ...

    def restore(self, output: Pixels, picture: Picture | None, request: RequestT) -> Picture:
        """The result for the client, from the model's output and the picture it sent, if any."""
        ...

    def to(self, device: str) -> None:
        """Move the weights; passes run plain again. No row may be in flight."""
        ...

    def prepare(self, how: Preparation, request: RequestT, limits: GroupLimits) -> int:
        """Prepare passes of the model's usual sizes, before any row comes.

        Args:
            how: what is done to each network.
            request: complete; as those to come, and with guidance if any of those has it.
            limits: of a pass.

        Returns:
            How many shapes and numbers of rows are prepared.
        """
        ...


def result_of(work: Generator[None, None, ResultT]) -> ResultT:
    """Do all pieces of work at once, as of `Pipeline.begin`."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


AnyPipeline: TypeAlias = Pipeline[Any, Any]
"""A model of any family: callers treat its requests and states as opaque."""
