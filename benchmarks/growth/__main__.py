"""`make bench-growth`: real replicas beside simulated ones, and Serve's controller by itself.
`make growth`: the scenarios.

The first takes a quarter of an hour and little of the CPU, the second some minutes of one core.
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import Annotated, Any, Final

import typer

from benchmarks import machine
from benchmarks.growth import tables
from benchmarks.growth.profiles import KNOWN_S, refiner_on_h100
from benchmarks.output import console, write_result
from deployments.settings import ROOT

MORNING_PER_S: Final = 30.0
SPOT_PER_S: Final = 60.0
SPOT_GPUS: Final = 48
MOST_PER_S: Final = 1000.0
"""About what 1,000 GPUs hold, the most that is simulated."""
GKE_PODS: Final = 4
"""The most ingress pods that configs/gke.yaml allows."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Growth from 1 to 1,000 GPUs."""


@app.command()
def check(
    least: Annotated[int, typer.Option(min=1, max=8, help="Replicas, from so many")] = 1,
    most: Annotated[int, typer.Option(min=1, max=8, help="to so many")] = 4,
    seconds: Annotated[float, typer.Option(min=5, help="Of each open load")] = 50,
    known: Annotated[
        float, typer.Option(min=0, help="Seconds that routers go by a queue; 0: ask each time")
    ] = KNOWN_S,
    name: Annotated[str, typer.Option(help="Of the result's file")] = "growth",
) -> None:
    """Hold the simulation against real replicas whose passes sleep, and write both down."""
    from benchmarks.growth.check import calibrated, compare, measure

    work = refiner_on_h100()
    rows: list[dict[str, Any]] = []
    quiet: dict[int, dict[str, float]] = {}
    found: list[dict[str, Any]] = []
    calibration: tuple[Any, Any] | None = None
    for replicas in range(least, most + 1):
        quiet[replicas], (idle, *loads) = measure(replicas, seconds, work, known)
        calibration = calibration or calibrated(work, idle, known)
        same = groupby(loads, lambda load: load.name)
        rows += [compare(*calibration, list(reals)) for _, reals in same]
        found += [asdict(load) for load in (idle, *loads)]
        console.print(f"{replicas} replicas done, load average {machine.load_average():.1f}")
    print(tables.comparison(rows))
    assert calibration is not None
    write_result(
        name,
        machine.versions(("ray", "fastapi", "uvicorn", "torch")),
        passes="SleepingPass: they sleep what an H100 took",
        work=asdict(calibration[0]),
        service=asdict(calibration[1]),
        quiet_cpu_share=quiet,
        comparison=rows,
        loads=found,
    )


@app.command()
def controller() -> None:
    """Measure what Serve's controller takes of a core for 1 to 24 replicas that do nothing."""
    from benchmarks.growth.controller import COUNTS, measure

    shares = {count: measure(count) for count in COUNTS}
    for count, share in shares.items():
        console.print(f"{count} replicas: {share:.1%} of a core")
    write_result("growth-controller", machine.versions(("ray",)), shares=shares)


@app.command()
def gpus(
    rate: Annotated[
        float, typer.Option(min=0.01, max=MOST_PER_S, help="Requests of the refiner a second")
    ],
    p95: Annotated[float, typer.Option(min=0.1, help="Seconds that 95 % of pictures may take")] = 2,
) -> None:
    """How many H100 hold a percentile with the SDXL refiner at 1024 px, and what that asks of what
    stands before them.
    """
    from benchmarks.growth import limits, scenarios

    measured, work = limits.front(), limits.work()
    try:
        found = scenarios.gpus_for(work, measured, rate, p95)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(
        f"{found.gpus} H100 for the SDXL refiner at 1024 px: p50 {found.p50_s:.2f} s,"
        f" p95 {found.p95_s:.2f} s, at {found.load:.0%} of what they can do;"
        f" {found.pods} ingress pods, each at most half busy."
    )
    if found.gpus > measured.controller_replicas:
        console.print("More replicas than one Serve controller should have: split the service.")


@app.command()
def scenarios() -> None:
    """Simulate the scenarios of docs/growth.md, write them down and draw the plot."""
    from benchmarks.growth import limits, scenarios

    measured, work = limits.front(), limits.work()
    rows = scenarios.growth(work, measured, KNOWN_S)
    asked = scenarios.growth(work, measured, 0.0)
    mornings = scenarios.mornings(work, measured, MORNING_PER_S)
    spots = scenarios.spots(work, measured, SPOT_PER_S, SPOT_GPUS)
    kept, kept_asked = ([asdict(row) for row in found] for found in (rows, asked))
    shown = tables.growth(kept, kept_asked), tables.mornings(mornings), tables.spots(spots)
    print(*shown, tables.limits(measured), sep="\n\n")
    scenarios.draw(rows, measured, GKE_PODS, ROOT / "docs/growth.svg")
    write_result(
        "growth-scenarios",
        machine.versions(("numpy", "matplotlib")),
        front=asdict(measured),
        growth=kept,
        growth_asked=kept_asked,
        mornings=mornings,
        spots=spots,
    )


if __name__ == "__main__":
    app()
