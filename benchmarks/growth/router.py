"""Serve's router in a simulated Ingress replica: it goes by queues as it remembers them."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from benchmarks.growth.clock import Clock, Station
    from benchmarks.growth.replica import Replica, Request


class Router:
    """Gives requests to replicas as Ray 2.60's `PowerOfTwoChoicesRequestRouter` does.

    Of two replicas by chance, the one with the shorter queue gets the request. A length is what the
    replica said when it last accepted a request, with what was sent and without what ended after
    that was read. It counts for `known_s`. Where neither is known, both are asked first; where one
    is known, it gets the request, and the other is asked meanwhile.

    What replicas say waits for the Ingress's thread, behind requests that came at once. So lengths
    are old when they are read, and a burst is shared unevenly.

    Args:
        clock: of the simulation.
        thread: of the Ingress.
        known_s: see `Service`.
        call_s: from here to a replica, or back.
        chance: random numbers.
        lost: takes a request whose replica went meanwhile.
    """

    def __init__(
        self,
        clock: Clock,
        thread: Station,
        known_s: float,
        call_s: float,
        chance: random.Random,
        lost: Callable[[Request], None],
    ) -> None:
        self._clock, self._thread, self._known_s, self._call_s = clock, thread, known_s, call_s
        self._chance, self._lost = chance, lost
        self._known: dict[Replica, tuple[int, float]] = {}

    def send(self, request: Request, replicas: Sequence[Replica]) -> None:
        """Give a request to one of these, at least one."""
        pair = replicas if len(replicas) < 2 else self._chance.sample(replicas, 2)
        lengths = {r: length for r in pair if (length := self._length(r)) is not None}
        for replica in pair:
            if replica not in lengths:
                self._ask(replica)
        if lengths:
            self._give(request, min(lengths, key=lengths.__getitem__))
            return
        # The answers are there by then.
        self._clock.after(
            2 * self._call_s, lambda: self._give(request, min(pair, key=lambda r: r.ongoing))
        )

    def met(self, replica: Replica) -> None:
        """A replica is new: it was asked at once."""
        self._learn(replica, 0)

    def _length(self, replica: Replica) -> int | None:
        length, at_s = self._known.get(replica, (0, -math.inf))
        return length if self._clock.now_s - at_s < self._known_s else None

    def _learn(self, replica: Replica, length: int) -> None:
        self._known[replica] = (length, self._clock.now_s)

    def _ask(self, replica: Replica) -> None:
        self._clock.after(self._call_s, lambda: self._hear(replica))

    def _hear(self, replica: Replica) -> None:
        """What a replica says now, once it has come and is read."""
        length = replica.ongoing
        read = partial(self._thread.run, 0, lambda: self._learn(replica, length))
        self._clock.after(self._call_s, read)

    def _give(self, request: Request, replica: Replica) -> None:
        self._learn(replica, (self._length(replica) or 0) + 1)
        answer = request.done

        def ended(request: Request, outcome: str) -> None:
            if length := self._length(replica):
                self._learn(replica, length - 1)
            answer(request, outcome)

        def arrive() -> None:
            if replica.gone:
                self._known.pop(replica, None)
                self._lost(request)
                return
            request.done = ended
            replica.take(request)
            self._hear(replica)

        self._clock.after(self._call_s, arrive)
