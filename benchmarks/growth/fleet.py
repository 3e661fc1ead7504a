"""Simulated nodes: started, filled with a replica, lost, removed; and which replica gets a request.

A node has one GPU and one replica, which takes all of it.
"""

from __future__ import annotations

import math
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final

from benchmarks.growth.clock import Station
from benchmarks.growth.replica import Replica
from benchmarks.growth.router import Router

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable

    from benchmarks.growth.clock import Clock
    from benchmarks.growth.profiles import Scaling, Service, Work
    from benchmarks.growth.replica import Request

_TICK_S: Final = 1.0
_LOOK_BACK_S: Final = 30
"""Serve's autoscaler takes the mean of so long."""


class Node:
    """A GPU that is paid for.

    Attributes:
        since_s: when it was asked for.
        replica: None while node or model start, and after the replica went.
        leaving: whether its replica gets no further requests.
        idle_since_s: when its replica went; None while it has or awaits one.
    """

    def __init__(self, clock: Clock) -> None:
        self.gpu = Station(clock)
        self.since_s = clock.now_s
        self.replica: Replica | None = None
        self.leaving = False
        self.idle_since_s: float | None = None


class Fleet:
    """The nodes of one model.

    Args:
        clock: of the simulation.
        work: what an image takes.
        service: limits of a replica.
        scaling: how many nodes there are, and how they come and go.
        chance: random numbers.
        ingresses: the thread of each.
        call_s: from one of them to a replica, or back.

    Attributes:
        gpu_s: seconds that nodes were paid for, of those that are gone.
        busy_s: seconds that their GPUs worked.
        lost: nodes.
        sizes: time and nodes, whenever their number changed.
    """

    def __init__(
        self,
        clock: Clock,
        work: Work,
        service: Service,
        scaling: Scaling,
        chance: random.Random,
        ingresses: Iterable[Station],
        call_s: float,
    ) -> None:
        self._clock, self._work, self._service = clock, work, service
        self._scaling, self._chance = scaling, chance
        self._nodes: list[Node] = []
        self._waiting: deque[tuple[Request, int]] = deque()
        self._ongoing: deque[int] = deque(maxlen=int(_LOOK_BACK_S / _TICK_S))
        self._wanted = scaling.first
        self._differs_since_s: float | None = None
        self.gpu_s = self.busy_s = 0.0
        self.lost = 0
        self.sizes: list[tuple[float, int]] = []
        self.ready: list[Replica] = []
        self._routers = [
            Router(clock, thread, service.known_s, call_s, chance, partial(self.take, pod=pod))
            for pod, thread in enumerate(ingresses)
        ]
        for _ in range(scaling.first):
            self._fill(self._add())
        if scaling.least < scaling.most or scaling.spot_life_s:
            clock.after(_TICK_S, self._tick)

    # --- requests ---

    def take(self, request: Request, pod: int) -> None:
        """Give a request of a pod's Ingress to a replica. It waits where there is none."""
        if request.ended:
            return
        if not self.ready:
            self._waiting.append((request, pod))
            left_s = request.deadline_s - self._clock.now_s
            self._clock.after(left_s, lambda: request.end("late"))
            return
        self._routers[pod].send(request, self.ready)

    # --- nodes ---

    def _add(self) -> Node:
        node = Node(self._clock)
        self._nodes.append(node)
        self.sizes.append((self._clock.now_s, len(self._nodes)))
        if self._scaling.spot_life_s:
            life_s = self._chance.expovariate(1 / self._scaling.spot_life_s)
            self._clock.after(life_s, lambda: self._lose(node))
        return node

    def _fill(self, node: Node) -> None:
        """The model is loaded: requests may come."""
        if node not in self._nodes:
            return
        node.replica = Replica(self._clock, self._work, self._service, node.gpu)
        self.ready.append(node.replica)
        for router in self._routers:
            router.met(node.replica)
        while self._waiting:
            self.take(*self._waiting.popleft())

    def _lose(self, node: Node) -> None:
        if node not in self._nodes:
            return
        self.lost += 1
        self._remove(node)
        if replica := node.replica:
            self._forget(replica)
            replica.lose()

    def _forget(self, replica: Replica | None) -> None:
        """Give it no further requests."""
        if replica in self.ready:
            self.ready.remove(replica)

    def _remove(self, node: Node) -> None:
        self._nodes.remove(node)
        self.gpu_s += self._clock.now_s - node.since_s
        self.busy_s += node.gpu.busy_s
        self.sizes.append((self._clock.now_s, len(self._nodes)))

    # --- the autoscaler ---

    def _tick(self) -> None:
        self._ongoing.append(len(self._waiting) + sum(r.ongoing for r in self.ready))
        self._decide()
        with_replica = [n for n in self._nodes if n.idle_since_s is None and not n.leaving]
        for _ in range(self._wanted - len(with_replica)):
            self._start()
        # The emptiest go first.
        replicas = [node for node in with_replica if node.replica]
        surplus = max(len(with_replica) - self._wanted, 0)
        for node in sorted(replicas, key=_ongoing_of)[:surplus]:
            node.leaving = True
            self._forget(node.replica)
        for node in [node for node in self._nodes if node.leaving]:
            self._part(node)
        for node in [node for node in self._nodes if node.idle_since_s is not None]:
            if self._clock.now_s - (node.idle_since_s or 0) >= self._scaling.node_stays_s:
                self._remove(node)
        self._clock.after(_TICK_S, self._tick)

    def _decide(self) -> None:
        """Change how many are wanted once another number has been right for long enough."""
        scaling, now_s = self._scaling, self._clock.now_s
        mean = sum(self._ongoing) / len(self._ongoing)
        right = min(max(math.ceil(mean / scaling.target_ongoing), scaling.least), scaling.most)
        if right == self._wanted:
            self._differs_since_s = None
            return
        if self._differs_since_s is None:
            self._differs_since_s = now_s
        more = right > self._wanted
        delay_s = scaling.upscale_delay_s if more else scaling.downscale_delay_s
        # Serve starts the first replica at once.
        if now_s - self._differs_since_s >= delay_s or (more and not self._wanted):
            self._wanted, self._differs_since_s = right, None

    def _start(self) -> None:
        """A replica on an idle node, else on a new one."""
        idle = next((node for node in self._nodes if node.idle_since_s is not None), None)
        node, start_s = idle or self._add(), 0.0
        if idle is None:
            start_s = self._chance.uniform(*self._scaling.node_start_s)
        node.idle_since_s = None
        self._clock.after(start_s + self._scaling.load_s, lambda: self._fill(node))

    def _part(self, node: Node) -> None:
        """A leaving replica goes with its last request."""
        if not node.replica or not node.replica.ongoing:
            node.replica, node.leaving = None, False
            node.idle_since_s = self._clock.now_s

    def close(self) -> None:
        """Count the nodes that are still there."""
        for node in list(self._nodes):
            self._remove(node)


def _ongoing_of(node: Node) -> int:
    return node.replica.ongoing if node.replica else 0
