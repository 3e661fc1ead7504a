"""One run: requests come, pass the front, are worked on, and are counted."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.growth.clock import Clock, Station
from benchmarks.growth.fleet import Fleet
from benchmarks.growth.replica import Request

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benchmarks.growth.profiles import Scaling, Service, Work


@dataclass(slots=True)
class Result:
    """What a run showed.

    Attributes:
        seconds: of the run, without its warm-up.
        outcomes: of the requests that came after the warm-up.
        latency_s: of the pictures among them, ascending.
        gpu_hours: that nodes were paid for, from the start.
        gpu_busy: share of that in which GPUs worked.
        front_busy: share of the time in which the busier of proxy and Ingress worked.
        lost_nodes: to the spot market.
        sizes: time and nodes, whenever their number changed.
        last_s: when the last picture was there.
    """

    seconds: float
    outcomes: Counter[str] = field(default_factory=Counter[str])
    latency_s: list[float] = field(default_factory=list[float])
    gpu_hours: float = 0.0
    gpu_busy: float = 0.0
    front_busy: float = 0.0
    lost_nodes: int = 0
    sizes: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    last_s: float = 0.0

    def percentile_s(self, percent: float) -> float:
        """Of the pictures' latency; infinite if there are none."""
        return float(np.percentile(self.latency_s, percent)) if self.latency_s else float("inf")

    @property
    def ok_share(self) -> float:
        """Of the requests that got a picture."""
        return self.outcomes["ok"] / max(self.outcomes.total(), 1)

    @property
    def images_per_s(self) -> float:
        """Over the run."""
        return self.outcomes["ok"] / self.seconds


def poisson(rates: Iterable[tuple[float, float]], seed: int) -> list[float]:
    """Arrivals by chance.

    Args:
        rates: seconds, and requests a second during them, one stretch after the other.
        seed: of the random numbers.
    """
    chance = np.random.default_rng(seed)
    arrivals: list[float] = []
    start_s = 0.0
    for seconds, rate in rates:
        times = chance.uniform(0, seconds, chance.poisson(rate * seconds))
        arrivals += (start_s + np.sort(times)).tolist()
        start_s += seconds
    return arrivals


def simulate(
    work: Work,
    service: Service,
    scaling: Scaling,
    arrivals: list[float],
    *,
    warm_up_s: float = 0.0,
    seed: int = 0,
) -> Result:
    """Run until the last request has its answer.

    Args:
        work: what an image takes.
        service: around the replicas.
        scaling: of the replicas and their nodes.
        arrivals: seconds from the start, ascending.
        warm_up_s: requests before that are not counted.
        seed: of nodes, losses and the choice of replicas.
    """
    clock, chance = Clock(), random.Random(seed)
    # What is neither CPU time of the front nor of the replica: calls between processes.
    call_s = max(work.front_s - service.proxy_s - service.ingress_s, 0.0) / 2
    pods = [(Station(clock), Station(clock)) for _ in range(service.ingress_pods)]
    fleet = Fleet(clock, work, service, scaling, chance, [pod[1] for pod in pods], call_s)
    end_s = arrivals[-1]
    result = Result(end_s - warm_up_s)
    front = _Front(clock, service, pods, fleet, call_s)

    def done(request: Request, outcome: str) -> None:
        if request.arrived_s < warm_up_s:
            return
        result.outcomes[outcome] += 1
        if outcome == "ok":
            result.latency_s.append(clock.now_s - request.arrived_s)
            result.last_s = clock.now_s

    def arrive(i: int) -> None:
        at_s = arrivals[i]
        front.take(Request(at_s, at_s + service.timeout_s, done))
        if i + 1 < len(arrivals):
            clock.after(arrivals[i + 1] - at_s, lambda: arrive(i + 1))

    clock.after(arrivals[0], lambda: arrive(0))
    clock.run(end_s + service.timeout_s)
    fleet.close()
    result.latency_s.sort()
    result.gpu_hours = fleet.gpu_s / 3600
    result.gpu_busy = fleet.busy_s / fleet.gpu_s if fleet.gpu_s else 0.0
    result.front_busy = front.busy_s / end_s
    result.lost_nodes, result.sizes = fleet.lost, fleet.sizes
    return result


class _Front:
    """Proxies and Ingress replicas. A request takes half of its time there, its answer the rest."""

    def __init__(
        self,
        clock: Clock,
        service: Service,
        pods: list[tuple[Station, Station]],
        fleet: Fleet,
        call_s: float,
    ) -> None:
        self._clock, self._service, self._pods = clock, service, pods
        self._fleet, self._call_s = fleet, call_s
        self._next = 0

    @property
    def busy_s(self) -> float:
        """Of the busiest one."""
        return max(station.busy_s for pod in self._pods for station in pod)

    def take(self, request: Request) -> None:
        """The load balancer gives each pod every n-th request."""
        pod = self._next
        proxy, ingress = self._pods[pod]
        self._next = (self._next + 1) % len(self._pods)
        half_proxy_s, half_ingress_s = self._service.proxy_s / 2, self._service.ingress_s / 2
        done = request.done

        def answer(request: Request, outcome: str) -> None:
            def leave() -> None:
                ingress.run(half_ingress_s, lambda: proxy.run(half_proxy_s, last))

            def last() -> None:
                done(request, outcome)

            self._clock.after(self._call_s, leave)

        def forward() -> None:
            self._fleet.take(request, pod)

        request.done = answer
        proxy.run(half_proxy_s, lambda: ingress.run(half_ingress_s, forward))
