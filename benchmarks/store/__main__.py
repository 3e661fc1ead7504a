"""Compares ways to pull a model and to load it, and writes benchmarks/results/store-<date>.json.

Every run has a process of its own, and ways come in random order. The servers run on this machine
and share its cores: the figures compare the ways and say nothing about a network.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.table import Table

from benchmarks import machine
from benchmarks.output import console, today, write_result
from benchmarks.store.loads import LOADS, make_pipeline, publish_pipeline
from benchmarks.store.pulls import FROM_BUCKET, FROM_HUB, MB, THREADS, served
from deployments.store.disk import filesystem

if TYPE_CHECKING:
    from collections.abc import Sequence

    Run = dict[str, float]

PACKAGES: Final = ("google-cloud-storage", "huggingface_hub", "diffusers", "torch", "requests")
RATIOS: Final = (
    ("ours gs", "download_many threads", 1.0),
    ("ours gs", "download_many processes", 1.0),
    ("ours gs", "bare GET gs", 0.8),
    ("ours hf", "snapshot_download", 1.0),
    ("ours hf", "bare GET hf", 0.8),
)
"""Ours, another way, and how many times as fast ours should be."""
LOAD_TARGET: Final = 1.3
"""How many times as long as from_pretrained a verified load may take."""


def run_one(way: str, job: dict[str, Any], target: Path) -> Run:
    """One run in a fresh process, after everything written before is on the disk."""
    os.sync()
    environment = dict(os.environ)
    if way in LOADS:
        environment["HF_HUB_OFFLINE"] = "1"
    else:
        environment |= {"STORAGE_EMULATOR_HOST": job["gcs"], "HF_ENDPOINT": job["hub"]}
    command = [sys.executable, "-m", "benchmarks.store.worker", way, str(target)]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(job),
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            check=True,
        )
    finally:
        if target.exists():
            _make_writable(target)
            shutil.rmtree(target)
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    ways: Sequence[str], job: dict[str, Any], target: Path, runs: int
) -> dict[str, list[Run]]:
    """So many rounds over all ways, each in another order."""
    found: dict[str, list[Run]] = {way: [] for way in ways}
    for _ in range(runs):
        for way in random.sample(ways, len(ways)):
            found[way].append(run_one(way, job, target))
    return found


def medians(found: dict[str, list[Run]]) -> dict[str, Run]:
    """The median of each figure by way."""
    return {
        way: {key: statistics.median(run[key] for run in samples) for key in samples[0]}
        for way, samples in found.items()
    }


def bench_pulls(folder: Path, gigabytes: float, runs: int) -> dict[str, Any]:
    """Pull random files in every way."""
    with served(folder, gigabytes) as job:
        size_bytes = sum(size for size, _ in job["files"].values())
        for way in (FROM_BUCKET[0], FROM_HUB[0]):  # the servers hash their files when first asked
            run_one(way, job, folder / "target")
        found = measure([*FROM_BUCKET, *FROM_HUB], job, folder / "target", runs)
    table = medians(found)
    show(f"Pull of {size_bytes / 1e9:.2f} GB", table, size_bytes, "fsync")
    ratios: dict[str, Any] = {}
    for mine, other, target in RATIOS:
        called, synced = (table[other][k] / table[mine][k] for k in ("seconds", "fsync"))
        ratios[f"{mine} / {other}"] = {"called": called, "fsync": synced, "target": target}
        console.print(
            f"{mine} is {called:.2f} times as fast as {other} as called, {synced:.2f} times with"
            f" fsync; the target is {target}"
        )
    return {"bytes": size_bytes, "runs": found, "medians": table, "ratios": ratios}


def bench_loads(folder: Path, runs: int) -> dict[str, Any]:
    """Load a 2 GB model with and without verification, from the page cache."""
    make_pipeline(folder / "pipeline")
    job = publish_pipeline(folder / "pipeline", folder / "store")
    for way in LOADS:
        run_one(way, job, folder / "none")
    found = measure(LOADS, job, folder / "none", max(runs, 5))
    table = medians(found)
    show(f"Warm load of {job['bytes'] / 1e9:.2f} GB", table, job["bytes"], "read")
    ours, bare = (table[way] for way in LOADS)
    ratios = {key: ours[key] / bare[key] for key in ("seconds", "read")}
    console.print(
        f"A verified load takes {ratios['seconds']:.2f} times as long as from_pretrained, which"
        f" only maps the weights, and {ratios['read']:.2f} times until every weight was read; the"
        f" target is {LOAD_TARGET}"
    )
    values = {"bytes": job["bytes"], "runs": found, "medians": table, "ratios": ratios}
    return values | {"target": LOAD_TARGET}


def show(title: str, table: dict[str, Run], size_bytes: int, last: str) -> None:
    """Print medians; `last` is the figure that includes the disk or the reading."""
    shown = Table(title=title)
    for name in ("way", "s", "MB/s", f"s with {last}", "MB/s", "peak MB"):
        shown.add_column(name, justify="left" if name == "way" else "right")
    for way, row in table.items():
        cells = [
            text
            for key in ("seconds", last)
            for text in (f"{row[key]:.2f}", f"{size_bytes / row[key] / MB:.0f}")
        ]
        shown.add_row(way, *cells, f"{row['peak_mb']:.0f}")
    console.print(shown)


def _make_writable(folder: Path) -> None:
    """Give back the write permission that the store takes away."""
    subprocess.run(["chmod", "-R", "u+w", folder], check=True)


def main(
    gigabytes: Annotated[float, typer.Option(help="Size of the pulled model")] = 2.0,
    runs: Annotated[int, typer.Option(help="Runs of each way")] = 3,
    folder: Annotated[
        Path | None, typer.Option(help="Where to work: its disk is measured; try /dev/shm")
    ] = None,
    pulls: Annotated[bool, typer.Option(help="Measure pulls")] = True,
    loads: Annotated[bool, typer.Option(help="Measure loads")] = True,
    output: Annotated[Path | None, typer.Option(help="JSON; else benchmarks/results")] = None,
) -> None:
    """Measure, print medians and ratios, and write them down."""
    with tempfile.TemporaryDirectory(prefix="bench-store-", dir=folder) as name:
        here = Path(name)
        facts = machine.describe() | {
            "filesystem": filesystem(here),
            "versions": machine.versions(PACKAGES),
        }
        document: dict[str, Any] = {"date": today(), "machine": facts, "threads": THREADS}
        if pulls:
            document["pulls"] = bench_pulls(here, gigabytes, runs)
        if loads:
            document["loads"] = bench_loads(here / "loads", runs)
        _make_writable(here)
    write_result("store", document, output)


if __name__ == "__main__":
    typer.run(main)
