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
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple, Self

import httpx
import psutil
import typer

from benchmarks import machine
from benchmarks.output import console, make_table, write_result
from benchmarks.server import imagen, process_title, running
from deployments.settings import ROOT
from deployments.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.table import Table

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

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def settle(
        self,
        kind: str,
        killed: psutil.Process,
        limit_s: float = _LIMIT_S,
        quiet_s: float = _QUIET_S,
    ) -> None:
        """Wait until another process has taken its place and every answer is good for `quiet_s`.

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
            if now_s > replaced_s + quiet_s and self._well_since(quiet_s):
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


@dataclass(frozen=True)
class Kill:
    """What one kill did.

    Attributes:
        pictures_s: from the kill to the first picture after which none failed.
        ready_s: from the kill to the first ready `/readyz` after which all were ready.
        failures: answers of the image route that were not 200, by outcome.
        ready_failures: the same of `/readyz`.
        load: the machine's load average after it.
    """

    kind: str
    pictures_s: float
    ready_s: float
    failures: dict[str, int]
    ready_failures: dict[str, int]
    load: float


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
    return Kill(
        kind,
        pictures_s=recovered_s(pictures, killed_s),
        ready_s=recovered_s(readiness, killed_s),
        failures=_failures(pictures, killed_s),
        ready_failures=_failures(readiness, killed_s),
        load=machine.load_average(),
    )


def _failures(answers: Sequence[Answer], killed_s: float) -> dict[str, int]:
    late = (one.outcome for one in answers if one.came_s >= killed_s)
    return dict(Counter(outcome for outcome in late if outcome != "200"))


def summary(kills: Sequence[Kill]) -> Table:
    """Medians by kind, and the sum of what clients saw."""
    columns = ("killed", "pictures again, s", "/readyz again, s", "clients saw", "/readyz was")
    table = make_table("", columns, ())
    for kind in KINDS:
        these = [one for one in kills if one.kind == kind]
        table.add_row(
            kind,
            _spread([one.pictures_s for one in these]),
            _spread([one.ready_s for one in these]),
            _counts([one.failures for one in these]),
            _counts([one.ready_failures for one in these]),
        )
    return table


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"


def _counts(failures: Sequence[dict[str, int]]) -> str:
    seen = sum(map(Counter, failures), Counter[str]())
    return ", ".join(f"{count} x {name}" for name, count in seen.most_common()) or "200 only"


def main(rounds: Annotated[int, typer.Option(help="Kills of each process", min=1)] = 5) -> None:
    """Kill each process of a running server so many times, and print how it recovered."""
    picture = (ROOT / "docs/photo.jpg").read_bytes()
    kills: list[Kill] = []
    with running(imagen()) as server:
        for number in range(rounds):
            for kind in KINDS:
                kills.append(kill(kind, server.url, picture))
                console.print(f"{number + 1} {kills[-1]}")
    console.print(summary(kills))
    write_result("recovery", machine.versions(["ray"]), kills=[asdict(one) for one in kills])


if __name__ == "__main__":
    typer.run(main)
