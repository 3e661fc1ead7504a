"""Train the upscaler that draws texture: that of `upscaler`, deeper, and taught by what people see.

The loss has the parts of ESRGAN's (Wang et al., 2018): L1, the distance of features, and an
adversary that compares with the average of the other kind (Jolicoeur-Martineau, 2019). Features are
those of the encoder of background, each place scaled to unit length (Zhang et al., 2018). The
adversary judges patches (Isola et al., 2017) and is held back by spectral norms (Miyato et al.,
2018).

`python -m starter_models.training.perceptual` needs `starter_models.training.collections` first.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from deployments.pipelines.nets.srvgg import SRVGGNetCompact
from starter_models.training.average import Average
from starter_models.training.bank import COLLECTIONS
from starter_models.training.loop import Clock, log, minutes_left, options, seed_everything
from starter_models.training.matting import begin_from
from starter_models.training.patches import CleanPatches, PatchBank
from starter_models.training.upscaler import NUM_FEAT, SCALE, load, save, shrunk

NUM_CONV = 16
PEAK_LR = 4e-4
FEATURES = 0.02
ADVERSARY = 0.01
"""Weights beside L1."""


class Features(nn.Module):
    """Features at 1/2, 1/4 and 1/8 of the encoder in `folder`, of unit length at each place."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.net = begin_from(folder).requires_grad_(False)
        self.net.encoder.stages = self.net.encoder.stages[:3]

    def forward(self, x: Tensor) -> list[Tensor]:
        """`(B, 3, H, W)` in [0, 1] to one `(B, C, H / k, W / k)` a scale."""
        found = self.net.encoder(self.net.normalised(x * 255))
        return [F.normalize(one, dim=1) for one in found]


class Judge(nn.Module):
    """Tells photographs from what the upscaler makes, by patches of 40 px."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = ((3, width, 1), (width, width, 2), (width, 2 * width, 2), (2 * width, 4 * width, 2))
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(inputs, outputs, 3 if stride == 1 else 4, stride, 1))
            for inputs, outputs, stride in sizes
        )
        self.last = spectral_norm(nn.Conv2d(4 * width, 1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 3, H, W)` in [0, 1] to `(B, 1, H / 8, W / 8)`, above 0 for a photograph."""
        x = x * 2 - 1
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        return self.last(x)


def main(
    out: Path = Path("starter_models/upscale-perceptual"),
    minutes: float = 30.0,
    until: float = 0.0,
    start: Path = Path("starter_models/upscale-perceptual"),
    features: Path = Path("starter_models/background"),
    collections: Path = COLLECTIONS,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    batch: int = 8,
    patch_px: int = 128,
    seed: int = 6,
) -> None:
    """Train for `minutes` from `start`, which this program or `upscaler` wrote; save in `out`."""
    seed_everything(seed, threads=2)
    patches = PatchBank(CleanPatches(collections, device), 6144, patch_px)
    net, seen, judge = (
        part.to(device, memory_format=torch.channels_last)
        for part in (deepened(start), Features(features), Judge())
    )
    average = Average(net, decay=0.998)
    optimiser, judging = (
        torch.optim.Adam(part.parameters(), lr=PEAK_LR, betas=(0.5, 0.99)) for part in (net, judge)
    )
    clock = Clock(minutes_left(minutes, until), peak_lr=PEAK_LR, every_s=60)
    totals = torch.zeros(4, device=device)
    while clock.running(optimiser):
        judging.param_groups[0]["lr"] = optimiser.param_groups[0]["lr"]
        large = patches.batch(batch)
        output = net(shrunk(large).contiguous(memory_format=torch.channels_last))
        near = F.l1_loss(output, large)
        apart = distance(seen(output), seen(large))
        adversary = adversarial(judge, output, large)
        step(optimiser, net, near + FEATURES * apart + ADVERSARY * adversary)
        judged = adversarial(judge, large, output.detach())
        step(judging, judge, judged)
        average.update(net)
        totals.lerp_(torch.stack([near, apart, adversary, judged]).detach(), 0.02)
        if clock.should_report():
            means = (totals / (1 - 0.98**clock.step)).tolist()
            log(clock, **dict(zip(("l1", "features", "adversary", "judge"), means, strict=True)))
            save(average.module, out)
    save(average.module, out)


def deepened(folder: Path) -> SRVGGNetCompact:
    """The upscaler in `folder`, and up to `NUM_CONV` convolutions that change nothing yet."""
    net = load(folder)
    deep = SRVGGNetCompact(NUM_FEAT, NUM_CONV, SCALE)
    *inner, last = net.body
    further = deep.body[len(inner) : -1]
    for layer in further:
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight)
            nn.init.zeros_(layer.bias)
        else:
            nn.init.ones_(layer.weight)
    deep.body = nn.Sequential(*inner, *further, last)
    return deep


def distance(ours: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """L1 over channels, averaged over places and scales."""
    off = [(a - b).abs().sum(1).mean() for a, b in zip(ours, wanted, strict=True)]
    return torch.stack(off).mean()


def adversarial(judge: Judge, real: Tensor, other: Tensor) -> Tensor:
    """How far `real` is from looking more real than `other` does on average, and the reverse."""
    a, b = judge(real), judge(other)
    return F.softplus(b.mean() - a).mean() + F.softplus(b - a.mean()).mean()


def step(optimiser: torch.optim.Optimizer, net: nn.Module, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimiser.step()


if __name__ == "__main__":
    main(**options(main))
