"""Real replicas beside simulated ones: the same arrivals, at 1 to 4 replicas on this machine."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import psutil
import yaml

from benchmarks import machine
from benchmarks.growth.profiles import Service, Work, fixed, refiner_on_h100
from benchmarks.growth.simulation import Result, simulate
from benchmarks.load import parse_plan, run_whole
from benchmarks.server import (
    LOCAL_CONFIG,
    OUR_BIN,
    System,
    cpu_s,
    process_title,
    ray_environment,
    running,
    serve_run,
)
from deployments.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.load import Plan, Report

TASK: Final = Task.ENHANCE
LOADS: Final = (0.5, 0.8)
"""Requests a second, over what the replicas can do."""
BURST: Final = 20
"""Requests at once, for each replica: what they can do."""
_BURSTS: Final = 4
"""How evenly a burst is shared is by chance, in reality too."""
_IDLE: Final = 15
_SEEDS: Final = 20
_QUIET_S: Final = 15
_ASLEEP: Final = {"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1}
_PROCESSES: Final = {
    "ProxyActor": "proxy",
    "ServeReplica:imagen:Ingress": "ingress",
    "ServeReplica:imagen:Enhance": "replicas",
    "ServeController": "controller",
}
Values = dict[str, Any]


def system(replicas: int, known_s: float) -> System:
    """The real application with so many replicas of one model, which sleep.

    Args:
        replicas: of the model.
        known_s: see `Service`.
    """

    def command(port: int, folder: Path) -> list[str]:
        made = yaml.safe_load(LOCAL_CONFIG.read_text(encoding="utf-8"))["applications"][0]
        made["import_path"] = "benchmarks.growth.sleeping_app:build"
        made["args"] |= {"jobs": {"enabled": False}, "torch_threads": 1}
        for deployment in made["deployments"]:
            if deployment["name"] == TASK.deployment:
                count = {"min_replicas": replicas, "max_replicas": replicas}
                deployment |= {"autoscaling_config": count}
                deployment["user_config"] = {"max_batch_size": len(refiner_on_h100().pass_s)}
            elif deployment["name"] != "Ingress":
                deployment["autoscaling_config"] = _ASLEEP
        return serve_run(OUR_BIN / "serve", [made], port, folder)

    own = {"MALLOC_ARENA_MAX": "1", "RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S": str(known_s)}
    return System(
        f"{replicas} replicas",
        command,
        environment=lambda folder: ray_environment(folder) | own,
    )


def _plan(**values: Any) -> Plan:
    mix = [
        {
            "task": str(TASK),
            "sizes": [[512, 512]],
            "parameters": {
                **{"steps": 30, "strength": 0.3, "guidance_scale": 5},
                **{"output_format": "jpeg", "detail": "working"},
            },
        }
    ]
    common: Values = {"name": "growth", "timeout_s": 90, "mix": mix}
    return parse_plan({**common, **values}, "The plan of the check")


@dataclass(frozen=True, slots=True)
class Measured:
    """A load that the real replicas had.

    Attributes:
        due_s: when requests were sent, from the start.
        ok: pictures.
        p50_s, p95_s: of their latency.
        images_per_s: from the first request to the last picture.
        cpu_s: of each kind of process.
        load: the machine's load average at the end.
    """

    name: str
    replicas: int
    due_s: list[float]
    ok: int
    p50_s: float
    p95_s: float
    images_per_s: float
    cpu_s: dict[str, float]
    wall_s: float
    load: float
    stages_s: dict[str, float]


def measure(
    replicas: int, seconds: float, work: Work, known_s: float
) -> tuple[dict[str, float], list[Measured]]:
    """Start so many replicas, watch them without requests, and send them the loads in turn.

    Returns:
        The share of a core that each kind of process takes without requests; and the loads.
    """
    with running(system(replicas, known_s)) as server:
        _wait_for(server.url, replicas)

        def send(name: str, plan: Plan) -> Measured:
            before = _cpu_s(server.process)
            report = run_whole(plan, server.url)
            after = _cpu_s(server.process)
            return _measured(name, replicas, report, {k: after[k] - before[k] for k in after})

        before = _cpu_s(server.process)
        time.sleep(_QUIET_S)
        quiet = {k: (v - before[k]) / _QUIET_S for k, v in _cpu_s(server.process).items()}
        idle = _plan(mode="closed", concurrency=1, requests=_IDLE, warm_up=3 * replicas)
        found = [send("idle", idle)]
        rate = replicas * work.capacity_per_s
        for load in LOADS:
            plan = _plan(mode="open", rate_per_s=load * rate, duration_s=seconds, seed=replicas)
            found.append(send(f"{load:.0%}", plan))
        count = BURST * replicas
        burst = _plan(mode="closed", concurrency=count, requests=count)
        found += [send("burst", burst) for _ in range(_BURSTS)]
        return quiet, found


def _measured(name: str, replicas: int, report: Report, cpu: dict[str, float]) -> Measured:
    latency_s = [r.latency_s for r in report.records if r.outcome == "ok"]
    twentieths = statistics.quantiles(latency_s, n=20, method="inclusive")
    return Measured(
        name=name,
        replicas=replicas,
        due_s=[record.due_s for record in report.records],
        ok=len(latency_s),
        p50_s=statistics.median(latency_s),
        p95_s=twentieths[-1],
        images_per_s=len(latency_s) / report.wall_s,
        cpu_s=cpu,
        wall_s=report.wall_s,
        load=machine.load_average(),
        stages_s=report.stages_s,
    )


def _wait_for(url: str, replicas: int) -> None:
    """`/readyz` is content with one replica."""
    import httpx

    end_s = time.monotonic() + 180
    while time.monotonic() < end_s:
        answer = httpx.get(f"{url}/readyz", timeout=30, trust_env=False).json()
        if len(answer["replicas"][str(TASK)]) >= replicas:
            return
        time.sleep(1)
    raise TimeoutError(f"{replicas} replicas did not start.")


def _cpu_s(process: psutil.Process) -> dict[str, float]:
    found = dict.fromkeys(_PROCESSES.values(), 0.0)
    for child in process.children(recursive=True):
        title = process_title(child)
        for start, name in _PROCESSES.items():
            if title.startswith(start):
                found[name] += cpu_s(child)
    return found


def calibrated(work: Work, idle: Measured, known_s: float) -> tuple[Work, Service]:
    """The work and the service with what one request on an idle replica took beside the GPU.

    Files, calls between processes and the front are taken from that run alone.
    """
    gpu_s = work.steps * work.pass_s[0] + work.begin_s + work.finish_s
    file_s = idle.stages_s["decode"] + idle.stages_s["encode"]
    front_s = max(idle.p50_s - gpu_s - file_s, 0.0)
    proxy_s, ingress_s = (idle.cpu_s[name] / idle.ok for name in ("proxy", "ingress"))
    service = Service(1, proxy_s, ingress_s, pixel_threads=2, known_s=known_s)
    return replace(work, file_s=file_s, front_s=front_s), service


def compare(work: Work, service: Service, reals: Sequence[Measured]) -> Values:
    """The same arrivals, simulated with several choices of replicas, and the difference.

    Args:
        work, service: as `calibrated`.
        reals: of one load, which was sent once or more often; their means are compared.
    """
    runs = [
        (simulate(work, service, fixed(real.replicas), real.due_s, seed=seed), min(real.due_s))
        for real in reals
        for seed in range(_SEEDS)
    ]
    simulated = {
        "p50_s": statistics.fmean(run.percentile_s(50) for run, _ in runs),
        "p95_s": statistics.fmean(run.percentile_s(95) for run, _ in runs),
        "images_per_s": statistics.fmean(_images_per_s(run, first_s) for run, first_s in runs),
        "ok": statistics.fmean(run.outcomes["ok"] for run, _ in runs),
    }
    measured = {key: statistics.fmean(getattr(real, key) for real in reals) for key in simulated}
    return {
        "replicas": reals[0].replicas,
        "load": reals[0].name,
        "requests": sum(len(real.due_s) for real in reals),
        "measured": measured,
        "simulated": simulated,
        "error": {key: simulated[key] / measured[key] - 1 for key in simulated},
        "load_average": statistics.fmean(real.load for real in reals),
    }


def _images_per_s(run: Result, first_s: float) -> float:
    return run.outcomes["ok"] / (run.last_s - first_s)
