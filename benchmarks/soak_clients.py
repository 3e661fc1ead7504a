"""`make soak-clients`: 20,000 requests of which 30 % leave early, and what they leave behind.

Memory: the resident size of the proxy, the Ingress and the model replicas is sampled under load,
and a line is fitted to it after the warm-up. Work: 200 clients then ask for long work and leave;
the next request may take twice its time on the idle server. At the end no replica may hold a
request or use the CPU, and 100 further requests must all get their picture.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, Final

import httpx
import numpy as np
import psutil
import typer

from benchmarks import machine
from benchmarks.load import parse_plan, run_whole
from benchmarks.output import console, make_table, write_result
from benchmarks.server import cpu_s, imagen, process_title, running
from deployments.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.load import Plan, Report

MIB: Final = 2**20
WARM_UP: Final = 10_000
JUDGED_REQUESTS: Final = 1000
"""A process is judged on its memory if it had at least so many requests after the warm-up."""
AFTERWARDS: Final = 100
LEAVERS: Final = 200
CLIENTS: Final = 8
"""At a time; more leavers are refused, because the server cannot finish all their steps in time."""
MOST_LEAVERS: Final = 4 * LEAVERS
"""Requests of leaving clients that are sent at most."""
SLOWER: Final = 2
"""How many times its idle time the request after the leavers may take."""
_SAMPLES: Final = 400
_SILENCE_S: Final = 5
_IDLE_SHARE: Final = 0.2
_ASLEEP: Final = (Task.COMIC.deployment, Task.AGED.deployment)
_ACTORS: Final = ("ProxyActor", "ServeReplica:imagen:")
_TASKS: Final = {task.deployment: str(task) for task in Task}
_SIZES: Final[dict[str, list[dict[str, Any]]]] = {
    "background": [{"size": [8, 8], "up_to": [512, 512]}],
    "upscale": [
        {"size": [8, 8], "up_to": [96, 96], "weight": 9},
        {"size": [97, 97], "up_to": [300, 300]},
    ],
    "enhance": [{"size": [32, 32], "up_to": [160, 160]}],
}
# By cost: upscaling then takes a quarter of the time. A request to enhance takes a second.
_WEIGHTS: Final = {"background": 40, "upscale": 60, "enhance": 0.2}


def plan(
    requests: int, *, leaving: float = 0.3, seed: int = 0, tasks: Sequence[str] = tuple(_SIZES)
) -> Plan:
    """A closed load of pictures of 8 to 512 px; a share of its clients leaves within 100 ms.

    Nearly every request to background has a size of its own; so have most of the first thousands to
    upscale, and nearly all its large ones.
    """
    mix = [{"task": task, "weight": _WEIGHTS[task], "sizes": _SIZES[task]} for task in tasks]
    early = {"disconnect_share": leaving, "disconnect_after_s": (0, 0.1)}
    return _plan(mix, requests=requests, seed=seed, **early)


def leavers(seed: int) -> Plan:
    """Clients who ask for a hundred steps, all at once, and leave when these have begun."""
    mix = [{"task": "enhance", "parameters": {"steps": 100}, "sizes": [[256, 256]]}]
    early = {"disconnect_share": 1, "disconnect_after_s": (0.1, 0.5)}
    return _plan(mix, requests=CLIENTS, seed=seed, **early)


def default_requests(count: int, warm_up: int = 0) -> Plan:
    """Requests to the same model, one by one, with its own defaults."""
    mix = [{"task": "enhance", "sizes": [[512, 512]]}]
    return _plan(mix, requests=count, warm_up=warm_up, concurrency=1)


def _plan(mix: list[dict[str, Any]], **values: Any) -> Plan:
    common = {"name": "soak", "mode": "closed", "concurrency": CLIENTS, "timeout_s": 60}
    return parse_plan({**common, "mix": mix, **values}, "The plan of the soak")


class Memory:
    """Samples the resident memory of the server's processes, by requests done.

    Attributes:
        requests: how many were done at each sample.
        mib: by process, the resident size at each sample.
    """

    def __init__(self, requests: int) -> None:
        self._every = max(requests // _SAMPLES, 1)
        self._processes = dict(_server_processes())
        self.requests: list[int] = []
        self.mib: dict[str, list[float]] = {name: [] for name in self._processes}

    def __call__(self, _phase: str, done: int) -> None:
        """Listens to the load's progress; raises NoSuchProcess if a process was replaced."""
        if done % self._every:
            return
        self.requests.append(done)
        for name, process in self._processes.items():
            self.mib[name].append(process.memory_info().rss / MIB)

    def busy_share(self, seconds: float) -> dict[str, float]:
        """The share of one core that each process uses during the next seconds."""
        before = {name: cpu_s(process) for name, process in self._processes.items()}
        time.sleep(seconds)
        after = {name: cpu_s(process) for name, process in self._processes.items()}
        return {name: (after[name] - before[name]) / seconds for name in before}


def _server_processes() -> Iterator[tuple[str, psutil.Process]]:
    """The proxy, the Ingress and the model replicas among our own descendants."""
    for process in psutil.Process().children(recursive=True):
        title = process_title(process)
        if title.startswith(_ACTORS):
            yield title.rpartition(":")[2], process


def fit(requests: Sequence[int], mib: Sequence[float]) -> dict[str, Any]:
    """A line through memory over requests: MiB per 1,000 requests, with its standard error.

    Neighbouring samples resemble each other and count as fewer: the error is widened by the lag-1
    correlation of the residuals.
    """
    x, y = np.array(requests) / 1000, np.array(mib)
    if len(x) < 8:
        return {"slope": float("nan"), "standard_error": float("nan"), "last_mib": float(y[-1])}
    design = np.stack([x, np.ones_like(x)], 1)
    (slope, start), *_ = np.linalg.lstsq(design, y)
    residuals = y - slope * x - start
    squares = float(residuals @ residuals)
    error = np.sqrt(squares / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    correlation = float(residuals[1:] @ residuals[:-1]) / squares if squares else 0.0
    correlation = min(max(correlation, 0.0), 0.98)
    return {
        "slope": float(slope),
        "standard_error": float(error * np.sqrt((1 + correlation) / (1 - correlation))),
        "last_mib": float(y[-1]),
    }


def judge_memory(slope: float, error: float, tolerance: float) -> str:
    """Whether memory grows by more than the tolerance, by more than two standard errors.

    All in MiB per 1,000 requests.
    """
    if slope - 2 * error > tolerance:
        return "grows"
    return "flat" if slope + 2 * error <= tolerance else "unclear"


def judge_processes(
    memory: Memory, load: Report, *, warm_up: int, tolerance: float
) -> dict[str, dict[str, Any]]:
    """The fitted line and the verdict of each process.

    A shorter warm-up than `WARM_UP` judges nothing: memory still grows then.
    """
    tasks = Counter(record.task for record in load.records[warm_up:])
    warm = sum(done <= warm_up for done in memory.requests)
    found: dict[str, dict[str, Any]] = {}
    for name, mib in memory.mib.items():
        # The proxy and the Ingress carry the requests of every task.
        requests = tasks[_TASKS[name]] if name in _TASKS else tasks.total()
        line = fit(memory.requests[warm:], mib[warm:])
        verdict = "not judged"
        if requests >= JUDGED_REQUESTS and warm_up >= WARM_UP:
            verdict = judge_memory(line["slope"], line["standard_error"], tolerance)
        found[name] = line | {"requests": requests, "verdict": verdict}
    return found


def send_leavers(send: Callable[[Plan], Report]) -> Counter[str]:
    """The outcomes of clients who leave long work, in rounds until `LEAVERS` of them have left.

    Clients who leave make room at once, so that the next round is admitted. Refused requests count
    towards `MOST_LEAVERS`, where it ends in any case.
    """
    outcomes = Counter[str]()
    for seed in range(MOST_LEAVERS // CLIENTS):
        outcomes.update(send(leavers(seed)).total.outcomes)
        if outcomes["disconnected"] >= LEAVERS:
            break
    return outcomes


def requests_held(url: str) -> dict[str, int]:
    """Requests that replicas hold, by model, where there are any."""
    replicas = httpx.get(f"{url}/readyz", timeout=30, trust_env=False).json()["replicas"]
    held = {model: sum(one["requests"] for one in found) for model, found in replicas.items()}
    return {model: count for model, count in held.items() if count}


def faults(load: Report, after: Report, busy: dict[str, float], held: dict[str, int]) -> list[str]:
    """A sentence for each thing that must not be after the load; empty if all is well."""
    outcomes = load.total.outcomes
    found = [
        f"{count} requests: {outcome} ({load.total.refusals})"
        for outcome, count in outcomes.items()
        if count and outcome not in ("ok", "disconnected")
    ]
    if after.succeeded < len(after.records):
        found.append(
            f"afterwards only {after.succeeded} of {len(after.records)} requests got a picture:"
            f" {after.total.outcomes}"
        )
    found += [
        f"{name} uses {share:.0%} of a core although no client waits"
        for name, share in busy.items()
        if share > _IDLE_SHARE
    ]
    found += [f"{model} holds {n} requests although no client waits" for model, n in held.items()]
    return found


def slow_after(idle: Report, left: Counter[str], following: Report) -> list[str]:
    """A sentence for each fault of the leavers: work they left that the next request waits for."""
    found: list[str] = []
    count = left["disconnected"]
    if count < LEAVERS:
        found.append(
            f"only {count} of {left.total()} clients left, and {LEAVERS} are needed: {dict(left)}"
        )
    usual, next_ = idle.total.latency_s, following.total.latency_s
    if usual is None or next_ is None:
        found.append(
            f"the request before or after the leavers got no picture: {idle.total.outcomes},"
            f" {following.total.outcomes}"
        )
    elif next_.max > SLOWER * usual.p50:
        found.append(
            f"the request after {count} leavers took {next_.max:.2f} s, above {SLOWER} times the"
            f" {usual.p50:.2f} s it takes on the idle server"
        )
    return found


def soak(requests: int, tolerance: float) -> dict[str, Any]:
    """Run every phase, and return what was measured.

    Args:
        requests: of the load, its warm-up included.
        tolerance: growth of memory that is accepted, in MiB per 1,000 requests.
    """
    # A short run has a shorter warm-up, to have samples to fit a line to.
    warm_up = min(WARM_UP, requests // 2)
    with running(imagen(asleep=_ASLEEP)) as server:
        url = server.url
        idle = run_whole(default_requests(5, warm_up=2), url)
        memory = Memory(requests)
        load = run_whole(plan(requests), url, memory)
        left = send_leavers(lambda round_: run_whole(round_, url))
        following = run_whole(default_requests(1), url)
        busy = memory.busy_share(_SILENCE_S)
        held = requests_held(url)
        after = run_whole(plan(AFTERWARDS, leaving=0, seed=1), url)
    return {
        "requests": requests,
        "warm_up": warm_up,
        "wall_s": load.wall_s,
        "outcomes": load.total.outcomes,
        "distinct_sizes": len({(record.task, record.size) for record in load.records}),
        "leavers": dict(left),
        "idle_s": idle.total.latency_s and idle.total.latency_s.p50,
        "after_leavers_s": following.total.latency_s and following.total.latency_s.max,
        "afterwards": after.total.model_dump(),
        "busy_share_afterwards": busy,
        "tolerance_mib_per_1000": tolerance,
        "memory": judge_processes(memory, load, warm_up=warm_up, tolerance=tolerance),
        "faults": [*faults(load, after, busy, held), *slow_after(idle, left, following)],
    }


def show(found: dict[str, Any]) -> None:
    """Print the verdicts and the faults."""
    figures = ("requests", "MiB per 1,000 requests", "standard error", "MiB at the end", "verdict")
    title = f"Resident memory, after {found['warm_up']} requests of warm-up"
    table = make_table(title, ("process",), figures)
    for name, line in found["memory"].items():
        cells = [f"{line[key]:.2f}" for key in ("slope", "standard_error")]
        table.add_row(
            name, str(line["requests"]), *cells, f"{line['last_mib']:.0f}", line["verdict"]
        )
    console.print(table)
    outcomes = {name: count for name, count in found["outcomes"].items() if count}
    idle_s, after_s = (found[key] or float("nan") for key in ("idle_s", "after_leavers_s"))
    console.print(
        f"{found['requests']} requests of {found['distinct_sizes']} sizes in {found['wall_s']:.0f}"
        f" s: {outcomes}\nThe request after {found['leavers'].get('disconnected', 0)} leavers took"
        f" {after_s:.2f} s, {idle_s:.2f} s on the idle server."
    )
    for fault in found["faults"]:
        console.print(fault, style="red", markup=False)


def judge(found: dict[str, Any]) -> str:
    """`passed`, `failed`, or `unclear` where memory is too uneven to tell."""
    verdicts = {process["verdict"] for process in found["memory"].values()}
    if found["faults"] or "grows" in verdicts:
        return "failed"
    return "unclear" if "unclear" in verdicts else "passed"


def main(
    requests: Annotated[int, typer.Option(help="Warm-up included", min=40)] = 20_000,
    tolerance: Annotated[float, typer.Option(help="Growth in MiB per 1,000 requests")] = 0.5,
) -> None:
    """Run, print a verdict, and write everything down; exit code 1 if it failed."""
    found = soak(requests, tolerance)
    verdict = judge(found)
    show(found)
    write_result("soak", machine.versions(["ray"]), **found, verdict=verdict)
    console.print(f"{verdict}: at most {tolerance:g} MiB per 1,000 requests")
    raise typer.Exit(int(verdict == "failed"))


if __name__ == "__main__":
    typer.run(main)
