"""What stands in for a GPU in `make bench-growth`: turns in order, and the pictures come back."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.growth.profiles import Work
from benchmarks.growth.sleeping import GpuTurns, SleepingPass
from deployments.engine.engine import Engine
from deployments.engine.grouping import GroupLimits
from deployments.engine.pipeline import Work as RequestWork
from deployments.engine.row import Row, RowInput

if TYPE_CHECKING:
    from deployments.engine.grouping import Pass


class Sized:
    """The sizes of a loaded pipeline."""

    def work(self, width_px: int, height_px: int, request: Any) -> RequestWork:
        return RequestWork(5, width_px * height_px, width_px * height_px)

    def cost_px(self, row: RowInput[Any]) -> int:
        return row.pixels.shape[0] * row.pixels.shape[1]


def test_rows_share_sleeping_passes_and_come_back_as_they_were() -> None:
    times = Work("a model", 5, (0.001, 0.001), begin_s=0.001, finish_s=0.001)
    inner: Any = Sized()
    passes: list[Pass] = []
    pipeline: Any = SleepingPass(inner, times)
    engine = Engine(pipeline, GroupLimits(2), on_pass=passes.append)
    pictures = [np.full((8, 8, 3), i, np.uint8) for i in range(12)]
    rows = [Row(RowInput(None, pixels, 0, float("inf"))) for pixels in pictures]
    engine.put(rows)
    for row, pixels in zip(rows, pictures, strict=True):
        np.testing.assert_array_equal(row.future.result(30), pixels)
    engine.close()
    assert sum(len(done.rows) for done in passes) == 12 * 5
    assert max(len(done.rows) for done in passes) == 2


def test_the_gpu_goes_to_whoever_waits_longest() -> None:
    gpu, order = GpuTurns(), list[str]()

    def use(name: str) -> None:
        with gpu.turn():
            order.append(name)

    with gpu.turn():
        threads = [threading.Thread(target=use, args=(name,)) for name in "ab"]
        for i, thread in enumerate(threads, 1):
            thread.start()
            while len(gpu.waiting) < i:
                thread.join(0.001)
    # The thread that gave it back asks again at once, and is the last all the same.
    use("main")
    for thread in threads:
        thread.join(10)
    assert order == ["a", "b", "main"]
