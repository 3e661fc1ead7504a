"""A pipeline whose passes sleep their measured GPU time, for real replicas without a GPU."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Generator, Hashable, Sequence

    from benchmarks.growth.profiles import Work
    from deployments.engine.grouping import GroupLimits
    from deployments.engine.pipeline import AnyPipeline
    from deployments.engine.pipeline import Work as RequestWork
    from deployments.engine.preparation import Preparation
    from deployments.engine.row import Pixels, RowInput
    from deployments.images import Picture


class GpuTurns:
    """A GPU that does one thing at a time, first come, first served. A plain lock would let the
    engine's thread take it again and again before the staging thread wakes.

    Attributes:
        waiting: who waits for it, the longest first.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy = False
        self.waiting: deque[threading.Event] = deque()

    @contextmanager
    def turn(self) -> Generator[None]:
        """Hold the GPU."""
        with self._lock:
            mine = threading.Event()
            if self._busy:
                self.waiting.append(mine)
            else:
                self._busy = True
                mine.set()
        mine.wait()
        try:
            yield
        finally:
            with self._lock:
                if self.waiting:
                    self.waiting.popleft().set()
                else:
                    self._busy = False


@dataclass(slots=True)
class _Sleeper:
    """A row between `begin` and `finish`: what came in goes out."""

    pixels: Pixels
    steps: int


class SleepingPass:
    """Stands in for a loaded pipeline: the same sizes, costs and steps, and no network.

    What a GPU would do is slept, in turns on one GPU: passes by their number of rows, and the
    autoencoder. The picture that comes out is the one that came in.

    Args:
        inner: the loaded pipeline.
        times: what to sleep.
    """

    def __init__(self, inner: AnyPipeline, times: Work) -> None:
        self._inner = inner
        self._times = times
        self._gpu = GpuTurns()

    def _sleep(self, seconds: float) -> None:
        with self._gpu.turn():
            time.sleep(seconds)

    def fit(self, picture: Picture | None, request: Any) -> Pixels:
        return self._inner.fit(picture, request)

    def work(self, width_px: int, height_px: int, request: Any) -> RequestWork:
        return self._inner.work(width_px, height_px, request)

    def cost_px(self, row: RowInput[Any]) -> int:
        return self._inner.cost_px(row)

    def begin(self, row: RowInput[Any]) -> Generator[None, None, _Sleeper]:
        yield from ()
        self._sleep(self._times.begin_s)
        height_px, width_px = row.pixels.shape[:2]
        steps = self._inner.work(width_px, height_px, row.request).steps
        return _Sleeper(row.pixels, steps)

    def steps(self, state: _Sleeper) -> int:
        return state.steps

    def key(self, state: _Sleeper) -> Hashable:
        return state.pixels.shape

    def step(self, states: Sequence[_Sleeper]) -> None:
        self._sleep(self._times.pass_s[len(states) - 1])

    def preview(self, row: RowInput[Any], state: _Sleeper) -> Pixels | None:
        return None

    def finish(self, state: _Sleeper) -> Generator[None, None, Pixels]:
        yield from ()
        self._sleep(self._times.finish_s)
        return state.pixels

    def restore(self, output: Pixels, picture: Picture | None, request: Any) -> Picture:
        return self._inner.restore(output, picture, request)

    def to(self, device: str) -> None:
        self._inner.to(device)

    def prepare(self, how: Preparation, request: Any, limits: GroupLimits) -> int:
        return 0
