"""In which order rows step: ours beside others, simulated: `make bench-order`.

One server, one row at a time, as on a CPU where groups do not gain. Rows arrive as a Poisson
process with 10 to 40 steps, strength 0.2 to 0.9 and five sizes; no network runs. A row's slowdown
is its time in the system over the time of its own steps.
"""

from __future__ import annotations

import random
import statistics
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from deployments.engine.grouping import GroupLimits, Pace, choose
from deployments.engine.row import Row, RowInput

if TYPE_CHECKING:
    from collections.abc import Callable

    Order = Callable[[list[Row], float], Row]

SIZES_PX = ((256, 192), (256, 256), (320, 192), (512, 384), (512, 512))
SIZE_WEIGHTS = (2, 3, 2, 3, 2)
SECONDS_PER_PX = 1e-6
PIXELS = np.zeros((1, 1, 3), np.uint8)


def arrivals(count: int, load: float, seed: int) -> list[Row]:
    """Rows with their time of arrival, at a share `load` of what the server can do."""
    rng = random.Random(seed)
    rows: list[Row] = []
    for _ in range(count):
        row = Row(RowInput(None, PIXELS, 0, 0))
        steps = max(1, int(rng.randint(10, 40) * rng.uniform(0.2, 0.9)))
        row.progress.steps = row.progress.steps_left = steps
        width, height = rng.choices(SIZES_PX, SIZE_WEIGHTS)[0]
        row.progress.cost_px = 2 * width * height
        rows.append(row)
    rate = load / statistics.mean(own_s(row) for row in rows)
    now_s = 0.0
    for row in rows:
        now_s += rng.expovariate(rate)
        row.progress.arrived_s = now_s
    return rows


def own_s(row: Row) -> float:
    return row.progress.work_px * SECONDS_PER_PX


def latencies(rows: list[Row], order: Order) -> list[float]:
    """Seconds from arrival to the end of each row."""
    now_s, waiting, coming = 0.0, list[Row](), list(rows)
    while coming or waiting:
        if not waiting:
            now_s = max(now_s, coming[0].progress.arrived_s)
        while coming and coming[0].progress.arrived_s <= now_s:
            waiting.append(coming.pop(0))
        row = order(waiting, now_s)
        now_s += row.progress.cost_px * SECONDS_PER_PX
        row.progress.steps_left -= 1
        row.progress.stepping_s = now_s  # the last time it stepped
        if not row.progress.steps_left:
            waiting.remove(row)
    return [row.progress.stepping_s - row.progress.arrived_s for row in rows]


def ours() -> Order:
    pace = Pace()
    pace._s_per_px = SECONDS_PER_PX
    limits = GroupLimits(max_batch_size=1)
    return lambda rows, now_s: choose(rows, lambda _: 0, limits, pace, now_s).rows[0]


def orders() -> dict[str, Order]:
    return {
        "first come, first served": lambda rows, _: min(rows, key=lambda r: r.progress.arrived_s),
        "turns": lambda rows, _: min(
            rows, key=lambda r: r.progress.stepping_s or r.progress.arrived_s
        ),
        "shortest remaining time": lambda rows, _: min(rows, key=lambda r: r.progress.work_left_px),
        "ours": ours(),
    }


def percentiles(values: list[float]) -> list[float]:
    return [float(value) for value in np.percentile(values, [50, 95])]


def main(
    count: Annotated[int, typer.Option(help="rows of a run")] = 400,
    seeds: Annotated[int, typer.Option(help="runs, averaged")] = 6,
) -> None:
    """Print latency and slowdown by load and order."""
    table = Table(title=f"{count} rows, mean of {seeds} runs (simulated)")
    for name in ("load", "order", "p50 s", "p95 s", "slowdown p50", "p95", "max"):
        table.add_column(name, justify="left" if name == "order" else "right")
    for load in (0.6, 0.8, 0.95):
        for name, order in orders().items():
            found: list[list[float]] = []
            for seed in range(seeds):
                rows = arrivals(count, load, seed)
                waits = latencies(rows, order)
                slow = [wait / own_s(row) for wait, row in zip(waits, rows, strict=True)]
                found.append([*percentiles(waits), *percentiles(slow), max(slow)])
            means = [f"{statistics.mean(values):.1f}" for values in zip(*found, strict=True)]
            table.add_row(f"{load}", name, *means)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
