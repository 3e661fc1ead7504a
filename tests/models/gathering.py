"""Rows that arrive at set moments, so that no test depends on how fast it runs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from deployments.engine.engine import Engine
from deployments.engine.grouping import GroupLimits, Pace
from deployments.engine.row import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable, Sequence

    from deployments.engine.pipeline import Pipeline
    from deployments.engine.row import Pixels


class Together(Pace):
    """Puts as many rows into a step as the limits allow, whether that gains or not."""

    def best_size(self, rows: Sequence[Row]) -> int:
        return len(rows)


class Gathering:
    """A pipeline whose rows arrive at set moments: between two steps, and with all of one moment.

    The engine stands still until the rows of a moment have begun, so that they join the very next
    step. A row of no picture holds it where there is none whose step could.

    Args:
        pipeline: of any family, or a fake.
        limits: of the engine's passes.
    """

    def __init__(self, pipeline: Pipeline, limits: GroupLimits) -> None:
        self.groups: list[list[Row]] = []
        self._pipeline = pipeline
        self._arrivals: dict[int, list[Row]] = {}
        self._holding: set[Row] = set()
        self._inside: list[Row] = []
        self.engine = Engine(self, limits, pace=Together())

    def run(self, rows: Sequence[Row], arrivals: Sequence[int]) -> None:
        """Resolve every row, each of which arrives once so many steps have been made."""
        for row, arrival in zip(rows, arrivals, strict=True):
            self._arrivals.setdefault(arrival, []).append(row)
        while self._arrivals:
            hold = Row(None, np.zeros((1, 1, 3), np.uint8), 0, time.monotonic() + 600)
            self._holding.add(hold)
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

    def cost_px(self, row: Row) -> int:
        return 1 if row in self._holding else self._pipeline.cost_px(row)

    def begin(self, row: Row) -> Generator[None, None, None]:
        if row in self._holding:
            row.steps_left = 1
        else:
            yield from self._pipeline.begin(row)

    def key(self, row: Row) -> Hashable:
        return row if row in self._holding else (0, self._pipeline.key(row))

    def step(self, rows: Sequence[Row]) -> None:
        if rows[0] in self._holding:
            self._let_in(min(self._arrivals))
        else:
            self._pipeline.step(rows)
            self.groups.append(list(rows))
            self._let_in(len(self.groups))

    def finish(self, row: Row) -> Generator[None, None, Pixels]:
        if row in self._holding:
            return row.pixels
        return (yield from self._pipeline.finish(row))


def until(reached: Callable[[], bool], timeout_s: float = 60) -> None:
    """Wait for what another thread is to bring about."""
    end_s = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < end_s, "It never came about."
        time.sleep(0.0005)
