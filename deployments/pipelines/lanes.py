"""A pass on a CPU, its rows split among threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from deployments.engine.passes import rows_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.engine.passes import Forward, Tensors


class Lanes:
    """Runs parts of a batch at the same time, each on one thread that torch splits no further.

    On a CPU torch's own threads wait for each other after every operation, lanes only after every
    pass. Two lanes make twice the rows of one; two of torch's threads make fewer (docs/engine.md).

    Args:
        count: of parts, at most; 1 runs every batch whole, which suits a GPU.
    """

    def __init__(self, count: int = 1) -> None:
        self._count = count
        self._pool = ThreadPoolExecutor(
            max(count - 1, 1), "lane", initializer=torch.set_num_threads, initargs=(1,)
        )

    def spread(self, forward: Forward) -> Forward:
        """A call that shares the rows of named tensors among the lanes."""

        def spread(tensors: Tensors) -> torch.Tensor:
            def part_of(part: slice) -> torch.Tensor:
                return forward({name: tensor[part] for name, tensor in tensors.items()})

            return self.run(part_of, rows_of(tensors))

        return spread

    def run(self, forward: Callable[[slice], torch.Tensor], rows: int) -> torch.Tensor:
        """The outputs of all rows, in order.

        Args:
            forward: the output of the rows in a slice; called on several threads at a time.
            rows: of the batch.
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
            wait(others)  # a failed pass is repeated, and must be over by then
        try:
            return torch.cat([first, *(other.result() for other in others)])
        finally:
            others.clear()  # an error holds this frame, which must not hold the error


@torch.inference_mode()  # the mode belongs to a thread
def _infer(forward: Callable[[slice], torch.Tensor], part: slice) -> torch.Tensor:
    return forward(part)
