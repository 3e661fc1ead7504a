"""CUDA graphs: a pass is recorded once, and replayed without Python's launches of its kernels."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

import torch

from deployments.engine.device import free_cached_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    Work = Callable[[], torch.Tensor]
    Replay = Callable[[], None]

_SLACK = 1.1
"""On the memory of a plain pass: the allocator holds fragments beside its tensors."""
_MIB = 2**20
logger = logging.getLogger("ray.serve.imagen.graphs")


class Recorder(Protocol):
    """Records work that a device repeats later with new contents of the same tensors."""

    def record(self, work: Work) -> tuple[Replay, torch.Tensor] | None:
        """How to repeat the work, and the output that every repetition overwrites.

        None where the device has no room for it.
        """
        ...

    def reserve(self, work: Work) -> None:
        """Leave room for this work of another thread."""
        ...


class CudaGraphs:
    """Records CUDA graphs into one memory pool, so that they share what their passes need.

    Passes that are not recorded must go on to fit beside the pool. So a graph is kept only if the
    limit also leaves room for the largest plain pass that was seen, and for what is reserved.
    Record the largest pass first, because the smaller ones then need nothing more.

    Args:
        limit_bytes: what this process's allocator may reserve.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._plain_bytes = 0
        self._reserved_bytes = 0
        self._pool: Any = torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def record(self, work: Work) -> tuple[Replay, torch.Tensor] | None:
        self._plain_bytes = max(self._plain_bytes, _peak_bytes(work))
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on to use the device meanwhile.
            with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
                output = work()
        except torch.OutOfMemoryError:
            logger.warning("Out of memory while a CUDA graph was recorded; its passes run plain.")
            return None
        free_cached_memory()
        room_bytes = self._limit_bytes - torch.cuda.memory_reserved()
        needed_bytes = int(_SLACK * (self._plain_bytes + self._reserved_bytes))
        if room_bytes < needed_bytes:
            logger.warning(
                "A CUDA graph would leave %d MiB of this replica's share, and plain passes need %d"
                " MiB: passes of this size run plain. `imagen plan` counts room for graphs.",
                room_bytes // _MIB,
                needed_bytes // _MIB,
            )
            return None
        return graph.replay, output

    @torch.inference_mode()
    def reserve(self, work: Work) -> None:
        self._reserved_bytes = max(self._reserved_bytes, _peak_bytes(work))


def _peak_bytes(work: Work) -> int:
    """What work needs beside what is allocated already. It also warms up: libraries choose and load
    their kernels, which they cannot while a graph is recorded.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        torch.cuda.synchronize()
        before_bytes = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
    torch.cuda.current_stream().wait_stream(stream)
    return torch.cuda.max_memory_allocated() - before_bytes
