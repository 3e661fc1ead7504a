"""Measures the servers in turns and writes benchmarks/results/http-<date>.json.

Servers and direct calls take turns in short blocks, so that a drift of the machine affects all of
them alike. Imagen is started once for each variant, with only the background model awake. The
overhead is the p50 of one client less the p50 of the same work called in one process.
"""

from __future__ import annotations

import signal
import statistics
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Final

import psutil
import typer
from rich.table import Table

from benchmarks import machine
from benchmarks.http_overhead.direct import process
from benchmarks.http_overhead.systems import LITSERVE, TASK, VARIANTS, litserve, ours
from benchmarks.load import parse_plan, run
from benchmarks.load.workload import photos
from benchmarks.output import console, today, write_result
from benchmarks.server import PEERS_BIN, NotStarted, Server, cpu_s, process_title, running

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.load import Plan

PACKAGES: Final = ("ray", "torch", "pillow", "uvicorn", "fastapi", "aiohttp")
# Requests of a block by clients: two or three seconds each on two cores.
BLOCKS: Final = {1: 24, 8: 32, 32: 64}
_WARM_UP: Final = {1: 10, 8: 64}
_TIMEOUT_S: Final = 60


@dataclass
class Block:
    """A closed loop of some clients.

    Attributes:
        seconds: of each request that got a picture.
        wall_s: of all.
        failed: requests without a picture.
        stages_s: mean of each Server-Timing stage.
        cpu_s: of the server, by process; varies less than latency on a busy machine.
        batch_sizes: pictures by the batch they came from, where the server says.
    """

    seconds: list[float]
    wall_s: float = 0.0
    failed: int = 0
    stages_s: dict[str, float] = field(default_factory=dict[str, float])
    cpu_s: dict[str, float] = field(default_factory=dict[str, float])
    batch_sizes: dict[int, int] = field(default_factory=dict[int, int])


if TYPE_CHECKING:
    Ask = Callable[[int, int], Block | None]
    """Drives a system with so many clients and requests; None where it takes no such load."""

Runs = dict[tuple[str, int], list[Block]]
"""The blocks of a system at a number of clients, in order."""


@dataclass(frozen=True)
class Options:
    """Of a run.

    Attributes:
        side_px: of the square photo.
        rounds: of each variant.
        blocks: requests by clients.
        threads: torch threads of ours; None keeps configs/local.yaml's.
    """

    side_px: int
    rounds: int
    blocks: dict[int, int]
    threads: int | None


def plan(side_px: int, clients: int = 1, requests: int = 1) -> Plan:
    """A closed load of one photo."""
    values = {
        "name": "http",
        "mode": "closed",
        "concurrency": clients,
        "requests": requests,
        "timeout_s": _TIMEOUT_S,
        "sizes": [[side_px, side_px]],
        "mix": [{"task": str(TASK)}],
    }
    return parse_plan(values, "The plan of make bench-http")


def load_on(server: Server, side_px: int) -> Ask:
    """Blocks of requests to a running server."""

    def ask(clients: int, requests: int) -> Block:
        family = [server.process, *server.process.children(recursive=True)]
        before_s = {process: cpu_s(process) for process in family}
        report = run(plan(side_px, clients, requests), server.url)
        if report.interrupted:
            raise KeyboardInterrupt
        done = [record.latency_s for record in report.records if record.outcome == "ok"]
        return Block(
            done,
            wall_s=report.wall_s,
            failed=len(report.records) - len(done),
            stages_s=report.stages_s,
            cpu_s=_cpu_since(before_s),
            batch_sizes=report.batch_sizes,
        )

    return ask


def _cpu_since(before_s: dict[psutil.Process, float]) -> dict[str, float]:
    used_s: dict[str, float] = {}
    for each, start_s in before_s.items():
        name = process_title(each).rpartition(":")[2]
        used_s[name] = used_s.get(name, 0.0) + max(cpu_s(each) - start_s, 0.0)
    return used_s


def calls_of(call: Callable[[int], list[float]]) -> Ask:
    """Blocks of direct calls: of one caller only."""
    return lambda clients, requests: Block(call(requests)) if clients == 1 else None


def start_others(stack: ExitStack, photo: Path, options: Options) -> dict[str, Ask]:
    """The direct calls and LitServe, warm; without LitServe if it is not installed."""
    have_litserve = bool(machine.versions(["litserve"], PEERS_BIN / "python"))
    ways: dict[str, Ask] = {}
    for name in ("ours", "litserve") if have_litserve else ("ours",):
        call = stack.enter_context(process(name, photo, options.threads))
        ways[f"direct {name}"] = calls_of(call)
    if have_litserve:
        for name in LITSERVE:
            server = stack.enter_context(running(litserve(name)))
            ways[name] = load_on(server, options.side_px)
    else:
        console.print("LitServe is not installed (`make bench-peers` makes .venv-peers): skipped.")
    for ask in ways.values():
        warm_up(ask)
    return ways


def warm_up(ask: Ask) -> None:
    """Send requests that are not counted."""
    for clients, requests in _WARM_UP.items():
        ask(clients, requests)


def measure_variant(name: str, others: dict[str, Ask], options: Options) -> Runs:
    """Rounds over every system and number of clients, every other round backwards."""
    runs: Runs = {}
    with running(ours(name, options.threads)) as server:
        ways = {"ours": load_on(server, options.side_px), **others}
        warm_up(ways["ours"])
        for turn in range(options.rounds):
            for clients, requests in options.blocks.items():
                for way in list(ways)[:: -1 if turn % 2 else 1]:
                    if block := ways[way](clients, requests):
                        runs.setdefault((way, clients), []).append(block)
    return runs


def summarise(runs: Runs) -> list[dict[str, Any]]:
    """A row for each server and number of clients; p50 of all its blocks together."""
    rows: list[dict[str, Any]] = []
    for (way, clients), blocks in sorted(runs.items(), key=lambda item: item[0][1]):
        if way.startswith("direct "):
            continue
        row: dict[str, Any] = {"way": way, "clients": clients, **_row(blocks)}
        if direct := runs.get((f"direct {way.partition(' ')[0]}", clients)):
            row["direct_p50_ms"] = _p50_ms(direct)
            row["overhead_ms"] = row["p50_ms"] - row["direct_p50_ms"]
        rows.append(row)
    return rows


def _row(blocks: Sequence[Block]) -> dict[str, Any]:
    done = sum(len(block.seconds) for block in blocks)
    failed = sum(block.failed for block in blocks)
    batch_sizes = sum((Counter(block.batch_sizes) for block in blocks), Counter[int]())
    stages = dict.fromkeys(name for block in blocks for name in block.stages_s)
    processes = dict.fromkeys(name for block in blocks for name in block.cpu_s)
    cpu_ms = {
        name: sum(block.cpu_s.get(name, 0.0) for block in blocks) / (done + failed) * 1e3
        for name in processes
    }
    return {
        "p50_ms": _p50_ms(blocks),
        "p50_ms_of_blocks": [_p50_ms([block]) for block in blocks],
        "requests_per_s": done / sum(block.wall_s for block in blocks),
        "requests": done,
        "failed": failed,
        "stages_ms": {
            name: statistics.median(block.stages_s.get(name, 0.0) for block in blocks) * 1e3
            for name in stages
        },
        "batch_sizes": dict(batch_sizes),
        "cpu_ms": sum(cpu_ms.values()),
        "cpu_ms_by_process": cpu_ms,
    }


def _p50_ms(blocks: Sequence[Block]) -> float:
    seconds = [s for block in blocks for s in block.seconds]
    return statistics.median(seconds) * 1e3 if seconds else float("nan")


def show(variant: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print the table of a variant."""
    table = Table(title=f"Serve: {variant}")
    for name in ("clients", "system"):
        table.add_column(name, no_wrap=True)
    for name in ("p50 ms", "of blocks", "overhead ms", "requests/s", "CPU ms", "failed"):
        table.add_column(name, justify="right")
    for row in rows:
        low, high = min(row["p50_ms_of_blocks"]), max(row["p50_ms_of_blocks"])
        table.add_row(
            str(row["clients"]),
            row["way"],
            f"{row['p50_ms']:.1f}",
            f"{low:.1f}-{high:.1f}",
            f"{row['overhead_ms']:.1f}" if "overhead_ms" in row else "-",
            f"{row['requests_per_s']:.1f}",
            f"{row['cpu_ms']:.1f}",
            str(row["failed"]),
        )
    console.print(table)


def measure_all(variants: Sequence[str], options: Options) -> dict[str, Any]:
    """The rows of each variant, or why it did not start."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        photo = Path(stack.enter_context(TemporaryDirectory(prefix="bench-http-"))) / "photo.jpg"
        photo.write_bytes(photos(plan(options.side_px))[options.side_px, options.side_px])
        others = start_others(stack, photo, options)
        for variant in variants:
            try:
                found[variant] = summarise(measure_variant(variant, others, options))
            except NotStarted as error:
                console.print(f"{variant}: did not start\n{error}", style="red", markup=False)
                found[variant] = {"failed": str(error)}
            else:
                show(variant, found[variant])
    return found


def main(
    variants: Annotated[str, typer.Option(help="Of Serve, by comma")] = ",".join(VARIANTS),
    side: Annotated[int, typer.Option(help="Of the photo, px")] = 256,
    rounds: Annotated[int, typer.Option(help="Of blocks, for each variant")] = 2,
    scale: Annotated[float, typer.Option(help="Of the number of requests in a block")] = 1.0,
    threads: Annotated[int | None, typer.Option(help="Of ours; else configs/local.yaml's")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON; else benchmarks/results")] = None,
) -> None:
    """Measure, print the tables, and write everything down."""
    chosen = variants.split(",")
    if unknown := set(chosen) - set(VARIANTS):
        raise typer.BadParameter(f"no such variant: {', '.join(sorted(unknown))}")
    # SIGTERM stops servers that run, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    blocks = {clients: max(round(n * scale), clients) for clients, n in BLOCKS.items()}
    versions = machine.versions(PACKAGES) | machine.versions(["litserve"], PEERS_BIN / "python")
    facts = machine.describe() | {"load_before": machine.load_average(), "versions": versions}
    start_s = time.monotonic()
    found = measure_all(chosen, Options(side, rounds, blocks, threads))
    facts["load_after"] = machine.load_average()
    document: dict[str, Any] = {
        "date": today(),
        "machine": facts,
        "task": str(TASK),
        "photo_px": [side, side],
        "blocks": blocks,
        "rounds": rounds,
        "threads": threads,
        "seconds": time.monotonic() - start_s,
        "variants": found,
    }
    console.print(
        f"{facts['processor']}, {facts['cores']} cores, load {facts['load_before']:.1f} before and"
        f" {facts['load_after']:.1f} after; {document['seconds']:.0f} s"
    )
    write_result("http", document, output)


if __name__ == "__main__":
    typer.run(main)
