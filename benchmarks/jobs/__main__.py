"""Measures the queue alone, jobs over HTTP and 10,000 finished jobs, each beside its baseline.

Ways that are compared take turns in short blocks, so that a drift of the machine affects all of
them alike. Writes benchmarks/results/jobs-<date>.json.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from benchmarks import machine
from benchmarks.jobs import bare, kept, through_serve
from benchmarks.jobs.clients import LARGE_PX, picture
from benchmarks.jobs.systems import CELERY_BIN
from benchmarks.output import console, make_table, write_result
from serve_app.jobs.redis_process import find_program

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES: Final = ("ray", "redis", "fastapi", "uvicorn", "aiohttp", "obstore")
PARTS: Final = ("bare", "serve", "kept")
COUNTS: Final = (100, 1000, 10_000)


def show_bare(found: dict[str, Any]) -> None:
    """Print jobs a second without HTTP."""
    table = make_table("Without HTTP", ("what",), ("jobs/s", "of runs", "CPU ms", "CPU ms, other"))
    for title, kind in found.items():
        median, runs = kind["median"], [run["per_s"] for run in kind["runs"]]
        table.add_row(
            title,
            f"{median['per_s']:.0f}",
            f"{min(runs):.0f}-{max(runs):.0f}",
            f"{median['submitter_cpu_ms']:.2f}",
            f"{median['other_cpu_ms']:.2f}",
        )
    console.print(table)


def show_serve(found: dict[str, Any]) -> None:
    """Print the rates and overheads through Serve's proxy."""
    figures = ("requests/s", "of rounds", "of baseline", "of rounds", "p50 ms", "CPU ms")
    table = make_table("Uploads of 100 KB through the proxy", ("clients", "way"), figures)
    for clients, ways in found["rate"].items():
        for name, way in ways.items():
            table.add_row(
                clients,
                name,
                f"{way['median_per_s']:.0f}",
                _spread(way["per_s"], 0),
                f"{way['median_of_baseline']:.2f}",
                _spread(way["of_baseline"], 2),
                f"{way['p50_ms']:.0f}",
                f"{sum(way['cpu_ms'].values()):.1f}",
            )
    console.print(table)
    figures = ("p50 ms", "p95 ms", "more than sync, p50 ms", "p95 ms")
    table = make_table("One client, background removal of 256x256", ("way",), figures)
    for name in ("sync", "job", "celery"):
        if row := found["overhead"].get(name):
            keys = ("p50_ms", "p95_ms", "more_p50_ms", "more_p95_ms")
            table.add_row(name, *(f"{row[key]:.1f}" if key in row else "-" for key in keys))
    console.print(table)


def show_kept(found: dict[str, Any]) -> None:
    """Print what finished jobs cost."""
    figures = ("Redis MiB", "Ingress MiB", "worker MiB", "first page ms", "middle", "last")
    table = make_table("Finished jobs", ("jobs",), figures)
    for row in ({"jobs": 0, **found["empty"]}, *found["rows"]):
        pages = (f"{row[k]:.1f}" if k in row else "-" for k in ("first_ms", "middle_ms", "last_ms"))
        memory = row["redis_bytes"] / 2**20, row["ingress_mib"], row["worker_mib"]
        table.add_row(str(row["jobs"]), *(f"{mib:.1f}" for mib in memory), *pages)
    console.print(table)
    gone = found["forgotten"]
    console.print(
        f"{found['redis_bytes_per_job']:.0f} bytes of Redis a job. Forgotten in"
        f" {gone['seconds']:.1f} s; left: {len(gone['keys_left'])} keys"
        f" ({', '.join(sorted(gone['keys_left'])[:9])}), {gone['files_left']} files,"
        f" {gone['redis_bytes'] / 2**20:.1f} MiB."
    )


def _spread(numbers: Sequence[float], digits: int) -> str:
    return f"{min(numbers):.{digits}f}-{max(numbers):.{digits}f}"


def _redis_version() -> str:
    said = subprocess.run([find_program(), "--version"], capture_output=True, text=True, check=True)
    return said.stdout.strip()


def main(
    parts: Annotated[str, typer.Option(help="What to measure, by comma")] = ",".join(PARTS),
    rounds: Annotated[int, typer.Option(help="Blocks of each way, and runs without HTTP")] = 10,
    calls: Annotated[int, typer.Option(help="Of each way, for the overhead")] = 150,
) -> None:
    """Measure, print the tables, and write everything down."""
    if unknown := set(parts.split(",")) - set(PARTS):
        raise typer.BadParameter(f"no such part: {', '.join(sorted(unknown))}")
    found: dict[str, Any] = {}
    for part in parts.split(","):
        before = machine.load_average()
        if part == "bare":
            found[part] = bare.run(rounds)
            show_bare(found[part])
        elif part == "serve":
            found[part] = through_serve.run(rounds, calls)
            show_serve(found[part])
        else:
            found[part] = kept.run(COUNTS)
            show_kept(found[part])
        found[f"load_of_{part}"] = [before, machine.load_average()]
    versions: dict[str, Any] = machine.versions(PACKAGES) | {"redis-server": _redis_version()}
    versions |= machine.versions(["celery", "kombu"], CELERY_BIN / "python")
    write_result("jobs", versions, picture_bytes=len(picture(LARGE_PX)), **found)


if __name__ == "__main__":
    typer.run(main)
