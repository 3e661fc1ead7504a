"""The cap that holds a replica to its share of a GPU's memory. Formulas: docs/gpu.md."""

from __future__ import annotations

import math
from typing import Any, Protocol

from deployments.errors import GpuTooSmall
from deployments.gpu.profiles import (
    choose_profile,
    context_reserve_bytes,
    gpu_name,
    load_profiles,
)

_GIB = 2**30


class DeviceMemory(Protocol):
    """A GPU's memory as one process sees it, in bytes."""

    def total_bytes(self) -> int:
        """All of the device."""
        ...

    def allocated_bytes(self) -> int:
        """Held by this process's tensors."""
        ...

    def reserved_bytes(self) -> int:
        """Held by this process's allocator, tensors included."""
        ...

    def peak_bytes(self) -> int:
        """The most that tensors held since `reset_peak`."""
        ...

    def reset_peak(self) -> None:
        """Give cached blocks back, and start to record the peak anew."""
        ...

    def set_cap(self, fraction: float) -> None:
        """Let the allocator reserve at most this fraction of the total."""
        ...


class CudaMemory:
    """`DeviceMemory` of a CUDA device.

    Args:
        device: such as cuda or cuda:0.
    """

    def __init__(self, device: str = "cuda") -> None:
        import torch

        self._cuda: Any = torch.cuda
        self._index = torch.device(device).index or 0

    @property
    def device_name(self) -> str:
        return str(self._cuda.get_device_name(self._index))

    def total_bytes(self) -> int:
        return int(self._cuda.mem_get_info(self._index)[1])

    def free_bytes(self) -> int:
        """Free on the device, whatever process holds the rest."""
        return int(self._cuda.mem_get_info(self._index)[0])

    def allocated_bytes(self) -> int:
        return int(self._cuda.memory_allocated(self._index))

    def reserved_bytes(self) -> int:
        return int(self._cuda.memory_reserved(self._index))

    def peak_bytes(self) -> int:
        return int(self._cuda.max_memory_allocated(self._index))

    def reset_peak(self) -> None:
        self._cuda.empty_cache()
        self._cuda.reset_peak_memory_stats(self._index)

    def set_cap(self, fraction: float) -> None:
        self._cuda.set_per_process_memory_fraction(fraction, self._index)


def cap_device(num_gpus: float, device: str, model: str = "", dtype: str = "float16") -> int | None:
    """Hold this process to its share of the GPU. Call it before any weights go there.

    Args:
        num_gpus: the share that Ray gave this replica.
        device: such as cpu or cuda.
        model, dtype: of the weights, so that a share that cannot hold them is refused.

    Returns:
        Bytes that its allocator may reserve; None on a CPU.

    Raises:
        GpuTooSmall: see `enforce_share`.
        ConfigError: the profile file is broken.
    """
    if device == "cpu":
        return None
    memory = CudaMemory(device)
    gpu, profiles = gpu_name(memory.device_name), load_profiles()
    known = any(profile.model == model for profile in profiles)
    profile = choose_profile(profiles, model, gpu).in_dtype(dtype) if known else None
    weights = profile.weights_bytes if profile else 0
    context = context_reserve_bytes(profiles, gpu)
    return enforce_share(num_gpus, memory, weights_bytes=weights, context_bytes=context)


def memory_bytes(device: str, cap_bytes: int | None) -> dict[str, int]:
    """Bytes of a GPU by kind: reserved and peak of this process, and its cap; zeros on a CPU."""
    if cap_bytes is None:
        return {"reserved": 0, "peak": 0, "cap": 0}
    memory = CudaMemory(device)
    reserved, peak = memory.reserved_bytes(), memory.peak_bytes()
    return {"reserved": reserved, "peak": peak, "cap": cap_bytes}


def enforce_share(
    num_gpus: float, memory: DeviceMemory, *, weights_bytes: int, context_bytes: int
) -> int:
    """Cap the allocator at `num_gpus` of the total, less the context.

    A share of one GPU or more is the whole card, and so is 0, which means that Ray gave none: then
    there is no cap.

    Returns:
        Bytes that the allocator may reserve.

    Raises:
        GpuTooSmall: the cap does not even hold the weights.
    """
    total = memory.total_bytes()
    if num_gpus >= 1 or num_gpus <= 0:
        return total
    cap = int(num_gpus * total) - context_bytes
    if cap < max(weights_bytes, 1):
        needed = math.ceil(100 * (weights_bytes + context_bytes) / total) / 100
        raise GpuTooSmall(
            f"num_gpus {num_gpus} of this GPU leaves {max(cap, 0) / _GIB:.2f} GiB beside the CUDA"
            f" context, and the weights alone take {weights_bytes / _GIB:.2f} GiB.",
            value=f"{total / _GIB:.1f} GiB in all",
            remedy=f"Set ray_actor_options.num_gpus above {needed:.2f}; `imagen plan` computes it.",
        )
    memory.set_cap(cap / total)
    return cap
