"""Rows that arrive at set moments, so that no test depends on how fast it runs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from deployments.engine.engine import Engine
from deployments.engine.grouping import GroupLimits, Pace
from deployments.engine.row import Row, RowInput

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable, Sequence

    from deployments.engine.grouping import Pass
    from deployments.engine.pipeline import AnyPipeline
    from deployments.engine.row import Pixels


class Together(Pace):
    """Puts as many rows into a step as the limits allow, whether that gains or not."""

    def best_size(self, rows: Sequence[Row]) -> int:
        return len(rows)


class Hold:
    """The request, and the state, of a row that holds the engine."""


class Gathering:
    """A pipeline whose rows arrive at set moments: between two steps, those of a moment together.

    The engine stands still until the rows of a moment have begun, so that they join the very next
    step. Where no row is there whose step could hold it, a row without a picture does.

    Args:
        pipeline: of any family, or a fake.
        limits: of the engine's passes.

    Attributes:
        groups: rows of each pass.
    """

    def __init__(self, pipeline: AnyPipeline, limits: GroupLimits) -> None:
        self.groups: list[list[Row]] = []
        self._pipeline = pipeline
        self._arrivals: dict[int, list[Row]] = {}
        self._inside: list[Row] = []
        self.engine = Engine(self, limits, pace=Together(), on_pass=self._on_pass)

    def run(self, rows: Sequence[Row], arrivals: Sequence[int]) -> None:
        """Resolve every row, each of which arrives once so many steps have been made."""
        for row, arrival in zip(rows, arrivals, strict=True):
            self._arrivals.setdefault(arrival, []).append(row)
        while self._arrivals:
            pixels = np.zeros((1, 1, 3), np.uint8)
            hold = Row(RowInput(Hold(), pixels, 0, time.monotonic() + 600))
            self.engine.put([hold])
            until(hold.future.done)
            # Those that are there let in the next; where they are done before, another hold does.
            until(lambda: all(row.future.done() for row in self._inside))
        until(lambda: all(row.future.done() for row in rows))
        self.engine.close(timeout_s=60)

    def _let_in(self, moment: int) -> None:
        due = self._arrivals.pop(moment, [])
        self._inside = [*self._inside, *due]
        self.engine.put(due)
        begun = self.engine._begun
        until(lambda: begun.qsize() >= sum(not row.future.done() for row in due))

    def _on_pass(self, done: Pass) -> None:
        if not isinstance(done.rows[0].state, Hold):
            self.groups.append(list(done.rows))
            self._let_in(len(self.groups))

    def cost_px(self, row: RowInput[Any]) -> int:
        return 1 if isinstance(row.request, Hold) else self._pipeline.cost_px(row)

    def begin(self, row: RowInput[Any]) -> Generator[None, None, Any]:
        if isinstance(row.request, Hold):
            return row.request
        return (yield from self._pipeline.begin(row))

    def steps(self, state: Any) -> int:
        return 1 if isinstance(state, Hold) else self._pipeline.steps(state)

    def key(self, state: Any) -> Hashable:
        return state if isinstance(state, Hold) else (0, self._pipeline.key(state))

    def step(self, states: Sequence[Any]) -> None:
        if isinstance(states[0], Hold):
            self._let_in(min(self._arrivals))
        else:
            self._pipeline.step(states)

    def finish(self, state: Any) -> Generator[None, None, Pixels]:
        if isinstance(state, Hold):
            return np.zeros((1, 1, 3), np.uint8)
        return (yield from self._pipeline.finish(state))


def until(reached: Callable[[], bool], timeout_s: float = 60) -> None:
    """Wait for what another thread is to bring about."""
    end_s = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < end_s, "It never came about."
        time.sleep(0.0005)
