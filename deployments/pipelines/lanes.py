"""A pass on a CPU, its rows shared out among threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class Lanes:
    """Runs parts of a batch at a time, each on a thread that torch does not split any further.

    On a CPU torch's own threads meet after every operation, and these after every pass: two lanes
    make twice the rows of one, where two threads of torch's make fewer (`make bench-threads`).

    Args:
        count: parts, at most; 1 runs every batch whole, as a GPU wants it.
    """

    def __init__(self, count: int = 1) -> None:
        self._count = count
        self._pool = ThreadPoolExecutor(
            max(count - 1, 1), "lane", initializer=torch.set_num_threads, initargs=(1,)
        )

    def run(self, forward: Callable[[slice], torch.Tensor], rows: int) -> torch.Tensor:
        """The outputs of all rows, in order.

        Args:
            forward: of the rows in a slice; called on several threads at a time.
        """
        count = min(self._count, rows)
        if count == 1:
            return forward(slice(0, rows))
        ends = [rows * part // count for part in range(count + 1)]
        parts = [slice(start, end) for start, end in pairwise(ends)]
        others = [self._pool.submit(_infer, forward, part) for part in parts[1:]]
        try:
            first = forward(parts[0])
        finally:
            wait(others)  # a failed pass is tried again, and must be over by then
        try:
            return torch.cat([first, *(other.result() for other in others)])
        finally:
            others.clear()  # an error holds this frame, and this frame the error


@torch.inference_mode()  # a mode of the thread
def _infer(forward: Callable[[slice], torch.Tensor], part: slice) -> torch.Tensor:
    return forward(part)
