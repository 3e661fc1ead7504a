"""`make bench-peers`: the same load on Imagen and on other servers with the same models.

One system runs at a time. Imagen runs first and last, which shows a drift of the machine.
"""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import psutil
import typer
import yaml
from rich.table import Table

from benchmarks import machine
from benchmarks.output import console, write_result
from benchmarks.peers.systems import BENTOML_BIN, OURS, SYSTEMS, TRITON_BIN
from benchmarks.server import OUR_BIN, PEERS_BIN, NotStarted, running
from deployments.settings import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    output: Annotated[Path | None, typer.Option(help="JSON; else benchmarks/results")] = None,
) -> None:
    """Compare, print a table, and write everything down."""
    changes = dict(_QUICK) if quick else {}
    if requests is not None:
        changes |= {"requests": requests}
    if rate is not None:
        changes |= {"rate_per_s": rate}
    order = _order(systems)
    # SIGTERM stops a server that runs, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    runs = [run for letter in order for run in _measure(letter, loads.split(","), changes, quick)]
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "versions": {"imagen": machine.versions(PACKAGES), "peers": _peer_versions()},
        "changes": changes,
        "runs": runs,
    }
    _show(runs)
    write_result("peers", document, output)
    raise typer.Exit(int(any("failed" in run for run in runs)))


def _show(runs: list[Run]) -> None:
    console.print(_table(runs))
    for load in dict.fromkeys(run["load"] for run in runs if "load" in run):
        if len(ours := _throughputs(OURS, load, runs)) == 2:
            console.print(f"{load}: our last run made {ours[1] / ours[0]:.2f} of our first.")


def _order(letters: str) -> list[str]:
    """The chosen letters, with ours first and last."""
    chosen = letters.split(",")
    if unknown := set(chosen) - set(SYSTEMS):
        raise typer.BadParameter(f"no such system: {', '.join(sorted(unknown))}")
    peers = [letter for letter in chosen if letter != OURS]
    if OURS not in chosen:
        return peers
    return [OURS, *peers, OURS] if peers else [OURS]


def _measure(letter: str, loads: list[str], changes: dict[str, Any], quick: bool) -> list[Run]:
    """Start one system, and run every load on it."""
    system = SYSTEMS[letter]
    console.rule(f"{letter}  {system.title}")
    busy = psutil.cpu_percent(3)
    if busy > _BUSY_PERCENT:
        console.print(f"[yellow]Other programs use {busy:.0f} % of the cores; expect noise.")
    runs: list[Run] = []
    try:
        with running(system) as server:
            _warm_up(system, server.url, 1 if quick else system.warm_up_rounds)
            for load in loads:
                report = _bench(system, server.url, load, changes)
                console.print(f"{load}: {report['images_per_s']:.3f} images/s")
                runs.append(_run(letter, load=load, others_cpu_percent=busy, report=report))
    except (NotStarted, subprocess.CalledProcessError) as error:
        console.print(f"{system.title} failed: {error}", style="red", markup=False)
        runs.append(_run(letter, failed=str(error)))
    return runs


def _changed(plan: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The plan with the changes that apply: closed plans have no rate, others no slowdown."""
    needs = {"rate_per_s": "rate_per_s", "slowdown_requests": "slowdown"}
    return plan | {k: v for k, v in changes.items() if k not in needs or needs[k] in plan}


def _run(letter: str, **found: Any) -> Run:
    return {"system": letter, "title": SYSTEMS[letter].title, **found}


def _warm_up(system: System, url: str, rounds: int) -> None:
    """Send requests to every model in turn, then two at a time."""
    tasks = 5
    _bench(system, url, "smoke", {"warm_up": tasks * rounds, "requests": 2 * tasks})


def _bench(system: System, url: str, load: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The report of `imagen bench`, without the single requests.

    Raises:
        CalledProcessError: the run failed, or no request got a picture.
    """
    plan = yaml.safe_load((PLANS / f"{load}.yaml").read_text(encoding="utf-8"))
    target = {"target": {**plan.get("target", {}), **system.target}}
    plan = _changed(plan, changes) | target
    with tempfile.TemporaryDirectory() as folder:
        file, report = Path(folder) / "plan.yaml", Path(folder) / "report.json"
        file.write_text(yaml.safe_dump(plan), encoding="utf-8")
        command = [str(OUR_BIN / "imagen"), "bench", str(file), "--url", url]
        options = ["--json", str(report)]
        subprocess.run([*command, *options], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found = json.loads(report.read_text(encoding="utf-8"))
    return {key: value for key, value in found.items() if key not in ("records", "unloaded_s")}


def _table(runs: list[Run]) -> Table:
    table = Table(title="The same models and requests; throughput and p50 also relative to ours")
    for name in ("system", "load"):
        table.add_column(name, no_wrap=True)
    percentiles = ("p50 s", "p95 s", "p99 s", "slowdown p50", "p95")
    for name in ("images/s", "x ours", *percentiles, "p50 x ours", "errors"):
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(*_cells(run, runs))
    return table


def _cells(run: Run, runs: list[Run]) -> list[str]:
    if "failed" in run:
        return [run["title"], "did not run"]
    report = run["report"]
    ours = [r["report"] for r in runs if r["system"] == OURS and r.get("load") == run["load"]]
    return [
        run["title"],
        run["load"],
        f"{report['images_per_s']:.3f}",
        _ratio(report["images_per_s"], [r["images_per_s"] for r in ours]),
        *(_percentile(report, "latency_s", name) for name in ("p50", "p95", "p99")),
        *(_percentile(report, "slowdown", name) for name in ("p50", "p95")),
        _ratio(_of(report, "latency_s", "p50"), [_of(r, "latency_s", "p50") for r in ours]),
        str(sum(n for outcome, n in report["total"]["outcomes"].items() if outcome != "ok")),
    ]


def _throughputs(letter: str, load: str, runs: list[Run]) -> list[float]:
    """Pictures per second of each run of a load on a system, in order."""
    found = [run for run in runs if (run["system"], run.get("load")) == (letter, load)]
    return [run["report"]["images_per_s"] for run in found]


def _of(report: dict[str, Any], quantity: str, name: str) -> float | None:
    spread = report["total"][quantity]
    return spread[name] if spread else None


def _percentile(report: dict[str, Any], quantity: str, name: str) -> str:
    value = _of(report, quantity, name)
    return "-" if value is None else f"{value:.2f}"


def _ratio(value: float | None, ours: Sequence[float | None]) -> str:
    """The value over the mean of our runs."""
    known = [one for one in ours if one]
    return f"{value * len(known) / sum(known):.2f}" if value and known else "-"


def _peer_versions() -> dict[str, str]:
    return (
        machine.versions(PEERS, PEERS_BIN / "python")
        | machine.versions(("bentoml",), BENTOML_BIN / "python")
        | machine.versions(("nvidia-pytriton",), TRITON_BIN / "python")
    )


if __name__ == "__main__":
    typer.run(main)
