"""Which speed options gain on this machine's CPU, with the starter models: `make bench-options`.

Times one UNet pass of the comic model under each option beside a plain one, in turns, so that both
see the same noise, and prints the ratio of the medians: below 1 is a gain. channels_last is tried
on every other network, too.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.utils import logging
from rich.console import Console
from rich.table import Table

from deployments.pipelines.nets.isnet import ISNet, ISNetWidths
from deployments.pipelines.nets.srvgg import SRVGGNetCompact
from deployments.settings import ROOT, enforce_offline

STARTER = ROOT / "starter_models"
FOLDER = STARTER / "comic" / "unet"
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


Timed = Callable[[], float]


def ratio(option: Timed, plain: Timed, runs: int) -> str:
    """Median time under the option over the plain one's, run in turns."""
    option(), plain()
    pairs = [(option(), plain()) for _ in range(runs)]
    medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
    return f"{medians[0] / medians[1]:.2f}"


def autoencoder() -> Any:
    return AutoencoderTiny.from_pretrained(FOLDER.parent / "vae", local_files_only=True).eval()


def upscaler() -> torch.nn.Module:
    config = json.loads((STARTER / "upscale/config.json").read_text())
    return SRVGGNetCompact(int(config["num_feat"]), int(config["num_conv"])).eval()


def isnet() -> torch.nn.Module:
    config = json.loads((STARTER / "background/config.json").read_text())
    return ISNet(ISNetWidths(**config["widths"])).eval()


def picture(px: int) -> torch.Tensor:
    """As pipelines make them: of pixels whose channels lie together."""
    return torch.zeros(1, px, px, 3).permute(0, 3, 1, 2)


NETWORKS: dict[str, tuple[Callable[[], Any], Callable[[Any, int], Any]]] = {
    "autoencoder, encode": (autoencoder, lambda net, px: net.encode(picture(px))),
    "autoencoder, decode": (
        autoencoder,
        lambda net, px: net.decode(torch.zeros(1, 8, px // LATENT, px // LATENT)),
    ),
    "upscale, a quarter the side": (upscaler, lambda net, px: net(picture(px // 4))),
    "background": (isnet, lambda net, px: net(picture(px), sides=1)),
}
"""What makes a network, and how it is called for a picture of so many pixels a side."""


def layout_ratio(name: str, size_px: int, runs: int) -> str:
    """Time of a network with channels_last over that without, run in turns."""
    make, call = NETWORKS[name]

    def timed(net: Any) -> Timed:
        return lambda: _timed_s(call, net, size_px)

    return ratio(timed(make().to(memory_format=torch.channels_last)), timed(make()), runs)


@torch.inference_mode()
def _timed_s(call: Callable[[Any, int], Any], net: Any, size_px: int) -> float:
    start_s = time.perf_counter()
    call(net, size_px)
    return time.perf_counter() - start_s


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
    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    base = plain()
    table = Table(title=f"UNet pass of comic-starter, {threads} threads: time over plain")
    for name in ("option", *(f"{size} px" for size in SIZES_PX)):
        table.add_column(name, justify="left" if name == "option" else "right")
    for name, make in OPTIONS.items():
        try:
            unet = make()
            cells = [
                ratio(partial(seconds, unet, 1, size), partial(seconds, base, 1, size), runs)
                for size in SIZES_PX
            ]
        except Exception as error:  # such as no compiler
            cells = [f"fails: {type(error).__name__}"] * len(SIZES_PX)
        table.add_row(name, *cells)
    for name in NETWORKS:
        cells = [layout_ratio(name, size, runs) for size in SIZES_PX]
        table.add_row(f"channels_last: {name}", *cells)
    for rows in (2, 4, 8):
        cells = [groups(base, rows, size, max(runs // 2, 1)) for size in SIZES_PX]
        table.add_row(f"group of {rows} over {rows} single rows", *cells)
    console = Console()
    console.print(table)
    load = os.getloadavg()[0]
    console.print(f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, {runs} runs")


if __name__ == "__main__":
    typer.run(main)
