"""The arithmetic of `imagen cost`; docs/cost.md has every formula.

seconds of an image  measured; else an estimate from operations
GPUs of an hour      for each GPU of the plan, what the images of its models take, and at least one
hours that count     a GPU is up while requests come, and some time after the last one
dollars of a month   those hours, the machines that are always on, and the cluster
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cli.cost.inputs import HOURS
from deployments.buckets import choose_bucket
from deployments.errors import ConfigError
from deployments.tiling import tiles_of
from serve_app.intake import check_input

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cli.cost.inputs import OlderDesign, Prices, Requests, Speeds, Traffic
    from deployments.gpu.plan import Placed, Plan
    from deployments.registry import ModelSpec

Market = Literal["spot", "on_demand"]
MARKETS: tuple[Market, Market] = ("spot", "on_demand")
_S = 3600
_LOOKS = 240
"""Moments of an hour at which it is asked whether a node is up."""


@dataclass(frozen=True, slots=True)
class Line:
    """Requests of one task and size.

    Attributes:
        model: that serves them.
        gpu_index: the GPU of the plan that holds it.
        working_px: width and height that the model works at, of each tile.
        tiles: of an image; 1 where the model works on all of it at once.
        seconds: of a GPU for one image.
        source: `measured`, or how it was estimated.
        by_hour: requests in each hour of the day.
    """

    task: str
    model: str
    gpu_index: int
    size_px: tuple[int, int]
    working_px: tuple[int, int]
    tiles: int
    seconds: float
    source: str
    by_hour: tuple[float, ...]

    @property
    def images_a_day(self) -> float:
        return sum(self.by_hour)


@dataclass(frozen=True, slots=True)
class Hour:
    """One hour of the day.

    Attributes:
        requests: in it.
        gpu_seconds: of its images.
        gpus: that are needed at a time.
        gpu_hours: that are billed in it, on average, also of GPUs that an hour before needed.
    """

    hour: int
    requests: float
    gpu_seconds: float
    gpus: int
    gpu_hours: float


@dataclass(frozen=True, slots=True)
class Bill:
    """Dollars a month in one market."""

    gpus: float
    always_on: float
    cluster: float
    other: float

    @property
    def total(self) -> float:
        return self.gpus + self.always_on + self.cluster + self.other


def seconds_of(speeds: Speeds, model: str, size_px: tuple[int, int], gpu: str) -> tuple[float, str]:
    """GPU seconds of one image, and where they come from.

    A size that was not measured takes as much longer as it has more pixels. A model that was not
    measured on the GPU takes its operations at the rate that the reference model reaches there.

    Raises:
        ConfigError: the speeds do not know the model or the GPU.
    """
    px = math.prod(size_px)
    here = [one for one in speeds.measured if (one.model, one.gpu) == (model, gpu)]
    for one in here:
        if one.size_px == size_px:
            return one.seconds, "measured"
    if here:
        nearest = min(here, key=lambda one: abs(math.log(px / math.prod(one.size_px))))
        width, height = nearest.size_px
        scaled = nearest.seconds * px / math.prod(nearest.size_px)
        return scaled, f"estimate, from {width} x {height}"
    for counted in speeds.models:
        if counted.model == model:
            tflop = counted.tflop * px / math.prod(counted.size_px)
            return tflop / _tflop_per_s(speeds, gpu), f"estimate, {tflop:.3g} TFLOP"
    raise ConfigError(
        "Nobody has counted what this model takes of a GPU.",
        value=model,
        remedy="Add it to configs/gpu_speeds.yaml.",
    )


def _tflop_per_s(speeds: Speeds, gpu: str) -> float:
    """What the reference model reaches on its GPU, or would reach on another one."""
    model, at = speeds.reference.model, speeds.reference.gpu
    tflop = next(one.tflop for one in speeds.models if one.model == model)
    seconds = next(one.seconds for one in speeds.measured if (one.model, one.gpu) == (model, at))
    there, here = speeds.gpus[at], speeds.gpus.get(gpu)
    if here is None:
        raise ConfigError(
            "Nothing is known of how fast this GPU is.",
            value=gpu,
            remedy=f"Known are {', '.join(speeds.gpus)}; add it to configs/gpu_speeds.yaml.",
        )
    slower = min(here.tflops / there.tflops, here.memory_gb_per_s / there.memory_gb_per_s)
    return tflop / seconds * slower


def lines_of(traffic: Traffic, made: Plan, speeds: Speeds) -> list[Line]:
    """What each kind of request takes.

    Raises:
        ConfigError: a task has no model in the plan, or nothing is known of its model.
        TooLarge: a model does not take pictures of the size.
    """
    by_task: dict[str, Placed] = {}
    for placed in made.placed:
        by_task.setdefault(str(placed.demand.spec.task), placed)
    return [_line(one, by_task, speeds, made.gpu.name) for one in traffic.requests]


def _line(requests: Requests, by_task: dict[str, Placed], speeds: Speeds, gpu: str) -> Line:
    placed = by_task.get(str(requests.task))
    if placed is None:
        raise ConfigError(
            "The plan has no model for a task of the requests.",
            value=requests.task,
            remedy=f"It has {', '.join(by_task)}; name a model by --serve.",
        )
    spec = placed.demand.spec
    check_input(*requests.size, spec)
    working_px, tiles = _work(spec, requests.size, speeds)
    seconds, source = seconds_of(speeds, spec.name, working_px, gpu)
    return Line(
        task=str(requests.task),
        model=spec.name,
        gpu_index=placed.gpu_index,
        size_px=requests.size,
        working_px=working_px,
        tiles=tiles,
        seconds=tiles * seconds,
        source=source,
        by_hour=requests.per_hour,
    )


def _work(spec: ModelSpec, size_px: tuple[int, int], speeds: Speeds) -> tuple[tuple[int, int], int]:
    """The size that the model works at, and in how many tiles: those of a request without
    parameters; else the bucket of a picture; the one size of a matting model; the picture's own.
    """
    if spec.buckets:
        grid = tiles_of(spec.task.request.model_validate(spec.defaults), *size_px, spec.buckets)
        if grid is not None and grid.count <= spec.max_tiles:
            return grid.tile, grid.count
        return choose_bucket(*size_px, spec.buckets), 1
    if spec.scale > 1:
        return size_px, 1
    return next((one.size_px for one in speeds.models if one.model == spec.name), size_px), 1


def hours_of(lines: Sequence[Line], traffic: Traffic) -> list[Hour]:
    """The GPUs of each hour of the day, which comes again and again."""
    by_gpu: dict[int, list[Line]] = {}
    for line in lines:
        by_gpu.setdefault(line.gpu_index, []).append(line)
    days = [_day_of(those, traffic) for those in by_gpu.values()]
    return [
        Hour(
            hour,
            requests=sum(line.by_hour[hour] for line in lines),
            gpu_seconds=sum(line.by_hour[hour] * line.seconds for line in lines),
            gpus=sum(gpus[hour] for gpus, _ in days),
            gpu_hours=sum(billed[hour] for _, billed in days),
        )
        for hour in range(HOURS)
    ]


def _day_of(lines: Sequence[Line], traffic: Traffic) -> tuple[list[int], list[float]]:
    """GPUs for the models of one of the plan's GPUs in each hour, and the hours billed for them.

    The first is billed while it is up, and at least as long as it works. A further GPU is billed
    for the hours that need it, its start, and the time it stays after them.
    """
    requests = [sum(line.by_hour[hour] for line in lines) for hour in range(HOURS)]
    work_s = [sum(line.by_hour[hour] * line.seconds for line in lines) for hour in range(HOURS)]
    # The small number keeps a share of exactly one GPU from becoming two by rounding.
    busy = [math.ceil(one / (_S * traffic.busy_share) - 1e-9) for one in work_s]
    gpus = [max(n, 1) if coming else 0 for n, coming in zip(busy, requests, strict=True)]
    further = [max(n - 1, 0) for n in gpus]
    left = [max(further[hour - 1] - further[hour], 0) for hour in range(HOURS)]
    stays_h = traffic.lasts_s / _S
    parts = zip(up_shares(requests, traffic), work_s, further, left, strict=True)
    return gpus, [
        max(share, min(work / _S, 1)) + n + gone * stays_h for share, work, n, gone in parts
    ]


def up_shares(per_hour: Sequence[float], traffic: Traffic) -> list[float]:
    """The share of each hour that a GPU node is up, with requests at random at those rates.

    It is up at a moment if a request came in the time before that a node lasts for one request: its
    start, and how long it stays. With independent arrivals the chance of none is e^-n, where n is
    how many are expected (Poisson). Every 15 seconds of the day are looked at.
    """
    since_midnight = np.concatenate([[0.0], np.cumsum(per_hour)])

    def before(moment_h: Any) -> Any:
        days, hour = np.divmod(moment_h, HOURS)
        return days * since_midnight[-1] + np.interp(hour, range(HOURS + 1), since_midnight)

    moments_h = (np.arange(HOURS * _LOOKS) + 0.5) / _LOOKS
    expected = before(moments_h) - before(moments_h - traffic.lasts_s / _S)
    return (-np.expm1(-expected)).reshape(HOURS, _LOOKS).mean(axis=1).tolist()


def bill(hours: Sequence[Hour], traffic: Traffic, prices: Prices, gpu: str, market: Market) -> Bill:
    """Dollars a month. Machines that are always on and the cluster cost the same in each market:
    a service that keeps its head on spot machines loses it.

    Raises:
        ConfigError: a machine has no price.
    """
    month_h = prices.hours_per_month
    gpu_h = sum(hour.gpu_hours for hour in hours) / HOURS * month_h
    machine = prices.machine(prices.machine_of(gpu))
    always = sum(prices.machine(name).on_demand * n for name, n in traffic.always_on.items())
    return Bill(
        gpus=gpu_h * getattr(machine, market),
        always_on=always * month_h,
        cluster=prices.cluster.usd_per_hour * month_h,
        other=traffic.other_usd_per_month,
    )


def older_bill(design: OlderDesign, prices: Prices, market: Market) -> tuple[float, float]:
    """An older design at these prices, its GPUs' machines included: the least and the most."""
    usd = getattr(prices.machine(design.machine), market) * prices.hours_per_month
    least, most = (n * usd + design.other_usd_per_month for n in design.machines)
    return least, most
