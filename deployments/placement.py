"""GPU shares: what each model needs, which models share a GPU, and the cap of a replica.

Ray's `num_gpus: 0.2` is bookkeeping; the memory behind it is not fenced. `plan` computes shares and
row budgets that fit, `cap_device` holds a replica to its share. Every formula is in docs/gpu.md.

Needs the standard library alone; torch is imported where the device is touched.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from deployments.errors import ConfigError, GpuTooSmall

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deployments.registry import ModelSpec

PROFILES = Path(__file__).resolve().parents[1] / "configs" / "gpu_profiles.json"
_MIB, _GIB = 2**20, 2**30

CONTEXT_BYTES = 600 * _MIB
"""What a process takes beside its allocator: the CUDA context and the libraries' kernels. A stated
estimate, for GPUs that no profile has measured."""
WEIGHTS_SLACK = 0.02
"""Weights lie in the allocator's blocks, which do not fill their segments to the end."""
PEAK_SLACK = 0.10
"""Fragments and free blocks that the allocator holds beside the peak of the tensors."""
ESTIMATE_MARGIN = 0.25
"""On peaks that were not measured on the GPU at hand: workspaces of convolutions and products."""
TILE_OVERLAP_PX = 34
"""The largest overlap of the GAN upscalers' tiles, on each side."""
SEATS = 16
"""Requests a model replica works on at a time: each holds a decoded picture."""
MAX_ROWS = SEATS
"""No batch is larger, however much memory there is: a replica works on no more requests."""

GpuName = Literal["t4", "l4", "a100-40", "h100", "h200"]
_GUIDED = frozenset({"img2img", "upscale_diffusion"})


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU type.

    Attributes:
        name: as `imagen plan --gpu` knows it.
        label: for people.
        total_bytes: what CUDA reports as the device's memory, which is less than the data sheet's
            and than nvidia-smi's: the driver and ECC keep some.
        pattern: of the device names that CUDA reports.
    """

    name: GpuName
    label: str
    total_bytes: int
    pattern: str


# The totals are the lowest "total capacity" that torch's out-of-memory errors of these GPUs state;
# they differ by a few hundred MiB with the driver. A replica asks its device.
GPUS: dict[GpuName, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("t4", "T4 16 GB", int(14.56 * _GIB), r"\bT4\b"),
        Gpu("l4", "L4 24 GB", int(22.03 * _GIB), r"\bL4\b"),
        Gpu("a100-40", "A100 40 GB", int(39.38 * _GIB), r"\bA100.*40GB"),
        Gpu("h100", "H100 80 GB", int(79.10 * _GIB), r"\bH100\b"),
        Gpu("h200", "H200 141 GB", int(139.72 * _GIB), r"\bH200\b"),
    )
}


def gpu_name(device_name: str) -> str:
    """The name in `GPUS` of a device; of one that is not there, its own name in one word."""
    for gpu in GPUS.values():
        if re.search(gpu.pattern, device_name):
            return gpu.name
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """What one model takes at one size, beside the CUDA context.

    Attributes:
        model: its name in the registry.
        gpu: where it was measured, as in `GPUS`; empty for an estimate.
        source: measured on a device, or estimate: tensors counted without one.
        measured_at: date.
        context_bytes: of the process on that GPU; 0 for an estimate.
        size_px: width and height of the pass.
        weights_bytes: on the device.
        base_peak_bytes: activations of one network row.
        per_row_bytes: activations of each further one; a picture with guidance is two.
        vae_size_px: width and height of what the autoencoder does at once: a picture, or a tile.
        vae_peak_bytes: of encoding or decoding that; it may run beside a pass.
    """

    model: str
    gpu: str
    source: Literal["measured", "estimate"]
    measured_at: str
    context_bytes: int
    size_px: tuple[int, int]
    weights_bytes: int
    base_peak_bytes: int
    per_row_bytes: int
    vae_size_px: tuple[int, int]
    vae_peak_bytes: int

    def in_dtype(self, dtype: str) -> MemoryProfile:
        """Profiles are of float16; in float32 every tensor is twice as large."""
        if dtype != "float32":
            return self
        return replace(
            self,
            weights_bytes=2 * self.weights_bytes,
            base_peak_bytes=2 * self.base_peak_bytes,
            per_row_bytes=2 * self.per_row_bytes,
            vae_peak_bytes=2 * self.vae_peak_bytes,
        )

    @property
    def px(self) -> int:
        return self.size_px[0] * self.size_px[1]

    @property
    def vae_px(self) -> int:
        return self.vae_size_px[0] * self.vae_size_px[1]

    def peak_bytes(self, budget_px: int) -> int:
        """Activations of a pass over so many network pixels; never less than at one row."""
        further_rows = max(budget_px / self.px - 1, 0.0)
        return self.base_peak_bytes + math.ceil(self.per_row_bytes * further_rows)


def load_profiles(path: Path = PROFILES) -> list[MemoryProfile]:
    """Every profile of the file; none where there is no file.

    Raises:
        ConfigError: it cannot be read, or is no profile file.
    """
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        return [
            _profile(model, entry, device)
            for device in values["profiles"]
            for model, entry in device["models"].items()
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"The GPU profiles cannot be read: {error!r}.",
            value=path,
            remedy="Restore the file, or write it anew with `make profile-gpu`.",
        ) from error


def _profile(model: str, entry: dict[str, Any], device: dict[str, Any]) -> MemoryProfile:
    if device["source"] not in ("measured", "estimate"):
        raise ValueError(f"unknown source {device['source']}")
    width, height = (int(side) for side in entry["size_px"])
    vae_width, vae_height = (int(side) for side in entry["vae_size_px"])
    amounts = {
        key: int(entry[key])
        for key in ("weights_bytes", "base_peak_bytes", "per_row_bytes", "vae_peak_bytes")
    }
    if min(width, height, vae_width, vae_height) <= 0 or min(amounts.values()) < 0:
        raise ValueError(f"{model} has an amount below zero")
    return MemoryProfile(
        model=model,
        gpu=str(device["gpu"] or ""),
        source=device["source"],
        measured_at=str(device["measured_at"]),
        context_bytes=int(device["context_bytes"] or 0),
        size_px=(width, height),
        vae_size_px=(vae_width, vae_height),
        **amounts,
    )


def choose_profile(profiles: Sequence[MemoryProfile], model: str, gpu: str) -> MemoryProfile:
    """This GPU's; else the largest of other GPUs; else the estimate.

    Raises:
        ConfigError: nobody has looked at that model.
    """
    own = [profile for profile in profiles if profile.model == model]
    for found in (
        [p for p in own if p.source == "measured" and p.gpu == gpu],
        [p for p in own if p.source == "measured"],
        own,
    ):
        if found:
            return max(found, key=lambda p: p.peak_bytes(p.px) + p.vae_peak_bytes)
    raise ConfigError(
        "No GPU profile knows this model.",
        value=model,
        remedy=f"Add it to benchmarks/architectures.py and run `make profile-gpu`; known: "
        f"{', '.join(sorted({p.model for p in profiles})) or 'none'}.",
    )


def context_reserve_bytes(profiles: Sequence[MemoryProfile], gpu: str) -> int:
    """What a process on that GPU takes beside its allocator: measured there, or the estimate."""
    found = [p.context_bytes for p in profiles if p.source == "measured" and p.gpu == gpu]
    return max(found, default=CONTEXT_BYTES)


# ------------------------------------------------------------------------------------ the plan


@dataclass(frozen=True, slots=True)
class Demand:
    """What one model asks of one GPU type.

    Attributes:
        spec: the model.
        gpu: the type.
        profile: what is known of its memory.
        context_bytes: of its process.
        row_px: of one network row at the largest size.
        vae_px: of what the autoencoder does at once.
        network_rows: of one picture: 2 with guidance.
    """

    spec: ModelSpec
    gpu: Gpu
    profile: MemoryProfile
    context_bytes: int
    row_px: int
    vae_px: int
    network_rows: int

    @property
    def measured(self) -> bool:
        """Whether the profile was taken on this GPU type, at this size."""
        own = self.profile.source == "measured" and self.profile.gpu == self.gpu.name
        return own and (self.row_px, self.vae_px) == (self.profile.px, self.profile.vae_px)

    def budget_px(self, rows: int) -> int:
        """Network pixels of so many pictures, all at the largest size and with guidance."""
        return rows * self.network_rows * self.row_px

    def peak_bytes(self, rows: int) -> int:
        """Activations of the pass, with what the profile cannot know of this GPU."""
        return self._likely(self.profile.peak_bytes(self.budget_px(rows)))

    @property
    def vae_peak_bytes(self) -> int:
        larger = max(self.vae_px / self.profile.vae_px, 1.0)
        return self._likely(math.ceil(self.profile.vae_peak_bytes * larger))

    def need_bytes(self, rows: int) -> int:
        """All a replica takes of the GPU."""
        weights = math.ceil(self.profile.weights_bytes * (1 + WEIGHTS_SLACK))
        peaks = self.peak_bytes(rows) + self.vae_peak_bytes
        return self.context_bytes + weights + math.ceil(peaks * (1 + PEAK_SLACK))

    def percent(self, rows: int) -> int:
        """Its share of the GPU in whole hundredths, rounded up."""
        return -(-100 * self.need_bytes(rows) // self.gpu.total_bytes)

    def _likely(self, peak_bytes: int) -> int:
        return peak_bytes if self.measured else math.ceil(peak_bytes * (1 + ESTIMATE_MARGIN))


@dataclass(frozen=True, slots=True)
class Placed:
    """A model's place in a plan.

    Attributes:
        demand: what it asks for.
        rows: most pictures in one pass.
        gpu_index: which of the plan's GPUs holds it.
    """

    demand: Demand
    rows: int
    gpu_index: int

    @property
    def name(self) -> str:
        return self.demand.spec.name

    @property
    def percent(self) -> int:
        return self.demand.percent(self.rows)

    @property
    def num_gpus(self) -> float:
        """For Ray: hundredths, or one whole GPU."""
        return 1 if self.percent == 100 else self.percent / 100

    @property
    def budget_px(self) -> int:
        return self.demand.budget_px(self.rows)

    @property
    def reduced(self) -> bool:
        """Whether the registry asks for larger batches than this."""
        return self.rows < self.demand.spec.max_batch_size


@dataclass(frozen=True, slots=True)
class Plan:
    """One replica of each model, on GPUs of one type.

    Attributes:
        gpu: the type.
        gpus: how many there are, or are needed.
        context_bytes: counted for each replica.
        context_measured: whether that was measured on this type.
        placed: in the order of the models given.
    """

    gpu: Gpu
    gpus: int
    context_bytes: int
    context_measured: bool
    placed: tuple[Placed, ...]

    @property
    def measured(self) -> bool:
        return self.context_measured and all(p.demand.measured for p in self.placed)


def plan(
    models: Sequence[ModelSpec],
    gpu: GpuName,
    gpus: int | None = None,
    profiles: Sequence[MemoryProfile] | None = None,
) -> Plan:
    """Shares of the GPUs, and which models lie together.

    Without `gpus`, every model at its own largest batch (or the largest that one GPU holds), and as
    many GPUs as first-fit decreasing needs. With it, the largest batches that so many GPUs hold,
    grown in turns from one row each; more GPUs never make a batch smaller.

    Raises:
        GpuTooSmall: a model does not fit one GPU at one row, or all of them do not fit `gpus`.
        ConfigError: no profile knows a model.
    """
    known = load_profiles() if profiles is None else profiles
    kind = GPUS[gpu]
    demands = [_demand(spec, kind, known) for spec in models]
    for demand in demands:
        _check_alone(demand)
    rows = _grown(demands, gpus) if gpus else [_largest_alone(demand) for demand in demands]
    places = _pack([d.percent(n) for d, n in zip(demands, rows, strict=True)])
    placed = tuple(Placed(d, n, i) for d, n, i in zip(demands, rows, places, strict=True))
    measured = any(p.source == "measured" and p.gpu == gpu for p in known)
    needed = max(places, default=-1) + 1
    return Plan(kind, gpus or needed, context_reserve_bytes(known, gpu), measured, placed)


def _demand(spec: ModelSpec, gpu: Gpu, profiles: Sequence[MemoryProfile]) -> Demand:
    profile = choose_profile(profiles, spec.name, gpu.name).in_dtype(spec.dtype)
    row_px, vae_px = profile.px, profile.vae_px
    if spec.buckets:
        row_px = vae_px = max(width * height for width, height in spec.buckets)
    elif spec.family == "upscale_gan":
        row_px = vae_px = (spec.tile_px + 2 * TILE_OVERLAP_PX) ** 2
    elif spec.family == "upscale_diffusion":
        vae_px = spec.tile_px**2
    network_rows = 2 if spec.family in _GUIDED else 1
    context = context_reserve_bytes(profiles, gpu.name)
    return Demand(spec, gpu, profile, context, row_px, vae_px, network_rows)


def _check_alone(demand: Demand) -> None:
    if demand.percent(1) <= 100:
        return
    need, gpu, name = demand.need_bytes(1), demand.gpu, demand.spec.name
    larger = _first_that(lambda other: _fits_alone(demand, other))
    smaller = "smaller buckets" if demand.spec.buckets else "a smaller size"
    raise GpuTooSmall(
        f"{name} does not fit one {gpu.label}: one row needs {need / _GIB:.1f} of"
        f" {gpu.total_bytes / _GIB:.1f} GiB.",
        remedy=f"Use {larger}, {smaller} in the model registry, or another model of its task"
        " (name the models to plan).",
    )


def _fits_alone(demand: Demand, other: Gpu) -> bool:
    return replace(demand, gpu=other).percent(1) <= 100


def _first_that(fits: Callable[[Gpu], bool]) -> str:
    """The smallest GPU type that fits, for a remedy."""
    for gpu in GPUS.values():
        if fits(gpu):
            return f"--gpu {gpu.name}"
    return "several smaller models (no GPU in the table is large enough)"


def _largest_alone(demand: Demand) -> int:
    rows = demand.spec.max_batch_size
    while demand.percent(rows) > 100:
        rows -= 1
    return rows


def _grown(demands: Sequence[Demand], gpus: int) -> list[int]:
    """Largest batches on so many GPUs: those of one GPU fewer, grown one row at a time in turns."""
    rows = [1] * len(demands)
    needed = _bins(demands, rows)
    if needed > gpus:
        label = demands[0].gpu.label
        larger = _first_that(
            lambda other: _bins([replace(d, gpu=other) for d in demands], rows) <= gpus
        )
        raise GpuTooSmall(
            f"{gpus} x {label} cannot hold these {len(demands)} models, not even at one row each.",
            value=f"{needed} are needed",
            remedy=f"Give --gpus {needed}, use {larger}, smaller buckets, or fewer models.",
        )
    for count in range(int(needed), gpus + 1):
        growing = list(range(len(demands)))
        while growing:
            for i in tuple(growing):
                more = [*rows[:i], rows[i] + 1, *rows[i + 1 :]]
                if more[i] > MAX_ROWS or _bins(demands, more) > count:
                    growing.remove(i)
                else:
                    rows = more
    return rows


def _bins(demands: Sequence[Demand], rows: Sequence[int]) -> float:
    """GPUs that these batches need; infinite if one fits none."""
    percents = [d.percent(n) for d, n in zip(demands, rows, strict=True)]
    return math.inf if max(percents) > 100 else max(_pack(percents)) + 1


def _pack(percents: Sequence[int]) -> list[int]:
    """First-fit decreasing: the index of the GPU that each share goes to."""
    free: list[int] = []
    places = [0] * len(percents)
    for i in sorted(range(len(percents)), key=lambda i: -percents[i]):
        fitting = [g for g, left in enumerate(free) if left >= percents[i]]
        if not fitting:
            fitting = [len(free)]
            free.append(100)
        places[i] = fitting[0]
        free[places[i]] -= percents[i]
    return places


# ------------------------------------------------------------------------------------- the cap


class DeviceMemory(Protocol):
    """The memory of a GPU, as one process sees it."""

    def total_bytes(self) -> int:
        """Of the whole device."""
        ...

    def allocated_bytes(self) -> int:
        """Held by this process's tensors."""
        ...

    def reserved_bytes(self) -> int:
        """Held by this process's allocator, tensors included."""
        ...

    def peak_bytes(self) -> int:
        """Most that tensors held since `reset_peak`."""
        ...

    def reset_peak(self) -> None: ...

    def set_cap(self, fraction: float) -> None:
        """Let the allocator reserve so much of the total, and no more."""
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
        """Of the device, whoever holds the rest."""
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


class FakeDeviceMemory:
    """`DeviceMemory` of a GPU that is not there: whoever plays it says what is taken."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._cap_bytes = total_bytes
        self._taken_bytes = 0
        self._peak_bytes = 0

    def reserve(self, amount_bytes: int) -> None:
        """Take memory.

        Raises:
            torch.OutOfMemoryError: more than the cap leaves; nothing is taken then.
        """
        if self._taken_bytes + amount_bytes > self._cap_bytes:
            import torch

            left = self._cap_bytes - self._taken_bytes
            raise torch.OutOfMemoryError(
                f"The fake device has {left} of {self._cap_bytes} bytes left, not {amount_bytes}."
            )
        self._taken_bytes += amount_bytes
        self._peak_bytes = max(self._peak_bytes, self._taken_bytes)

    def release(self, amount_bytes: int) -> None:
        self._taken_bytes -= amount_bytes

    def total_bytes(self) -> int:
        return self._total_bytes

    def allocated_bytes(self) -> int:
        return self._taken_bytes

    def reserved_bytes(self) -> int:
        return self._taken_bytes

    def peak_bytes(self) -> int:
        return self._peak_bytes

    def reset_peak(self) -> None:
        self._peak_bytes = self._taken_bytes

    def set_cap(self, fraction: float) -> None:
        self._cap_bytes = int(fraction * self._total_bytes)


def cap_device(num_gpus: float, device: str, model: str = "", dtype: str = "float16") -> int | None:
    """Hold this process to its share of the GPU; call it before any weights go there.

    Args:
        num_gpus: the share that Ray gave this replica.
        device: such as cpu or cuda.
        model, dtype: its name and that of its weights, so that a share they cannot fit is refused.

    Returns:
        Bytes its allocator may reserve; None on a CPU.

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
    """What this process holds of a GPU, by kind: reserved, peak and cap; zeros on a CPU."""
    if cap_bytes is None:
        return {"reserved": 0, "peak": 0, "cap": 0}
    memory = CudaMemory(device)
    reserved, peak = memory.reserved_bytes(), memory.peak_bytes()
    return {"reserved": reserved, "peak": peak, "cap": cap_bytes}


def enforce_share(
    num_gpus: float, memory: DeviceMemory, *, weights_bytes: int, context_bytes: int
) -> int:
    """Cap the allocator at `num_gpus` of the total, less the context; the cap in bytes.

    One GPU or more is the whole card, and so is 0, which no share was given for: no cap then.

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


def as_gpu(name: str) -> GpuName:
    """A name of the table, which may be written in capitals: L4 is how it is sold.

    Raises:
        ConfigError: there is no such GPU in it.
    """
    known = name.lower()
    if known not in GPUS:
        raise ConfigError("No such GPU in the table.", value=name, remedy=f"Known: {_names()}.")
    return known


def _names() -> str:
    return ", ".join(GPUS)
