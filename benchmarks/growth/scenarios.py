"""The scenarios of docs/growth.md."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from benchmarks.growth.profiles import KNOWN_S, Scaling, Service, fixed
from benchmarks.growth.simulation import poisson, simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from benchmarks.growth.limits import Front
    from benchmarks.growth.profiles import Work
    from benchmarks.growth.simulation import Result

SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
P95_S: Final = 2.0
LEAST_OK: Final = 0.999
_REQUESTS: Final = 4000
_WARM_UP_S: Final = 20.0
_EXACT: Final = 0.02
"""Of the load that is looked for."""
_STEP: Final = 0.3
"""The next size of a fleet holds at most so much more load."""
_BUSY_PODS: Final = 0.5


def service_for(rate: float, front: Front, known_s: float = KNOWN_S) -> Service:
    """A service with so many ingress pods that none is busier than half of its time."""
    slowest_s = max(front.proxy_s, front.ingress_s)
    pods = max(math.ceil(rate * slowest_s / _BUSY_PODS), 2)
    return Service(pods, front.proxy_s, front.ingress_s, known_s=known_s)


# ------------------------------------------------------------------------- 1) how many GPUs


@dataclass(frozen=True, slots=True)
class Held:
    """The most that so many GPUs do within the percentile.

    Attributes:
        gpus: all of the time.
        rate: requests a second.
        load: that rate over what the GPUs can do in the groups that pay most.
        p50_s, p95_s: at that rate.
        pods: ingress pods, each busy for half of its time at most.
    """

    gpus: int
    rate: float
    load: float
    p50_s: float
    p95_s: float
    pods: int


def held(
    work: Work,
    front: Front,
    gpus: int,
    p95_s: float = P95_S,
    *,
    requests: int = _REQUESTS,
    between: tuple[float, float] = (0.0, 1.0),
    known_s: float = KNOWN_S,
) -> Held | None:
    """The highest rate at which the 95th percentile holds and nobody is refused; None if there is
    none.

    Args:
        work: what an image takes.
        front: what a request takes before.
        gpus: all of the time.
        p95_s: the percentile.
        requests: to simulate at each rate, at least.
        between: loads, of what the GPUs can do.
        known_s: see `Service`.
    """
    low, high = between
    best: Held | None = None
    while high - low > _EXACT:
        load = (low + high) / 2
        rate = load * gpus * work.capacity_per_s
        if found := _held_at(work, front, gpus, rate, p95_s, requests, known_s):
            low, best = load, found
        else:
            high = load
    return best


def gpus_for(
    work: Work, front: Front, rate: float, p95_s: float, requests: int = _REQUESTS
) -> Held:
    """The fewest GPUs that hold the 95th percentile at this rate.

    Raises:
        ValueError: not even an idle GPU holds it.
    """
    if p95_s <= work.alone_s + work.front_s:
        raise ValueError(f"A lone request takes {work.alone_s + work.front_s:.2f} s.")
    least = math.ceil(rate / work.capacity_per_s)
    most, best = least, None
    while best is None:
        most += max(most // 2, 1)
        best = _held_at(work, front, most, rate, p95_s, requests)
    while least < most:
        middle = (least + most) // 2
        if found := _held_at(work, front, middle, rate, p95_s, requests):
            most, best = middle, found
        else:
            least = middle + 1
    return best


def _held_at(
    work: Work,
    front: Front,
    gpus: int,
    rate: float,
    p95_s: float,
    requests: int,
    known_s: float = KNOWN_S,
) -> Held | None:
    """What the GPUs do at this rate; None if that is too much for them."""
    service = service_for(rate, front, known_s)
    seconds = _WARM_UP_S + max(requests / rate, 30)
    arrivals = poisson([(seconds, rate)], gpus)
    run = simulate(work, service, fixed(gpus), arrivals, warm_up_s=_WARM_UP_S, seed=gpus)
    if run.ok_share < LEAST_OK or run.percentile_s(95) > p95_s:
        return None
    load = rate / (gpus * work.capacity_per_s)
    return Held(gpus, rate, load, run.percentile_s(50), run.percentile_s(95), service.ingress_pods)


def growth(work: Work, front: Front, known_s: float, sizes: Iterable[int] = SIZES) -> list[Held]:
    """`held` of each size, ascending: the next fleet holds not much more load."""
    rows: list[Held] = []
    for gpus in sizes:
        between = (rows[-1].load / 2, min(rows[-1].load + _STEP, 1.0)) if rows else (0.0, 1.0)
        if found := held(work, front, gpus, between=between, known_s=known_s):
            rows.append(found)
    return rows


# ------------------------------------------------------------------------ 2) a sudden morning

_QUIET_S: Final = 600.0
_BUSY_S: Final = 1200.0


def morning(work: Work, front: Front, rate: float, scaling: Scaling, seed: int) -> Result:
    """Hardly a request for ten minutes, then this rate for twenty."""
    arrivals = poisson([(_QUIET_S, 0.02), (_BUSY_S, rate)], seed)
    return simulate(
        work, service_for(rate, front), scaling, arrivals, warm_up_s=_QUIET_S, seed=seed
    )


def mornings(work: Work, front: Front, rate: float) -> list[dict[str, Any]]:
    """The same morning with different beginnings."""
    from_zero = Scaling(least=0, most=40, first=0)
    variants = {
        "from zero": from_zero,
        "two GPUs are kept": replace(from_zero, least=2, first=2),
        "ten GPUs are kept": replace(from_zero, least=10, first=10),
        "from zero, nodes start in 1 minute": replace(from_zero, node_start_s=(60.0, 60.0)),
        "two kept, target of 2 requests": replace(from_zero, least=2, first=2, target_ongoing=2.0),
    }
    return [
        {"variant": name} | _averaged(lambda seed, s=s: morning(work, front, rate, s, seed))
        for name, s in variants.items()
    ]


# --------------------------------------------------------------------------------- 3) on spot


def spots(work: Work, front: Front, rate: float, gpus: int) -> list[dict[str, Any]]:
    """Half an hour of a fleet whose nodes live for so long on average."""
    rows: list[dict[str, Any]] = []
    for hours, more in ((None, 0), (24, 0), (4, 0), (1, 0), (1, gpus // 10)):
        count = gpus + more
        scaling = replace(fixed(count), spot_life_s=hours and hours * 3600.0)

        def half_hour(seed: int, scaling: Scaling = scaling) -> Result:
            arrivals = poisson([(1800.0, rate)], seed)
            service = service_for(rate, front)
            return simulate(work, service, scaling, arrivals, warm_up_s=60, seed=seed)

        rows.append({"mean_life_h": hours, "gpus": count} | _averaged(half_hour, seeds=1))
    return rows


def _averaged(run: Callable[[int], Result], seeds: int = 2) -> dict[str, Any]:
    """The mean of some runs."""
    runs = [run(seed) for seed in range(seeds)]
    total = sum(sum(one.outcomes.values()) for one in runs)
    outcomes = {
        name: sum(one.outcomes[name] for one in runs) / total
        for name in ("ok", "refused", "late", "lost")
    }
    return {
        **outcomes,
        "p50_s": sum(one.percentile_s(50) for one in runs) / seeds,
        "p95_s": sum(one.percentile_s(95) for one in runs) / seeds,
        "gpu_hours": sum(one.gpu_hours for one in runs) / seeds,
        "gpu_busy": sum(one.gpu_busy for one in runs) / seeds,
        "most_gpus": max(size for one in runs for _, size in one.sizes),
        "lost_nodes": sum(one.lost_nodes for one in runs) / seeds,
    }


# ------------------------------------------------------------------------------------ the plot


def draw(rows: Sequence[Held], front: Front, gke_pods: int, path: Path) -> None:
    """GPUs over requests a second, with the limits of what stands before them, as SVG."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "growth"  # the same file from the same figures
    figure, axes = plt.subplots(figsize=(7.2, 4.2))
    axes.loglog([row.rate for row in rows], [row.gpus for row in rows], "o-", color="#205080")
    pod = min(front.proxy_per_s, front.ingress_per_s)
    marks = (
        (pod, "one ingress pod"),
        (gke_pods * pod, f"{gke_pods} ingress pods (configs/gke.yaml)"),
        (front.redis_jobs_per_s, "one Redis, if all are jobs"),
    )
    for rate, name in marks:
        axes.axvline(rate, color="#b04020", linestyle="--", linewidth=1)
        axes.text(rate * 0.97, 1.1, name, rotation=90, ha="right", va="bottom", fontsize=8)
    axes.axhline(front.controller_replicas, color="#606060", linestyle=":", linewidth=1)
    axes.text(
        1, front.controller_replicas * 1.08, "one Serve controller (extrapolated)", fontsize=8
    )
    axes.set_xlabel("requests a second (SDXL refiner, 1024 px, 30 steps at strength 0.3)")
    axes.set_ylabel(f"H100 for a p95 of {P95_S:g} s")
    axes.grid(visible=True, which="major", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
