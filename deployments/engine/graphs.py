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

    Passes that are not recorded must go on to fit beside the pool. So one is recorded only if the
    limit also leaves room for the largest plain pass that was seen, and for what is reserved.
    Record the largest pass first, because the smaller ones then need nothing more.

    Args:
        limit_bytes: what this process's allocator may reserve.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._plain_bytes = 0
        self._reserved_bytes = 0
        self._pool_bytes = 0
        self._kept = 0
        # One stream for all warm-ups and recordings: cuBLAS keeps a workspace for each stream.
        self._stream: Any = torch.cuda.Stream()
        self._pool: Any = None

    @torch.inference_mode()
    def record(self, work: Work) -> tuple[Replay, torch.Tensor] | None:
        peak_bytes = self._peak_bytes(work)
        if peak_bytes is None or not self._has_room(peak_bytes):
            return None
        if not self._kept:
            self._pool = torch.cuda.graph_pool_handle()  # one that lost all its graphs is of no use
        before_bytes = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on to use the device meanwhile.
            with torch.cuda.graph(
                graph, self._pool, self._stream, capture_error_mode="thread_local"
            ):
                output = work()
        except torch.OutOfMemoryError:
            logger.warning("Out of memory while a CUDA graph was recorded; its passes run plain.")
            return None
        free_cached_memory()
        self._pool_bytes += max(torch.cuda.memory_reserved() - before_bytes, 0)
        self._kept += 1
        return graph.replay, output

    @torch.inference_mode()
    def reserve(self, work: Work) -> None:
        self._reserved_bytes = max(self._reserved_bytes, self._peak_bytes(work) or 0)

    def _has_room(self, peak_bytes: int) -> bool:
        self._plain_bytes = max(self._plain_bytes, peak_bytes)
        free_cached_memory()
        free_bytes, _ = torch.cuda.mem_get_info()
        room_bytes = min(self._limit_bytes - torch.cuda.memory_reserved(), free_bytes)
        growth_bytes = max(int(_SLACK * peak_bytes) - self._pool_bytes, 0)
        needed_bytes = growth_bytes + int(_SLACK * (self._plain_bytes + self._reserved_bytes))
        if room_bytes >= needed_bytes:
            return True
        logger.warning(
            "A CUDA graph and the plain passes beside it need %d MiB, and this replica's share has"
            " %d MiB left: passes of this size run plain. `imagen plan` counts room for graphs.",
            needed_bytes // _MIB,
            room_bytes // _MIB,
        )
        return False

    def _peak_bytes(self, work: Work) -> int | None:
        """What work needs beside what is allocated already; None if it runs out of memory.

        It also warms up: libraries choose and load their kernels, which they cannot while a graph
        is recorded.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                work()
                torch.cuda.synchronize()
                before_bytes = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                work()
                torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            logger.warning("Out of memory in a pass that was to be recorded.")
            return None
        torch.cuda.current_stream().wait_stream(self._stream)
        return torch.cuda.max_memory_allocated() - before_bytes
