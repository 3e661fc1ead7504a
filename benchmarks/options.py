"""Which speed options gain on this machine's CPU, with the starter models: `make bench-options`.

Times one UNet pass of the comic model under each option beside a plain one, in turns, so that both
see the same noise, and prints the ratio of the medians: below 1 is a gain.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table

from deployments.settings import ROOT, enforce_offline

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = ROOT / "starter_models" / "comic" / "unet"
SIZES_PX = (256, 512)
LATENT = 2
"""Pixels along an edge that one latent of the starter autoencoder stands for."""


def plain() -> torch.nn.Module:
    return UNet2DConditionModel.from_pretrained(FOLDER, local_files_only=True).eval()


def channels_last() -> torch.nn.Module:
    return plain().to(memory_format=torch.channels_last)


def fused_qkv() -> torch.nn.Module:
    unet = plain()
    unet.fuse_qkv_projections()
    return unet


def bfloat16() -> torch.nn.Module:
    return plain().to(torch.bfloat16)


def compiled() -> torch.nn.Module:
    return torch.compile(plain())


OPTIONS: dict[str, Callable[[], torch.nn.Module]] = {
    "plain again": plain,
    "channels_last": channels_last,
    "fused QKV": fused_qkv,
    "bfloat16": bfloat16,
    "torch.compile": compiled,
}


@torch.inference_mode()
def seconds(unet: torch.nn.Module, rows: int, size_px: int) -> float:
    """Of one pass of `rows` pictures."""
    side = size_px // LATENT
    latents = torch.zeros(rows, 8, side, side, dtype=unet.dtype)
    text = torch.zeros(rows, 77, 64, dtype=unet.dtype)
    start_s = time.perf_counter()
    unet(latents, torch.full((rows,), 500.0), encoder_hidden_states=text)
    return time.perf_counter() - start_s


def ratio(unet: torch.nn.Module, base: torch.nn.Module, rows: int, size_px: int, runs: int) -> str:
    """Median time under the option over the plain one's, run in turns."""
    for one in (unet, base):
        seconds(one, rows, size_px)
    pairs = [(seconds(unet, rows, size_px), seconds(base, rows, size_px)) for _ in range(runs)]
    medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
    return f"{medians[0] / medians[1]:.2f}"


def groups(unet: torch.nn.Module, rows: int, size_px: int, runs: int) -> str:
    """Time of a pass of `rows` over that of as many passes of one, run in turns."""
    seconds(unet, rows, size_px)
    times = [
        (seconds(unet, rows, size_px), sum(seconds(unet, 1, size_px) for _ in range(rows)))
        for _ in range(runs)
    ]
    medians = [statistics.median(values) for values in zip(*times, strict=True)]
    return f"{medians[0] / medians[1]:.2f}"


def main(
    runs: Annotated[int, typer.Option(help="timed pairs")] = 7,
    threads: Annotated[int, typer.Option(help="torch threads")] = 2,
) -> None:
    """Print, by picture size, the ratio of each option to none and of groups to single rows."""
    enforce_offline()
    torch.set_num_threads(threads)
    base = plain()
    table = Table(title=f"UNet pass of comic-starter, {threads} threads: time over plain")
    for name in ("option", *(f"{size} px" for size in SIZES_PX)):
        table.add_column(name, justify="left" if name == "option" else "right")
    for name, make in OPTIONS.items():
        try:
            unet = make()
            cells = [ratio(unet, base, 1, size, runs) for size in SIZES_PX]
        except Exception as error:  # such as no compiler
            cells = [f"fails: {type(error).__name__}"] * len(SIZES_PX)
        table.add_row(name, *cells)
    for rows in (2, 4, 8):
        cells = [groups(base, rows, size, max(runs // 2, 1)) for size in SIZES_PX]
        table.add_row(f"group of {rows} over {rows} single rows", *cells)
    console = Console()
    console.print(table)
    load = os.getloadavg()[0]
    console.print(f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, {runs} runs")


if __name__ == "__main__":
    typer.run(main)
