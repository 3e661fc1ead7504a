"""What a group of 8 rows costs over eight single rows: one forward pass of the comic UNet.

Says how much any batching can gain on this machine, whoever does it.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from diffusers import UNet2DConditionModel

from benchmarks.peers.work import TORCH_THREADS
from deployments.settings import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

BUCKETS_PX = (512, 256)
ROWS = 8
_VAE_FACTOR = 2
_TOKENS = 77


def measure(unet: Any, side_px: int, repeats: int) -> float:
    """Seconds of a pass of 8 rows over those of 8 passes of one right after; the median."""
    side = side_px // _VAE_FACTOR
    latents = torch.randn(ROWS, unet.config.in_channels, side, side)
    prompts = torch.randn(ROWS, _TOKENS, unet.config.cross_attention_dim)

    def group() -> None:
        unet(latents, 500, prompts)

    def singles() -> None:
        for row in range(ROWS):
            unet(latents[row : row + 1], 500, prompts[row : row + 1])

    group()
    singles()
    return statistics.median(_seconds(group) / _seconds(singles) for _ in range(repeats))


def _seconds(work: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def main(repeats: Annotated[int, typer.Option(help="of each measurement")] = 5) -> None:
    """Print the ratio for each bucket, as JSON."""
    torch.set_num_threads(TORCH_THREADS)
    unet = UNet2DConditionModel.from_pretrained(ROOT / "starter_models/comic/unet").eval()
    with torch.inference_mode():
        found = {f"{side}x{side}": measure(unet, side, repeats) for side in BUCKETS_PX}
    typer.echo(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
