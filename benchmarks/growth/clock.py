"""Simulated time, and what things wait for in it."""

from __future__ import annotations

import heapq
from collections import deque
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    Then = Callable[[], None]


class Clock:
    """Calls functions at their time, in order; functions of one moment in the order they were set.

    Attributes:
        now_s: seconds since the start.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Then]] = []
        self._order = count()

    def after(self, seconds: float, then: Then) -> None:
        """Call a function so much later."""
        heapq.heappush(self._heap, (self.now_s + seconds, next(self._order), then))

    def run(self, until_s: float) -> None:
        """Go on until that time, or until nothing is left to call."""
        while self._heap and self._heap[0][0] <= until_s:
            self.now_s, _, then = heapq.heappop(self._heap)
            then()


class Station:
    """Places that are taken in turn: a core, a thread, a GPU.

    Args:
        clock: of the simulation.
        places: how many there are.

    Attributes:
        busy_s: seconds that `run` has taken, of all places together.
    """

    def __init__(self, clock: Clock, places: int = 1) -> None:
        self._clock = clock
        self._free = places
        self._waiting: deque[Then] = deque()
        self.busy_s = 0.0

    def take(self, then: Then) -> None:
        """Call a function once it has a place, first come, first served; it must `free` it."""
        if self._free:
            self._free -= 1
            then()
        else:
            self._waiting.append(then)

    def free(self) -> None:
        """Give a place back."""
        if self._waiting:
            self._waiting.popleft()()
        else:
            self._free += 1

    def leave(self, then: Then) -> None:
        """Stop waiting for a place."""
        self._waiting.remove(then)

    def run(self, seconds: float, then: Then) -> None:
        """Take a place for so long, give it back, and call a function."""

        def begin() -> None:
            self.busy_s += seconds
            self._clock.after(seconds, end)

        def end() -> None:
            self.free()
            then()

        self.take(begin)
