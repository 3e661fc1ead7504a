"""20,000 requests of thousands of sizes, of which 30 % leave early, and what stays behind of them:
`make soak-clients`.

Memory: the resident size of the proxy, the ingress and the model replicas is sampled under load,
and a line is fitted to it after the warm-up. Rows: 200 clients then ask for long work and leave;
the request after them may take twice its time on the idle server at most. At the end nobody may be
working any more, and 100 further requests must all get their picture.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import httpx
import numpy as np
import psutil
import typer
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.load import parse_plan, run
from benchmarks.peers.server import running
from benchmarks.peers.systems import OURS, SYSTEMS, System
from deployments.settings import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.load import Plan, Report

RESULTS: Final = ROOT / "benchmarks/results"
MIB: Final = 2**20
WARM_UP: Final = 2000
AFTERWARDS: Final = 100
LEAVERS: Final = 200
SLOWER: Final = 2
"""How many times its idle time the request after the leavers may take."""
_SAMPLES: Final = 400
_SILENCE_S: Final = 5
_IDLE_SHARE: Final = 0.2
_ASLEEP: Final = ("Comic", "Aged")
_PROCESSES: Final = ("ProxyActor", "ServeReplica:imagen:")
_SIZES: Final[dict[str, list[dict[str, Any]]]] = {
    "background": [{"size": [8, 8], "up_to": [512, 512]}],
    "upscale": [
        {"size": [8, 8], "up_to": [96, 96], "weight": 9},
        {"size": [97, 97], "up_to": [300, 300]},
    ],
    "enhance": [{"size": [32, 32], "up_to": [160, 160]}],
}
# By what they cost: a quarter of the time is upscale's, and enhance takes a second.
_WEIGHTS: Final = {"background": 40, "upscale": 60, "enhance": 0.2}
console = Console(width=None if sys.stdout.isatty() else 130)


def plan(
    requests: int,
    *,
    leaving: float = 0.3,
    seed: int = 0,
    clients: int = 8,
    tasks: Sequence[str] = tuple(_SIZES),
) -> Plan:
    """A closed load of pictures from tiny to 512 px, with clients who leave within 100 ms.

    Nearly every request to background has a size of its own; so have most of the first thousands to
    upscale, and nearly all its large ones.
    """
    mix = [{"task": task, "weight": _WEIGHTS[task], "sizes": _SIZES[task]} for task in tasks]
    return _plan(requests, clients, mix, seed=seed, leaving=leaving, after_s=(0, 0.1))


def leavers(clients: int) -> Plan:
    """Clients who ask for a hundred steps, and leave when these have begun."""
    mix = [{"task": "enhance", "parameters": {"steps": 100}, "sizes": [[256, 256]]}]
    return _plan(LEAVERS, clients, mix, leaving=1, after_s=(0.1, 0.5))


def default_requests(count: int, warm_up: int = 0) -> Plan:
    """Requests to the same model, one by one, with its own defaults."""
    mix = [{"task": "enhance", "sizes": [[512, 512]]}]
    return _plan(count, 1, mix, leaving=0).change(warm_up=warm_up)


def _plan(
    requests: int,
    clients: int,
    mix: list[dict[str, Any]],
    *,
    seed: int = 0,
    leaving: float,
    after_s: tuple[float, float] = (0, 0),
) -> Plan:
    values: dict[str, Any] = {
        "name": "soak of leaving clients",
        "seed": seed,
        "mode": "closed",
        "concurrency": clients,
        "requests": requests,
        "timeout_s": 60,
        "disconnect_share": leaving,
        "disconnect_after_s": after_s,
        "mix": mix,
    }
    return parse_plan(values, "The plan of the soak")


def ours() -> System:
    """Imagen as in configs/local.yaml, without the two models that are not asked."""
    system = SYSTEMS[OURS]

    def command(port: int, folder: Path) -> list[str]:
        found = system.command(port, folder)
        file = folder / "serve.yaml"
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        for deployment in values["applications"][0]["deployments"]:
            if deployment["name"] in _ASLEEP:
                deployment["autoscaling_config"] = {"min_replicas": 0, "max_replicas": 1}
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        return found

    return System("Imagen", command, environment=system.environment)


class Memory:
    """Samples the resident memory of the server's processes, by requests done."""

    def __init__(self, requests: int) -> None:
        self._every = max(requests // _SAMPLES, 1)
        self._processes = dict(_server_processes())
        self.requests: list[int] = []
        self.mib: dict[str, list[float]] = {name: [] for name in self._processes}

    def __call__(self, _phase: str, done: int) -> None:
        """Hears how many requests are done; raises NoSuchProcess if a process was replaced."""
        if done % self._every:
            return
        self.requests.append(done)
        for name, process in self._processes.items():
            self.mib[name].append(process.memory_info().rss / MIB)

    def busy_share(self, seconds: float) -> dict[str, float]:
        """Of one core, in the time from now on."""
        before = {name: _cpu_s(process) for name, process in self._processes.items()}
        time.sleep(seconds)
        after = {name: _cpu_s(process) for name, process in self._processes.items()}
        return {name: (after[name] - before[name]) / seconds for name in before}


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _server_processes() -> Iterator[tuple[str, psutil.Process]]:
    """The proxy, the ingress and the model replicas among our own descendants."""
    for process in psutil.Process().children(recursive=True):
        title = " ".join(process.cmdline()).strip()
        # While it starts, a worker's title begins with the actor's name.
        if title.startswith("ray::") and any(kind in title for kind in _PROCESSES):
            # While it works, it ends in the method's.
            yield title.removeprefix("ray::").rpartition(":")[2].partition(".")[0], process


def fit(requests: Sequence[int], mib: Sequence[float]) -> dict[str, Any]:
    """A line through memory over requests: MiB per 1,000 requests, with its standard error.

    Neighbouring samples are alike, so that there are fewer than it seems: the error is widened by
    the lag-1 correlation of what the line leaves over.
    """
    x, y = np.array(requests) / 1000, np.array(mib)
    if len(x) < 8:
        return {"slope": float("nan"), "standard_error": float("nan"), "last_mib": float(y[-1])}
    design = np.stack([x, np.ones_like(x)], 1)
    (slope, start), *_ = np.linalg.lstsq(design, y)
    rest = y - slope * x - start
    spread = float(rest @ rest)
    error = np.sqrt(spread / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    alike = float(rest[1:] @ rest[:-1]) / spread if spread else 0.0
    alike = min(max(alike, 0.0), 0.98)
    return {
        "slope": float(slope),
        "standard_error": float(error * np.sqrt((1 + alike) / (1 - alike))),
        "last_mib": float(y[-1]),
    }


def judge_memory(slope: float, error: float, tolerance: float) -> str:
    """Whether memory grows by more than the tolerance, at two standard errors."""
    if slope - 2 * error > tolerance:
        return "grows"
    return "flat" if slope + 2 * error <= tolerance else "unclear"


def stuck(url: str) -> dict[str, int]:
    """Requests that replicas hold, by model, where there are any."""
    replicas = httpx.get(f"{url}/readyz", timeout=30, trust_env=False).json()["replicas"]
    held = {model: sum(one["requests"] for one in found) for model, found in replicas.items()}
    return {model: count for model, count in held.items() if count}


def faults(
    leaving: Report, after: Report, busy: dict[str, float], held: dict[str, int]
) -> list[str]:
    """What must not be, in words; empty if all is well."""
    outcomes = leaving.total.outcomes
    found = [
        f"{count} requests: {outcome} ({leaving.total.refusals})"
        for outcome, count in outcomes.items()
        if count and outcome not in ("ok", "disconnected")
    ]
    if after.succeeded < len(after.records):
        found.append(
            f"afterwards only {after.succeeded} of {len(after.records)} requests got a picture:"
            f" {after.total.outcomes}"
        )
    found += [
        f"{name} works on ({share:.0%} of a core) though nobody waits"
        for name, share in busy.items()
        if share > _IDLE_SHARE
    ]
    found += [f"{model} holds {n} requests though nobody waits" for model, n in held.items()]
    return found


def slow_after(idle: Report, left: Report, following: Report) -> list[str]:
    """What leavers must not leave behind, in words: work that the next request waits for."""
    found: list[str] = []
    gone = left.total.outcomes["disconnected"]
    if gone < 0.9 * len(left.records):
        found.append(
            f"only {gone} of {len(left.records)} clients left, so that nothing is shown:"
            f" {left.total.outcomes} ({left.total.refusals})"
        )
    usual, next_ = idle.total.latency_s, following.total.latency_s
    if usual is None or next_ is None:
        found.append(
            f"the request before or after the leavers got no picture: {idle.total.outcomes},"
            f" {following.total.outcomes}"
        )
    elif next_.max > SLOWER * usual.p50:
        found.append(
            f"the request after {gone} leavers took {next_.max:.2f} s, above {SLOWER} times the"
            f" {usual.p50:.2f} s it takes on the idle server"
        )
    return found


def soak(
    requests: int, clients: int, seed: int, tolerance: float, wanted_warm_up: int
) -> dict[str, Any]:
    """Everything, as one document."""
    # A short run has a shorter warm-up, to have something to fit a line to; it judges no memory,
    # which still grows then.
    warm_up = min(wanted_warm_up, requests // 2)
    with running(ours()) as url:
        idle = _whole(run(default_requests(5, warm_up=2), url))
        memory = Memory(requests)
        leaving = _whole(run(plan(requests, seed=seed, clients=clients), url, progress=memory))
        left = _whole(run(leavers(clients), url))
        following = _whole(run(default_requests(1), url))
        busy = memory.busy_share(_SILENCE_S)
        held = stuck(url)
        after = _whole(run(plan(AFTERWARDS, leaving=0, seed=seed + 1, clients=clients), url))
    warm = sum(done <= warm_up for done in memory.requests)
    fits = {name: fit(memory.requests[warm:], mib[warm:]) for name, mib in memory.mib.items()}
    for found in fits.values():
        judged = judge_memory(found["slope"], found["standard_error"], tolerance)
        found["verdict"] = judged if warm_up >= WARM_UP else "not judged"
    return {
        "requests": requests,
        "warm_up": warm_up,
        "clients": clients,
        "seed": seed,
        "machine": leaving.machine.model_dump(),
        "wall_s": leaving.wall_s,
        "outcomes": leaving.total.outcomes,
        "distinct_sizes": len({(record.task, record.size) for record in leaving.records}),
        "tasks": {name: task.outcomes for name, task in leaving.tasks.items()},
        "latency_s": leaving.total.latency_s and leaving.total.latency_s.model_dump(),
        "leavers": left.total.outcomes,
        "idle_s": idle.total.latency_s and idle.total.latency_s.p50,
        "after_leavers_s": following.total.latency_s and following.total.latency_s.max,
        "afterwards": after.total.model_dump(),
        "busy_share_afterwards": busy,
        "tolerance_mib_per_1000": tolerance,
        "memory": fits,
        "faults": [*faults(leaving, after, busy, held), *slow_after(idle, left, following)],
        "samples": {"requests": memory.requests, "mib": memory.mib},
    }


def _whole(report: Report) -> Report:
    if report.interrupted:
        raise KeyboardInterrupt
    return report


def show(document: dict[str, Any]) -> None:
    table = Table(title=f"Resident memory, after {document['warm_up']} requests of warm-up")
    table.add_column("process", no_wrap=True)
    for name in ("MiB per 1,000 requests", "standard error", "MiB at the end", "verdict"):
        table.add_column(name, justify="right")
    for name, found in document["memory"].items():
        cells = [f"{found[key]:.2f}" for key in ("slope", "standard_error")]
        table.add_row(name, *cells, f"{found['last_mib']:.0f}", found["verdict"])
    console.print(table)
    outcomes = {name: count for name, count in document["outcomes"].items() if count}
    console.print(
        f"{document['requests']} requests of {document['distinct_sizes']} sizes in"
        f" {document['wall_s']:.0f} s: {outcomes}"
    )
    idle_s, after_s = (document[key] or float("nan") for key in ("idle_s", "after_leavers_s"))
    console.print(
        f"The request after {document['leavers']['disconnected']} leavers took {after_s:.2f} s,"
        f" {idle_s:.2f} s on the idle server."
    )
    got = document["afterwards"]["outcomes"]["ok"]
    slowest = (document["afterwards"]["latency_s"] or {}).get("max", float("nan"))
    console.print(
        f"Afterwards {got} of {AFTERWARDS} got a picture, the slowest in {slowest:.1f} s."
    )
    for fault in document["faults"]:
        console.print(fault, style="red", markup=False)


def verdict(document: dict[str, Any]) -> str:
    """passed, failed, or unclear where memory is too uneven to tell."""
    found = {fitted["verdict"] for fitted in document["memory"].values()}
    if document["faults"] or "grows" in found:
        return "failed"
    return "unclear" if "unclear" in found else "passed"


def main(
    requests: Annotated[int, typer.Option(help="all, warm-up included", min=40)] = 20_000,
    clients: Annotated[int, typer.Option(help="at a time")] = 8,
    seed: Annotated[int, typer.Option(help="of the requests")] = 0,
    tolerance: Annotated[float, typer.Option(help="growth, MiB per 1,000 requests")] = 0.5,
    warm_up: Annotated[int, typer.Option(help="requests before memory is judged")] = WARM_UP,
    output: Annotated[Path | None, typer.Option(help="JSON; else benchmarks/results")] = None,
) -> None:
    """Run, print a verdict, and write everything down; exit code 1 if it failed."""
    # So that the server is stopped, as it is at Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    today = datetime.now(UTC).date().isoformat()
    document = {"date": today, **soak(requests, clients, seed, tolerance, warm_up)}
    document["verdict"] = verdict(document)
    show(document)
    file = output or RESULTS / f"soak-{today}.json"
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console.print(
        f"{document['verdict']}: at most {tolerance:g} MiB per 1,000 requests;"
        f" load {os.getloadavg()[0]:.1f}; wrote {file}"
    )
    raise typer.Exit(int(document["verdict"] == "failed"))


if __name__ == "__main__":
    typer.run(main)
