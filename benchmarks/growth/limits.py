"""Where what stands before the GPUs becomes the limit, from measured CPU times."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.growth.profiles import refiner_on_h100
from benchmarks.output import RESULTS

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.growth.profiles import Work

MOST_BUSY: Final = 0.7
"""Of a core: above that, queues in front of it grow."""
JOBS: Final = RESULTS / "jobs-2026-11-26.json"


@dataclass(frozen=True, slots=True)
class Front:
    """What the check measured.

    Attributes:
        proxy_s, ingress_s: CPU seconds of one more request with a picture of 512 x 512 px.
        controller_share: of a core, without replicas.
        controller_share_of_replica: that each replica adds to it.
        redis_jobs_per_s: whole jobs that one Redis carried, beside everything else on two cores.
    """

    proxy_s: float
    ingress_s: float
    controller_share: float
    controller_share_of_replica: float
    redis_jobs_per_s: float

    @property
    def proxy_per_s(self) -> float:
        """Requests a second that keep a proxy, which is one process, as busy as it may be."""
        return MOST_BUSY / self.proxy_s

    @property
    def ingress_per_s(self) -> float:
        """The same of an Ingress replica. Each pod has one of either."""
        return MOST_BUSY / self.ingress_s

    @property
    def controller_replicas(self) -> float:
        """Replicas of models that keep Serve's controller as busy as it may be."""
        return (MOST_BUSY - self.controller_share) / self.controller_share_of_replica


def latest() -> Path:
    """The newest result of the check."""
    return sorted(RESULTS.glob("growth-[0-9]*.json"))[-1]


def work() -> Work:
    """The refiner on an H100, with what the check found a request to take beside the GPU."""
    kept = _read(latest())["work"]
    return replace(refiner_on_h100(), **{k: kept[k] for k in ("file_s", "front_s")})


def front(file: Path | None = None, controller: Path | None = None) -> Front:
    """From the check's result, that of the controller, and that of `make bench-jobs`."""
    kept = _read(file or latest())
    shares = _read(controller or sorted(RESULTS.glob("growth-controller-*.json"))[-1])["shares"]
    slope, start = np.polyfit([int(count) for count in shares], list(shares.values()), 1)
    return Front(
        *(_of_request(kept, name) for name in ("proxy", "ingress")),
        controller_share=float(start),
        controller_share_of_replica=float(slope),
        redis_jobs_per_s=_read(JOBS)["bare"]["queue: submit, claim, finish"]["median"]["per_s"],
    )


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _of_request(kept: dict[str, Any], name: str) -> float:
    """CPU time beyond what the process takes without requests, in the bursts: where a process is
    busy, a request takes less than where it has to wake for each.
    """
    bursts = [load for load in kept["loads"] if load["name"] == "burst"]
    quiet = kept["quiet_cpu_share"]
    spent_s = sum(
        load["cpu_s"][name] - quiet[str(load["replicas"])][name] * load["wall_s"] for load in bursts
    )
    return spent_s / sum(load["ok"] for load in bursts)
