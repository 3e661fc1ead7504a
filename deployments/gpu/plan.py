"""GPU shares: what each model needs, and which models share a GPU.

Ray's `num_gpus: 0.2` is bookkeeping; the memory behind it is not fenced. `plan` computes shares and
row budgets that fit; `deployments.gpu.cap` holds a replica to its share. Every formula is in
docs/gpu.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from deployments.errors import GpuTooSmall
from deployments.gpu.profiles import (
    GPUS,
    Gpu,
    GpuName,
    MemoryProfile,
    choose_profile,
    context_reserve_bytes,
    load_profiles,
)
from deployments.settings import SEATS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deployments.registry import ModelSpec

_GIB = 2**30
WEIGHTS_SLACK = 0.02
"""Weights lie in the allocator's blocks, which do not fill their segments to the end."""
PEAK_SLACK = 0.10
"""Fragments and free blocks that the allocator holds beside the peak of the tensors."""
ESTIMATE_MARGIN = 0.25
"""On peaks that were not measured on the GPU at hand: workspaces of convolutions and products."""
TILE_OVERLAP_PX = 34
"""The largest overlap of the GAN upscalers' tiles, on each side."""
MAX_ROWS = SEATS
"""No batch is larger, however much memory there is: a replica works on no more requests."""
_GUIDED = frozenset({"img2img", "upscale_diffusion"})


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
