"""`make bench-peers`: the same load on Imagen and on other servers with the same models.

One system runs at a time. Imagen runs first and last, which shows a drift of the machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import psutil
import typer

from benchmarks import machine
from benchmarks.load import Plan, Unreachable, load_plan, run_whole
from benchmarks.output import console, make_table, write_result
from benchmarks.peers.systems import BENTOML_BIN, OURS, SYSTEMS, TRITON_BIN
from benchmarks.server import PEERS_BIN, NotStarted, running
from deployments.settings import ROOT
from deployments.tasks import Task

if TYPE_CHECKING:
    from benchmarks.server import System

Run = dict[str, Any]
"""A system's letter and title with the name and report of one load on it, or why it `failed`."""

PLANS: Final = ROOT / "benchmarks/plans"
PACKAGES: Final = ("torch", "diffusers", "transformers", "numpy", "pillow", "ray")
PEERS: Final = (*PACKAGES, "litserve", "starlette", "uvicorn", "fastapi")
_QUICK: Final = {"requests": 8, "slowdown_requests": 4, "warm_up": 1}
_BUSY_PERCENT: Final = 10


def main(
    systems: Annotated[str, typer.Option(help="Letters; g is Imagen")] = ",".join(SYSTEMS),
    loads: Annotated[str, typer.Option(help="Names in benchmarks/plans")] = "uniform,varied,mixed",
    requests: Annotated[int | None, typer.Option(help="Of each load; default: the plan's")] = None,
    rate: Annotated[float | None, typer.Option(help="Per second; default: the plan's")] = None,
    quick: Annotated[bool, typer.Option(help="A few requests, to see that it works")] = False,
) -> None:
    """Compare, print a table, and write everything down; exit code 1 if a system failed."""
    given = {"requests": requests, "rate_per_s": rate}
    changes = (_QUICK if quick else {}) | {k: v for k, v in given.items() if v is not None}
    plans = {
        name: _changed(load_plan(PLANS / f"{name}.yaml"), changes) for name in loads.split(",")
    }
    runs: list[Run] = []
    for letter in _order(systems):
        runs += _measure(letter, plans, warm_up_rounds=1 if quick else None)
    _show(runs)
    versions = {"imagen": machine.versions(PACKAGES), "peers": _peer_versions()}
    write_result("peers", versions, changes=changes, runs=runs)
    raise typer.Exit(int(any("failed" in run for run in runs)))


def _order(letters: str) -> list[str]:
    """The chosen letters, with ours first and last."""
    chosen = letters.split(",")
    if unknown := set(chosen) - set(SYSTEMS):
        raise typer.BadParameter(f"no such system: {', '.join(sorted(unknown))}")
    peers = [letter for letter in chosen if letter != OURS]
    if OURS not in chosen:
        return peers
    return [OURS, *peers, OURS] if peers else [OURS]


def _plan(name: str) -> Plan:
    return load_plan(PLANS / f"{name}.yaml")


def _changed(plan: Plan, changes: dict[str, Any]) -> Plan:
    """The plan with the changes that apply: closed plans have no rate, others no slowdown."""
    needs = {"rate_per_s": plan.rate_per_s, "slowdown_requests": plan.slowdown}
    return plan.change(**{key: value for key, value in changes.items() if needs.get(key, True)})


def _measure(letter: str, plans: dict[str, Plan], warm_up_rounds: int | None) -> list[Run]:
    """Start one system, and run every load on it."""
    system = SYSTEMS[letter]
    console.rule(f"{letter}  {system.title}")
    facts = {"system": letter, "title": system.title}
    busy = psutil.cpu_percent(3)
    if busy > _BUSY_PERCENT:
        console.print(f"[yellow]Other programs use {busy:.0f} % of the cores; expect noise.")
    runs: list[Run] = []
    try:
        with running(system) as server:
            _warm_up(system, server.url, warm_up_rounds or system.warm_up_rounds)
            for name, plan in plans.items():
                report = run_whole(plan.change(target=system.target), server.url)
                if not report.succeeded:
                    raise NotStarted(f"No request of {name} got a picture.")
                console.print(f"{name}: {report.images_per_s:.3f} images/s")
                summary = report.model_dump(mode="json", exclude={"records", "unloaded_s"})
                runs.append({**facts, "load": name, "others_cpu_percent": busy, "report": summary})
    except (NotStarted, Unreachable) as error:
        console.print(f"{system.title} failed: {error}", style="red", markup=False)
        runs.append({**facts, "failed": str(error)})
    return runs


def _warm_up(system: System, url: str, rounds: int) -> None:
    """Send requests to every model in turn, then two at a time."""
    plan = _plan("smoke").change(target=system.target)
    run_whole(plan.change(warm_up=len(Task) * rounds, requests=2 * len(Task)), url)


def _show(runs: list[Run]) -> None:
    figures = ("images/s", "p50 s", "p95 s", "p99 s", "slowdown p50", "p95", "errors")
    table = make_table("The same models and requests", ("system", "load"), figures)
    for run in runs:
        if "failed" in run:
            table.add_row(run["title"], "did not run")
            continue
        total = run["report"]["total"]
        table.add_row(
            run["title"],
            run["load"],
            f"{run['report']['images_per_s']:.3f}",
            *(_percentile(total["latency_s"], name) for name in ("p50", "p95", "p99")),
            *(_percentile(total["slowdown"], name) for name in ("p50", "p95")),
            str(sum(n for outcome, n in total["outcomes"].items() if outcome != "ok")),
        )
    console.print(table)


def _percentile(spread: dict[str, float] | None, name: str) -> str:
    return f"{spread[name]:.2f}" if spread else "-"


def _peer_versions() -> dict[str, str]:
    return (
        machine.versions(PEERS, PEERS_BIN / "python")
        | machine.versions(("bentoml",), BENTOML_BIN / "python")
        | machine.versions(("nvidia-pytriton",), TRITON_BIN / "python")
    )


if __name__ == "__main__":
    typer.run(main)
