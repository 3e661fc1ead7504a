"""Measures the servers in turns and writes benchmarks/results/http-<date>.json.

Servers and direct calls take turns in short blocks, so that a drift of the machine affects all of
them alike. Imagen is started once for each variant, with only the background model awake. The
overhead is the p50 of one client less the p50 of the same work called in one process.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from benchmarks import machine
from benchmarks.http_overhead import direct
from benchmarks.http_overhead.systems import LITSERVE, TASK, VARIANTS, litserve, ours
from benchmarks.load import parse_plan, run_whole
from benchmarks.load.workload import photos
from benchmarks.output import console, make_table, write_result
from benchmarks.server import PEERS_BIN, NotStarted, Server, cpu_s, running

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.load import Plan

PACKAGES: Final = ("ray", "torch", "pillow", "uvicorn", "fastapi", "aiohttp")
SIDE_PX: Final = 256
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
        cpu_s: of the server's processes; varies less than latency on a busy machine.
    """

    seconds: list[float]
    wall_s: float = 0.0
    failed: int = 0
    cpu_s: float = 0.0


if TYPE_CHECKING:
    Ask = Callable[[int, int], Block | None]
    """Drives a system with so many clients and requests; None where it takes no such load."""

Runs = dict[tuple[str, int], list[Block]]
"""The blocks of a system at a number of clients, in order."""


def plan(clients: int = 1, requests: int = 1) -> Plan:
    """A closed load of one photo."""
    values = {
        "name": "http",
        "mode": "closed",
        "concurrency": clients,
        "requests": requests,
        "timeout_s": _TIMEOUT_S,
        "sizes": [[SIDE_PX, SIDE_PX]],
        "mix": [{"task": str(TASK)}],
    }
    return parse_plan(values, "The plan of make bench-http")


def load_on(server: Server) -> Ask:
    """Blocks of requests to a running server."""

    def ask(clients: int, requests: int) -> Block:
        family = [server.process, *server.process.children(recursive=True)]
        before_s = [cpu_s(process) for process in family]
        report = run_whole(plan(clients, requests), server.url)
        # A process that has ended since has used 0 s.
        used_s = [max(cpu_s(p) - s, 0) for p, s in zip(family, before_s, strict=True)]
        done = [record.latency_s for record in report.records if record.outcome == "ok"]
        return Block(done, report.wall_s, len(report.records) - len(done), sum(used_s))

    return ask


def calls_of(call: Callable[[int], list[float]]) -> Ask:
    """Blocks of direct calls: of one caller only."""
    return lambda clients, requests: Block(call(requests)) if clients == 1 else None


def start_others(stack: ExitStack) -> dict[str, Ask]:
    """The direct calls and LitServe, warm; without LitServe if it is not installed."""
    photo = photos(plan())[SIDE_PX, SIDE_PX]
    ways = {"direct ours": calls_of(stack.enter_context(direct.process(direct.ours, photo)))}
    if machine.versions(["litserve"], PEERS_BIN / "python"):
        call = stack.enter_context(direct.process(direct.peers, photo))
        ways["direct litserve"] = calls_of(call)
        for name in LITSERVE:
            ways[name] = load_on(stack.enter_context(running(litserve(name))))
    else:
        console.print("LitServe is not installed (`make bench-peers` makes .venv-peers): skipped.")
    for ask in ways.values():
        warm_up(ask)
    return ways


def warm_up(ask: Ask) -> None:
    """Send requests that are not counted."""
    for clients, requests in _WARM_UP.items():
        ask(clients, requests)


def measure_variant(name: str, others: dict[str, Ask], rounds: int) -> Runs:
    """Rounds over every system and number of clients, every other round backwards."""
    runs: Runs = {}
    with running(ours(name)) as server:
        ways = {"ours": load_on(server), **others}
        warm_up(ways["ours"])
        for turn in range(rounds):
            for clients, requests in BLOCKS.items():
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
        if same_work := runs.get((f"direct {way.partition(' ')[0]}", clients)):
            row["direct_p50_ms"] = _p50_ms(same_work)
            row["overhead_ms"] = row["p50_ms"] - row["direct_p50_ms"]
        rows.append(row)
    return rows


def _row(blocks: Sequence[Block]) -> dict[str, Any]:
    done = sum(len(block.seconds) for block in blocks)
    failed = sum(block.failed for block in blocks)
    return {
        "p50_ms": _p50_ms(blocks),
        "p50_ms_of_blocks": [_p50_ms([block]) for block in blocks],
        "requests_per_s": done / sum(block.wall_s for block in blocks),
        "cpu_ms": sum(block.cpu_s for block in blocks) / (done + failed) * 1e3,
        "failed": failed,
    }


def _p50_ms(blocks: Sequence[Block]) -> float:
    seconds = [s for block in blocks for s in block.seconds]
    return statistics.median(seconds) * 1e3 if seconds else float("nan")


def show(variant: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print the table of a variant."""
    figures = ("p50 ms", "of blocks", "overhead ms", "requests/s", "CPU ms", "failed")
    table = make_table(f"Serve: {variant}", ("clients", "system"), figures)
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


def main(
    variants: Annotated[str, typer.Option(help="Of Serve, by comma")] = ",".join(VARIANTS),
    rounds: Annotated[int, typer.Option(help="Of blocks, for each variant")] = 2,
) -> None:
    """Measure, print the tables, and write everything down."""
    chosen = variants.split(",")
    if unknown := set(chosen) - set(VARIANTS):
        raise typer.BadParameter(f"no such variant: {', '.join(sorted(unknown))}")
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        others = start_others(stack)
        for variant in chosen:
            try:
                found[variant] = summarise(measure_variant(variant, others, rounds))
            except NotStarted as error:
                console.print(f"{variant}: did not start\n{error}", style="red", markup=False)
                found[variant] = {"failed": str(error)}
            else:
                show(variant, found[variant])
    versions = machine.versions(PACKAGES) | machine.versions(["litserve"], PEERS_BIN / "python")
    write_result("http", versions, photo_px=[SIDE_PX, SIDE_PX], rounds=rounds, variants=found)


if __name__ == "__main__":
    typer.run(main)
