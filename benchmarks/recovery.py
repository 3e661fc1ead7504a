"""`make bench-recovery`: how Imagen recovers from kill -9 of each process, and what clients see.

It starts `serve run` on configs/local.yaml, keeps two clients and a reader of `/readyz` busy, and
kills one process at a time, of those it started itself. Two times are measured from the kill: until
the first picture after which none fails, and until `/readyz` is ready and stays ready.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, Self

import httpx
import psutil
import typer
from rich.table import Table

from benchmarks import machine
from benchmarks.output import console, write_result
from benchmarks.server import imagen, process_title, running
from deployments.settings import ROOT
from deployments.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

KINDS: Final = {
    "replica": f"ServeReplica:imagen:{Task.BACKGROUND.deployment}",
    "ingress": "ServeReplica:imagen:Ingress",
    "proxy": "ProxyActor",
    "controller": "ServeController",
}
"""The titles of the processes, in the order in which they are killed."""
_QUIET_S: Final = 8
_LIMIT_S: Final = 180
_PAUSE_S: Final = 0.1


def process_of(kind: str) -> psutil.Process | None:
    """The process of that kind among those that this process has started."""
    processes = psutil.Process().children(recursive=True)
    return next((one for one in processes if process_title(one) == KINDS[kind]), None)


class Answer(NamedTuple):
    """One request.

    Attributes:
        sent_s, came_s: on the monotonic clock.
        outcome: `200`; status and code of a problem; `refused`, `cut off`; status and `plain text`.
        retry_after_s: of the Retry-After header.
        models: states by task, in an answer of `/readyz`.
    """

    sent_s: float
    came_s: float
    outcome: str
    retry_after_s: int | None = None
    models: dict[str, str] = {}  # noqa: RUF012 - never changed


def ask(call: Callable[[], httpx.Response]) -> Answer:
    """Send one request and classify its answer."""
    sent_s = time.monotonic()
    try:
        response = call()
    except httpx.ConnectError:
        return Answer(sent_s, time.monotonic(), "refused")
    except httpx.HTTPError as error:
        cut = "no answer" if isinstance(error, httpx.TimeoutException) else "cut off"
        return Answer(sent_s, time.monotonic(), cut)
    came_s = time.monotonic()
    retry_after_s = response.headers.get("retry-after")
    kind = response.headers.get("content-type", "").partition(";")[0]
    outcome, models = str(response.status_code), dict[str, str]()
    if kind == "application/problem+json":
        outcome += f" {response.json()['code']}"
    elif kind == "application/json":
        models = response.json().get("models", {})
    elif not response.is_success:
        outcome += " plain text"
    return Answer(sent_s, came_s, outcome, int(retry_after_s) if retry_after_s else None, models)


class Watch:
    """Clients in a closed loop, each request on a new connection, until the end of the block.

    Attributes:
        pictures: answers of the image route.
        readiness: answers of `/readyz`.
    """

    def __init__(self, url: str, picture: bytes, clients: int = 2) -> None:
        self.pictures: list[Answer] = []
        self.readiness: list[Answer] = []
        self._ended = threading.Event()

        def post() -> httpx.Response:
            files = {"image": picture}
            return httpx.post(
                url + Task.BACKGROUND.route, files=files, timeout=120, trust_env=False
            )

        def ready() -> httpx.Response:
            return httpx.get(url + "/readyz", timeout=120, trust_env=False)

        loops = [(post, self.pictures)] * clients + [(ready, self.readiness)]
        self._threads = [threading.Thread(target=self._loop, args=loop) for loop in loops]

    def _loop(self, call: Callable[[], httpx.Response], answers: list[Answer]) -> None:
        while not self._ended.wait(_PAUSE_S):
            answers.append(ask(call))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def settle(self, kind: str, killed: psutil.Process, limit_s: float = _LIMIT_S) -> None:
        """Wait until another process has taken its place and every answer is good for 8 s.

        Raises:
            TimeoutError: after `limit_s`.
        """
        deadline_s = time.monotonic() + limit_s
        replaced_s: float | None = None
        while (now_s := time.monotonic()) < deadline_s:
            time.sleep(0.2)
            successor = process_of(kind)
            if successor is None or successor.pid == killed.pid:
                replaced_s = None
                continue
            replaced_s = replaced_s or now_s
            if now_s > replaced_s + _QUIET_S and self._well_since(_QUIET_S):
                return
        raise TimeoutError(f"The {kind} has not recovered within {limit_s:g} s.")

    def _well_since(self, seconds: float) -> bool:
        from_s = time.monotonic() - seconds
        for answers in (list(self.pictures), list(self.readiness)):
            late = [one for one in answers if one.came_s > from_s]
            if not late or any(one.outcome != "200" for one in late):
                return False
        return True


def recovered_s(answers: Sequence[Answer], killed_s: float) -> float:
    """Seconds from the kill to the first good answer after which all are good."""
    after = [one for one in answers if one.sent_s >= killed_s]
    bad_s = max((one.sent_s for one in after if one.outcome != "200"), default=killed_s)
    good = (one.came_s for one in after if one.outcome == "200" and one.sent_s >= bad_s)
    return min(good) - killed_s


@dataclass
class Kill:
    """What one kill did.

    Attributes:
        pictures_s: from the kill to the first picture after which none failed.
        ready_s: from the kill to the first ready `/readyz` after which all were ready.
        failures: answers of the image route that were not 200, by outcome.
        ready_failures: the same of `/readyz`.
        states: the background model's states in `/readyz`, in order.
        retry_after_s: each Retry-After, and the seconds until pictures came again.
    """

    kind: str
    pictures_s: float = 0.0
    ready_s: float = 0.0
    failures: dict[str, int] = field(default_factory=dict[str, int])
    ready_failures: dict[str, int] = field(default_factory=dict[str, int])
    states: list[str] = field(default_factory=list[str])
    retry_after_s: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])


def kill(kind: str, url: str, picture: bytes) -> Kill:
    """Kill one process under light load, and wait until every answer is good again."""
    with Watch(url, picture) as watch:
        time.sleep(2)
        victim = process_of(kind)
        if victim is None:
            raise LookupError(f"There is no process of the {kind}.")
        killed_s = time.monotonic()
        victim.kill()
        watch.settle(kind, victim)
        pictures, readiness = list(watch.pictures), list(watch.readiness)
    found = Kill(kind)
    found.pictures_s = recovered_s(pictures, killed_s)
    found.ready_s = recovered_s(readiness, killed_s)
    found.failures = _bad(pictures, killed_s)
    found.ready_failures = _bad(readiness, killed_s)
    for answer in readiness:
        state = answer.models.get(Task.BACKGROUND)
        if state and found.states[-1:] != [state]:
            found.states.append(state)
    well_s = killed_s + found.pictures_s
    found.retry_after_s = [
        (one.retry_after_s, round(well_s - one.came_s, 1))
        for one in (*pictures, *readiness)
        if one.retry_after_s is not None and one.came_s >= killed_s
    ]
    return found


def _bad(answers: Sequence[Answer], killed_s: float) -> dict[str, int]:
    late = (one.outcome for one in answers if one.came_s >= killed_s)
    return dict(Counter(outcome for outcome in late if outcome != "200"))


def table(kills: Sequence[Kill]) -> Table:
    """Medians by kind, and the sum of what clients saw."""
    found = Table("killed", "pictures again, s", "/readyz again, s", "clients saw", "/readyz was")
    for kind in KINDS:
        these = [one for one in kills if one.kind == kind]
        if not these:
            continue
        pictures, readiness = Counter[str](), Counter[str]()
        for one in these:
            pictures.update(one.failures)
            readiness.update(one.ready_failures)
        found.add_row(
            kind,
            _spread([one.pictures_s for one in these]),
            _spread([one.ready_s for one in these]),
            _counts(pictures),
            _counts(readiness),
        )
    return found


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"


def _counts(seen: Counter[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in seen.most_common()) or "200 only"


def main(
    rounds: Annotated[int, typer.Option(help="Kills of each process")] = 5,
    only: Annotated[str, typer.Option(help="One kind alone; writes nothing")] = "",
) -> None:
    """Kill each process of a running server so many times, and print how it recovered."""
    picture = (ROOT / "docs/photo.jpg").read_bytes()
    kills: list[Kill] = []
    load: list[float] = []
    with running(imagen()) as server:
        for number in range(rounds):
            for kind in [only] if only else KINDS:
                kills.append(kill(kind, server.url, picture))
                load.append(round(machine.load_average(), 1))
                console.print(f"{number + 1} {asdict(kills[-1])} load {load[-1]}")
    console.print(table(kills))
    console.print(f"Load average: {min(load)} to {max(load)}")
    if only:
        return
    facts = machine.describe() | {"versions": machine.versions(["ray"]), "load": load}
    document: dict[str, Any] = {"machine": facts, "kills": [asdict(one) for one in kills]}
    write_result("recovery", document)


if __name__ == "__main__":
    typer.run(main)
