"""Planned faults of a server, and the log of its requests."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal, get_args

Kind = Literal[
    "silent", "stall", "reset", "403", "409", "429", "503", "500", "truncate", "flip", "overwrite"
]

BEFORE = frozenset({"silent", "overwrite"})
REFUSALS = frozenset({"403", "409", "429", "503", "500"})
BODIES = frozenset({"stall", "reset", "truncate", "flip"})


@dataclass
class Fault:
    """One planned fault; `Faults.add` says what its fields mean."""

    kind: Kind
    path_contains: str
    times: float
    after_bytes: int
    seconds: float
    callback: Callable[[], object] | None
    method: str
    skip: int

    def fits(self, method: str, path: str, length: int) -> bool:
        if self.method not in ("", method) or self.path_contains not in path:
            return False
        return self.kind not in BODIES or length > self.after_bytes


@dataclass
class Exchange:
    """One request and what was answered; `sent` counts the bytes of a body so far."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    began: float = field(default_factory=time.monotonic)
    status: int = 0
    sent: int = 0
    fault: str = ""


class Faults:
    """A plan of faults and the counters of one server, safe to use from any thread.

    A path is unquoted and has no query. A counter already includes what a client
    has received, so a test may read it as soon as its client returns.
    """

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()
        self.log: list[Exchange] = []
        self._plan: list[Fault] = []
        self._lock = threading.Lock()

    def add(
        self,
        kind: Kind,
        path_contains: str = "",
        times: float = 1,
        after_bytes: int = 0,
        *,
        seconds: float = 1.0,
        callback: Callable[[], object] | None = None,
        method: str = "",
        skip: int = 0,
    ) -> None:
        """Plan a fault for the next `times` requests that fit (`math.inf`: for all).

        Args:
            kind: a status refuses any request. "silent" waits, "overwrite" calls `callback`,
                then both answer as usual. "stall", "reset", "truncate" and "flip" strike
                only the body of a file, never a listing or a HEAD.
            path_contains: part of the unquoted path.
            times: how often.
            after_bytes: of the body; a body no longer than this is left alone.
            seconds: how long a stall or silence lasts, or what Retry-After says.
            callback: for "overwrite".
            method: only requests with this method.
            skip: how many requests that fit to leave alone first.
        """
        if kind not in get_args(Kind) or (kind == "overwrite") != (callback is not None):
            raise ValueError(f"not a fault: {kind} with callback {callback}")
        fault = Fault(kind, path_contains, times, after_bytes, seconds, callback, method, skip)
        with self._lock:
            self._plan.append(fault)

    def clear(self) -> None:
        """Forget the plan; the counters stay."""
        with self._lock:
            self._plan.clear()

    def reset_counters(self) -> None:
        with self._lock:
            self.requests.clear()
            self.bytes_sent.clear()
            self.log.clear()

    def pending(self) -> list[Fault]:
        """The faults that have not struck as often as planned."""
        with self._lock:
            return list(self._plan)

    def take(self, kinds: Collection[str], method: str, path: str, length: int = 0) -> Fault | None:
        """The first planned fault that fits, which counts as having struck."""
        with self._lock:
            for fault in self._plan:
                if fault.kind not in kinds or not fault.fits(method, path, length):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                if fault.times <= 0:
                    self._plan.remove(fault)
                return fault
        return None

    def begin(self, exchange: Exchange) -> None:
        with self._lock:
            self.requests[exchange.path] += 1
            self.log.append(exchange)

    def count(self, exchange: Exchange, sent: int) -> None:
        with self._lock:
            exchange.sent += sent
            self.bytes_sent[exchange.path] += sent
