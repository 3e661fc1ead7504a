"""Rows shared out among threads come back whole and in order."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
import torch
from stock import as_row

from deployments.contract import complete
from deployments.pipelines.lanes import Lanes
from deployments.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_outputs_are_those_of_the_whole_batch_in_order(count: int, rows: int) -> None:
    batch = torch.arange(rows * 2.0).reshape(rows, 2)
    parts: list[int] = []

    def forward(part: slice) -> torch.Tensor:
        parts.append(len(batch[part]))
        return batch[part] * 2

    assert torch.equal(Lanes(count).run(forward, rows), batch * 2)
    assert len(parts) == min(count, rows)
    assert max(parts) - min(parts) <= 1, "the largest part decides how long a pass takes"


def test_parts_run_at_a_time() -> None:
    met = threading.Barrier(2, timeout=20)

    def forward(part: slice) -> torch.Tensor:
        met.wait()
        return torch.zeros(1)

    assert len(Lanes(2).run(forward, 2)) == 2


def test_no_part_records_gradients_or_splits_further() -> None:
    weight = torch.ones(1, requires_grad=True)
    threads: list[int] = []

    def forward(part: slice) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            threads.append(torch.get_num_threads())
        return weight * torch.ones(1)

    with torch.inference_mode():
        assert not Lanes(2).run(forward, 2).requires_grad
    assert threads == [1]


@pytest.mark.parametrize("wrong", [0, 1])
def test_the_failure_of_a_part_is_that_of_the_pass_once_all_have_ended(wrong: int) -> None:
    ended: list[int] = []

    def forward(part: slice) -> torch.Tensor:
        ended.append(part.start)
        if part.start == wrong:
            raise RuntimeError("broken")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="broken"):
        Lanes(2).run(forward, 2)
    assert sorted(ended) == [0, 1]


@pytest.mark.parametrize("name", ["sd_ddim", "refiner", "x4", "srvgg", "isnet"])
def test_pictures_are_those_of_one_lane(
    name: str, tiny_folder: Callable[[str], Path], run_together: Callable[..., Any]
) -> None:
    spec = tiny.spec(name, tiny_folder(name))
    picture = tiny.picture(1, 32, 32)
    made: list[list[Any]] = []
    for threads in (1, 2):
        pipeline = tiny.pipeline(spec, Settings(device="cpu", torch_threads=threads))
        requests = [complete(spec.task.request(), {}, spec.parameters) for _ in range(3)]
        rows = [as_row(pipeline, request, picture, seed) for seed, request in enumerate(requests)]
        run_together(pipeline, rows)
        made.append([row.future.result() for row in rows])
    for alone, shared in zip(*made, strict=True):
        assert np.abs(alone.astype(int) - shared).max() <= 1
