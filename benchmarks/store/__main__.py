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

from benchmarks import machine
from benchmarks.output import console, make_table, write_result
from benchmarks.store.loads import LOADS, make_pipeline, publish_pipeline
from benchmarks.store.pulls import FROM_BUCKET, FROM_HUB, MB, THREADS, served
from deployments.store.disk import filesystem

if TYPE_CHECKING:
    from collections.abc import Sequence

    Run = dict[str, float]

PACKAGES: Final = ("google-cloud-storage", "huggingface_hub", "diffusers", "torch", "requests")


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
    for ours, *others in (FROM_BUCKET, FROM_HUB):
        for other in others:
            called, synced = (table[other][key] / table[ours][key] for key in ("seconds", "fsync"))
            console.print(
                f"{ours} is {called:.2f} times as fast as {other}, {synced:.2f} times with fsync."
            )
    return {"bytes": size_bytes, "runs": found, "medians": table}


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
    console.print(
        f"A verified load takes {ours['seconds'] / bare['seconds']:.2f} times as long as"
        f" from_pretrained, which only maps the weights, and {ours['read'] / bare['read']:.2f}"
        " times until every weight was read."
    )
    return {"bytes": job["bytes"], "runs": found, "medians": table}


def show(title: str, table: dict[str, Run], size_bytes: int, last: str) -> None:
    """Print medians; `last` is the figure that includes the disk or the reading."""
    figures = ("s", "MB/s", f"s with {last}", "MB/s", "peak MB")
    shown = make_table(title, ("way",), figures)
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
) -> None:
    """Measure, print medians and ratios, and write them down."""
    with tempfile.TemporaryDirectory(prefix="bench-store-", dir=folder) as name:
        here = Path(name)
        disk = filesystem(here)
        pulls, loads = bench_pulls(here, gigabytes, runs), bench_loads(here / "loads", runs)
        _make_writable(here)
    versions = machine.versions(PACKAGES)
    write_result("store", versions, filesystem=disk, threads=THREADS, pulls=pulls, loads=loads)


if __name__ == "__main__":
    typer.run(main)
