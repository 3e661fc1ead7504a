"""How many torch threads a model should have where several share the cores: `make bench-threads`.

UNet passes of comic-starter in a few seconds, by one process or several at a time, with one thread
each, with two that sleep while they wait for each other (`OMP_WAIT_POLICY=PASSIVE`), and with two
that spin, which is OpenMP's own way.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

from deployments.settings import ROOT

WAYS: Final = {
    "1 thread": (1, {}),
    "2, sleeping": (2, {"OMP_WAIT_POLICY": "PASSIVE"}),
    "2, spinning": (2, {"OMP_WAIT_POLICY": "ACTIVE"}),
}
LOADS: Final = ((256, 1), (512, 1), (512, 2), (512, 4), (1024, 1))
"""Side of the picture in px, and processes at a time."""
_START_S, _COUNT_S = 10.0, 5.0
console = Console(width=None if sys.stdout.isatty() else 130)


def count(side_px: int, threads: int, start_s: float) -> int:
    """Passes from `start_s` (of `time.time`) on, in this process."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(threads)
    net = UNet2DConditionModel.from_pretrained(str(ROOT / "starter_models/comic/unet"))
    net.to(memory_format=torch.channels_last)
    x = torch.rand(1, net.config.in_channels, side_px // 8, side_px // 8)
    prompt = torch.rand(1, 77, net.config.cross_attention_dim)
    passes = 0
    with torch.inference_mode():
        while time.time() < start_s + _COUNT_S:
            net(x, torch.tensor([500]), encoder_hidden_states=prompt)
            passes += time.time() >= start_s
    return passes


def measure(side_px: int, processes: int, threads: int, environment: dict[str, str]) -> int:
    """Passes of so many processes together."""
    start_s = str(time.time() + _START_S)
    command = [sys.executable, "-m", "benchmarks.threads"]
    options = ["--side", str(side_px), "--threads", str(threads), "--start-s", start_s]
    running = [
        subprocess.Popen(
            [*command, *options], cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE
        )
        for _ in range(processes)
    ]
    return sum(int(process.communicate()[0].split()[-1]) for process in running)


def main(
    side: Annotated[int, typer.Option(hidden=True)] = 0,
    threads: Annotated[int, typer.Option(hidden=True)] = 0,
    start_s: Annotated[float, typer.Option(hidden=True)] = 0,
) -> None:
    """Print the table: each cell twice."""
    if side:
        return print(count(side, threads, start_s))
    title = f"UNet passes in {_COUNT_S:g} s, all processes together; {os.cpu_count()} cores"
    table = Table(title=title)
    table.add_column("px, processes")
    for way in WAYS:
        table.add_column(way, justify="right")
    for side_px, processes in LOADS:
        found = [
            [str(measure(side_px, processes, *way)) for _ in range(2)] for way in WAYS.values()
        ]
        table.add_row(f"{side_px}, {processes}", *(" ".join(pair) for pair in found))
    console.print(table)
    return None


if __name__ == "__main__":
    typer.run(main)
