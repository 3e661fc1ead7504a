"""Train the x4 upscaler: a narrow SRVGGNetCompact on pictures shrunk by Pillow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from deployments.pipelines.nets.srvgg import SRVGGNetCompact
from starter_models.training.data import KEPT_OUT, Patches, Picture, dead_leaves, photo, stack
from starter_models.training.loop import Clock, log, psnr, seed_everything

SCALE = 4
NUM_FEAT = 24
NUM_CONV = 8

_FILTERS = (Image.Resampling.BICUBIC, Image.Resampling.BOX, Image.Resampling.LANCZOS)
_FILTER_ODDS = (0.8, 0.1, 0.1)


def build() -> SRVGGNetCompact:
    """A fresh upscaler (52,968 parameters) that begins at nearest-neighbour upscaling.

    Variance-preserving weights, because under PyTorch's own the picture fades within ten layers
    and training never starts.
    """
    net = SRVGGNetCompact(NUM_FEAT, NUM_CONV, SCALE)
    convolutions = [m for m in net.body if isinstance(m, torch.nn.Conv2d)]
    for convolution in convolutions:
        torch.nn.init.kaiming_normal_(convolution.weight, a=0.25)
        torch.nn.init.zeros_(convolution.bias)
    torch.nn.init.zeros_(convolutions[-1].weight)
    return net


def main(
    out: Path = Path("starter_models/upscale"),
    minutes: float = 20,
    start_from: Annotated[Path | None, typer.Option(help="folder to continue from")] = None,
    seed: int = 4,
    threads: int = 1,
    batch: Annotated[int, typer.Option(help="patches a step")] = 8,
    patch_px: Annotated[int, typer.Option(help="side of the large patch")] = 128,
) -> None:
    """Train for `minutes`; save `model.safetensors` and `config.json` in `out`."""
    seed_everything(seed, threads)
    patches = training_patches(seed)
    net = build().to(memory_format=torch.channels_last)
    if start_from is not None:
        net.load_state_dict(load_file(start_from / "model.safetensors"))
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3, betas=(0.9, 0.99))
    clock = Clock(minutes, peak_lr=3e-3)
    total = 0.0
    while clock.running(optimiser):
        small, large = pairs(patches, batch, patch_px)
        output = net(small)
        # The square is what PSNR rewards: 0.03 dB more than L1 alone after equal steps.
        loss = F.mse_loss(output, large) + 0.1 * F.l1_loss(output, large)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimiser.step()
        total = 0.98 * total + 0.02 * loss.item()
        if clock.should_report():
            log(clock, loss=total / (1 - 0.98**clock.step), **evaluate(net))
            save(net, out)
    save(net, out)
    log(clock, **evaluate(net))


def training_patches(seed: int) -> Patches:
    """Photos and dead leaves; the leaves are halved, because ImageDraw's edges are jagged and an
    upscaler would learn the jags.
    """
    patches = Patches(seed, photo_share=0.75, leaves=0)
    for _ in range(100):
        leaf = dead_leaves(patches.rng, size=512, leaves=1200)
        patches.leaves.append(shrunk(leaf, 2, Image.Resampling.BOX))
    return patches


def pairs(patches: Patches, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Small pictures `(count, 3, size / 4, size / 4)` and their originals, in [0, 1]."""
    large = [patches.one(size) for _ in range(count)]
    kinds = patches.rng.choice(len(_FILTERS), count, p=_FILTER_ODDS)
    small = [shrunk(p, SCALE, _FILTERS[kind]) for p, kind in zip(large, kinds, strict=True)]
    x, y = (torch.from_numpy(stack(p)) for p in (small, large))
    return x.to(memory_format=torch.channels_last), y.to(memory_format=torch.channels_last)


def shrunk(picture: Picture, factor: int, resample: Image.Resampling) -> Picture:
    """`H x W x 3` to `H / factor x W / factor x 3`, through 8 bits as a client's file is."""
    image = Image.fromarray((picture * 255 + 0.5).astype(np.uint8))
    small = image.resize((image.width // factor, image.height // factor), resample)
    return np.asarray(small, np.float32) / 255


@torch.no_grad()
def evaluate(net: SRVGGNetCompact) -> dict[str, float]:
    """PSNR in dB on kept-out photos, and by how much their mean beats Pillow's bicubic."""
    scores: dict[str, float] = {}
    gains: list[float] = []
    for name in KEPT_OUT:
        large = photo(name)
        height, width = (side // SCALE * SCALE for side in large.shape[:2])
        large = large[:height, :width]
        small = shrunk(large, SCALE, Image.Resampling.BICUBIC)
        ours = net(torch.from_numpy(stack([small]))).clamp(0, 1)
        plain = Image.fromarray((small * 255 + 0.5).astype(np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        truth = torch.from_numpy(stack([large]))
        bicubic = torch.from_numpy(stack([np.asarray(plain, np.float32) / 255]))
        score = psnr(ours, truth)
        scores[name.split(":")[1].split(".")[0]] = score
        gains.append(score - psnr(bicubic, truth))
    return {**scores, "gain": sum(gains) / len(gains)}


def save(net: SRVGGNetCompact, out: Path) -> None:
    """Write the folder that `deployments.pipelines.upscale_gan` loads."""
    out.mkdir(parents=True, exist_ok=True)
    state = {k: v.half().contiguous() for k, v in net.state_dict().items()}
    save_file(state, out / "model.safetensors")
    config = {"architecture": "srvgg", "num_feat": NUM_FEAT, "num_conv": NUM_CONV, "scale": SCALE}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
