"""Sends attacks for a while, and collects what should not have come back."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.answers import Answer, Documented
from tests.fuzz.attacks import Attack, Prey, attacks

if TYPE_CHECKING:
    from tests.fuzz.target import Target

HANG_S = 15.0
"""No answer takes so long: no model works here, and bodies that stand still are refused sooner."""
_THREADS = 4
_ROUND = 200
_SETTINGS = settings(
    max_examples=_ROUND,
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


class _TimeUpError(Exception):
    """Ends a round."""


@dataclass
class Hunt:
    """An attack on a target.

    Attributes:
        seed: of all that is drawn. What the service makes of it also depends on its timing.
        statuses: how often each came; 0 is a connection that was closed without an answer.
        findings: the shortest attack for each kind of breach.
        slowest_s: of all answers.
    """

    target: Target
    seed: int
    statuses: Counter[int] = field(default_factory=Counter)
    findings: dict[str, tuple[Attack, Answer]] = field(default_factory=dict)
    slowest_s: float = 0

    def __post_init__(self) -> None:
        self._until_s = 0.0
        self._round = itertools.count(self.seed * 1_000_000)
        self._documented = Documented(self.target.document)
        self._prey = Prey(self.target.tokens)
        self._lock = threading.Lock()
        at = urlsplit(self.target.url)
        self._address = str(at.hostname), int(at.port or 0)

    def run(self, seconds: float) -> None:
        """Attack for so long; the next run goes on with other requests."""
        self._until_s = time.monotonic() + seconds
        errors: list[BaseException] = []
        threads = [threading.Thread(target=self._rounds, args=(errors,)) for _ in range(_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _rounds(self, errors: list[BaseException]) -> None:
        try:
            while time.monotonic() < self._until_s:
                drawn = hypothesis.seed(next(self._round))
                drawn(_SETTINGS(given(attacks())(self._strike)))()
        except _TimeUpError:
            pass
        except BaseException as error:  # for the main thread
            errors.append(error)

    def _strike(self, attack: Attack) -> None:
        if time.monotonic() > self._until_s:
            raise _TimeUpError
        fill = self._prey.fill
        headers = tuple((name, fill(value)) for name, value in attack.headers)
        attack = replace(attack, target=fill(attack.target), headers=headers)
        answer = self._send(attack)
        self._learn(answer)
        breach = self._breach(attack, answer)
        with self._lock:
            self.statuses[answer.status] += 1
            self.slowest_s = max(self.slowest_s, answer.seconds)
            if breach:
                name = f"{attack.method!r} {self._documented.route(attack.target)}: {breach}"
                known = self.findings.get(name)
                if known is None or len(attack.body) < len(known[0].body):
                    self.findings[name] = attack, answer

    def report(self) -> str:
        """What came of it, for people."""
        counts = ", ".join(f"{status} {count}" for status, count in sorted(self.statuses.items()))
        lines = [f"{sum(self.statuses.values())} requests of seed {self.seed}: {counts}"]
        lines.append(f"slowest answer {self.slowest_s:.1f} s")
        lines += [f"{name}\n  {one}\n  {two}" for name, (one, two) in self.findings.items()]
        return "\n".join(lines)

    def _breach(self, attack: Attack, answer: Answer) -> str:
        if answer.seconds > HANG_S:
            return "hangs"
        if answer.status:
            return self._documented.breach(attack, answer)
        # Whoever left, or lied of the body's length, may get nothing.
        lied = attack.framing in ("short", "long")
        return "" if lied or attack.leaves else "no answer"

    def _send(self, attack: Attack) -> Answer:
        start_s = time.monotonic()
        status, headers, body = 0, dict[str, str](), b""
        with socket.create_connection(self._address, timeout=HANG_S + 1) as line:
            try:
                self._write(line, attack)
                if not attack.leaves:
                    status, headers, body = _read(line, attack.method)
            except TimeoutError:
                pass  # the seconds tell
            except (OSError, HTTPException):
                pass  # the server closed the connection
        return Answer(status, headers, body, time.monotonic() - start_s)

    def _write(self, line: socket.socket, attack: Attack) -> None:
        try:
            line.sendall(attack.head())
            for piece in attack.content():
                line.sendall(piece)
                time.sleep(attack.pause_s)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has answered before the end of the body

    def _learn(self, answer: Answer) -> None:
        where = answer.headers.get("location", "").encode("latin-1")
        if where.startswith(b"/api/v1/jobs/"):
            self._prey.jobs.append(where.rpartition(b"/")[2])
        elif where.startswith(b"/files/"):
            self._prey.links.append(where)


def _read(line: socket.socket, method: bytes) -> tuple[int, dict[str, str], bytes]:
    response = HTTPResponse(line, method=method.decode("latin-1"))
    response.begin()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return response.status, headers, response.read()
