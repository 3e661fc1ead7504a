"""GPU shares: what each model needs, and which models share a GPU.

Ray's `num_gpus: 0.2` only counts; it limits no memory. `plan` computes shares and pixel budgets
that fit, and `deployments.gpu.cap` holds a replica to its share. docs/gpu.md has every formula.
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
"""On weights: the allocator's blocks do not fill their segments to the end."""
PEAK_SLACK = 0.10
"""On peaks of tensors: the allocator holds fragments and free blocks beside them."""
ESTIMATE_MARGIN = 0.25
"""On peaks that were not measured on this GPU type: workspaces of convolutions and products."""
TILE_OVERLAP_PX = 64
"""The largest overlap of a 4x GAN upscaler's tiles on each side; a 2x one's is twice as much."""
MAX_ROWS = SEATS
"""No batch is larger, because a replica works on no more requests."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one model needs of one GPU type.

    Attributes:
        spec: the model.
        gpu: the type.
        profile: what is known of the model's memory.
        context_bytes: of its process.
        row_px: pixels of one network row at the largest size.
        vae_px: pixels that the autoencoder works on at once.
        network_rows: of one picture; 2 with guidance.
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
        """Whether the profile was measured on this GPU type, at this size."""
        own = self.profile.source == "measured" and self.profile.gpu == self.gpu.name
        return own and (self.row_px, self.vae_px) == (self.profile.px, self.profile.vae_px)

    def budget_px(self, rows: int) -> int:
        """Network pixels of `rows` pictures, all at the largest size and with guidance."""
        return rows * self.network_rows * self.row_px

    def peak_bytes(self, rows: int) -> int:
        """Activations of a pass of `rows` pictures, with a margin if they are an estimate."""
        return self._with_margin(self.profile.peak_bytes(self.budget_px(rows)))

    @property
    def vae_peak_bytes(self) -> int:
        """Activations of the autoencoder, with a margin if they are an estimate."""
        factor = max(self.vae_px / self.profile.vae_px, 1.0)
        return self._with_margin(math.ceil(self.profile.vae_peak_bytes * factor))

    def graph_bytes(self, rows: int) -> int:
        """What CUDA graphs of passes of up to `rows` pictures hold: one pool for the largest."""
        return self.peak_bytes(rows) if self.spec.records_graphs else 0

    def need_bytes(self, rows: int) -> int:
        """All that a replica takes of the GPU."""
        weights = math.ceil(self.profile.weights_bytes * (1 + WEIGHTS_SLACK))
        peaks = self.peak_bytes(rows) + self.graph_bytes(rows) + self.vae_peak_bytes
        return self.context_bytes + weights + math.ceil(peaks * (1 + PEAK_SLACK))

    def percent(self, rows: int) -> int:
        """Its share of the GPU in whole hundredths, rounded up."""
        return -(-100 * self.need_bytes(rows) // self.gpu.total_bytes)

    def _with_margin(self, peak_bytes: int) -> int:
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
        """Whether the registry asks for larger batches."""
        return self.rows < self.demand.spec.max_batch_size


@dataclass(frozen=True, slots=True)
class Plan:
    """One replica of each model, on GPUs of one type.

    Attributes:
        gpu: the type.
        gpus: how many were given, or are needed.
        context_bytes: counted for each replica.
        context_measured: whether it was measured on this type.
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
    gpu: GpuName | Gpu,
    gpus: int | None = None,
    profiles: Sequence[MemoryProfile] | None = None,
) -> Plan:
    """Shares of GPUs for one replica of each model, and which models share a GPU.

    Args:
        models: to place.
        gpu: the type, by its name in the table or as it is.
        gpus: how many there are. The batches are then the largest that these hold, grown in turns
            from one row each; more GPUs never make a batch smaller. None takes the registry's
            batches (or the largest that one GPU holds), and as many GPUs as first-fit decreasing
            needs.
        profiles: what models take; None takes configs/gpu_profiles.json.

    Raises:
        GpuTooSmall: a model does not fit one GPU at one row, or all of them do not fit `gpus`.
        ConfigError: no profile knows a model.
    """
    known = load_profiles() if profiles is None else profiles
    kind = gpu if isinstance(gpu, Gpu) else GPUS[gpu]
    demands = [demand_of(spec, kind, known) for spec in models]
    for demand in demands:
        _check_alone(demand)
    rows = _grown(demands, gpus) if gpus else [_largest_alone(demand) for demand in demands]
    places = _pack([d.percent(n) for d, n in zip(demands, rows, strict=True)])
    placed = tuple(Placed(d, n, i) for d, n, i in zip(demands, rows, places, strict=True))
    measured = any(p.source == "measured" and p.gpu == kind.name for p in known)
    needed = max(places, default=-1) + 1
    return Plan(
        kind,
        gpus or needed,
        context_bytes=context_reserve_bytes(known, kind.name),
        context_measured=measured,
        placed=placed,
    )


def demand_of(spec: ModelSpec, gpu: Gpu, profiles: Sequence[MemoryProfile]) -> Demand:
    """What a model needs of a GPU type.

    Raises:
        ConfigError: no profile knows it.
    """
    profile = choose_profile(profiles, spec.name, gpu.name).in_dtype(spec.dtype)
    row_px, vae_px = profile.px, profile.vae_px
    has_guidance = "guidance_scale" in spec.parameters
    if spec.buckets:
        row_px = vae_px = max(width * height for width, height in spec.buckets)
    elif spec.scale > 1 and has_guidance:  # the network sees whole pictures, the autoencoder tiles
        vae_px = spec.tile_px**2
    elif spec.scale > 1:
        overlap_px = TILE_OVERLAP_PX * (2 if spec.scale == 2 else 1)
        row_px = vae_px = (spec.tile_px + 2 * overlap_px) ** 2
    network_rows = 2 if has_guidance else 1
    context = context_reserve_bytes(profiles, gpu.name)
    return Demand(
        spec,
        gpu,
        profile,
        context_bytes=context,
        row_px=row_px,
        vae_px=vae_px,
        network_rows=network_rows,
    )


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
    """The smallest GPU type that fits, as the object of a remedy."""
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
    """The largest batches on `gpus` GPUs: those on one GPU fewer, grown by one row in turns."""
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
    """GPUs that these batches need; infinite if one of them fits no GPU."""
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
