"""Train the x4 upscaler: a narrow SRVGGNetCompact on pictures shrunk as Pillow does, some of them
compressed afterwards, as small pictures mostly are.

`python -m starter_models.training.upscaler` needs `starter_models.training.collections` first.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from deployments.pipelines.nets.srvgg import SRVGGNetCompact
from starter_models.training.average import Average, all_finite
from starter_models.training.bank import COLLECTIONS
from starter_models.training.damage import compressed
from starter_models.training.loop import Clock, log, minutes_left, options, seed_everything
from starter_models.training.patches import CleanPatches, PatchBank

SCALE = 4
NUM_FEAT = 24
NUM_CONV = 8
PEAK_LR = 2e-3


def build() -> SRVGGNetCompact:
    """A fresh upscaler (52,968 parameters) that begins at nearest-neighbour upscaling.

    Variance-preserving weights, because under PyTorch's own the picture fades within ten layers
    and training never starts. The first three features carry red, green and blue to the last
    convolution as they are: it learns to interpolate each of them in the first seconds. Otherwise
    the features are mostly of brightness, and colours stay as coarse as nearest-neighbour's.
    """
    net = SRVGGNetCompact(NUM_FEAT, NUM_CONV, SCALE)
    *inner, last = (m for m in net.body if isinstance(m, nn.Conv2d))
    for convolution in inner:
        nn.init.kaiming_normal_(convolution.weight, a=0.25)
        nn.init.dirac_(convolution.weight[:3].detach())
    for slope in (m.weight for m in net.body if isinstance(m, nn.PReLU)):
        nn.init.ones_(slope[:3].detach())
    for convolution in (*inner, last):
        nn.init.zeros_(convolution.bias)
    nn.init.zeros_(last.weight)
    return net


def main(
    out: Path = Path("starter_models/upscale"),
    minutes: float = 20.0,
    until: float = 0.0,
    start: str = "",
    collections: Path = COLLECTIONS,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    batch: int = 16,
    patch_px: int = 192,
    seed: int = 4,
) -> None:
    """Train for `minutes` from the weights in `start` ("" for fresh ones); save in `out`."""
    seed_everything(seed, threads=2)
    patches = PatchBank(CleanPatches(collections, device), 6144, patch_px)
    net = load(Path(start)) if start else build()
    net.to(device, memory_format=torch.channels_last)
    average = Average(net, decay=0.999)
    optimiser = torch.optim.Adam(net.parameters(), lr=PEAK_LR, betas=(0.9, 0.99))
    clock = Clock(minutes_left(minutes, until), peak_lr=PEAK_LR, every_s=60)
    total = torch.zeros((), device=device)
    while clock.running(optimiser):
        large = patches.batch(batch)
        small = shrunk(large).contiguous(memory_format=torch.channels_last)
        output = net(small)
        # The square is what PSNR rewards: 0.03 dB more than L1 alone after equal steps.
        loss = F.mse_loss(output, large) + 0.1 * F.l1_loss(output, large)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimiser.step()
        average.update(net)
        total = total.lerp(loss.detach(), 0.02)
        if clock.should_report():
            log(clock, loss=total.item() / (1 - 0.98**clock.step))
            save(average.module, out)
    save(average.module, out)


def shrunk(large: Tensor) -> Tensor:
    """`(B, 3, H, W)` four times smaller, by Pillow's filters, through 8 bits; a third by JPEG."""
    size = tuple(side // SCALE for side in large.shape[2:])
    small = F.interpolate(large, size=size, mode="bicubic", antialias=True, align_corners=False)
    averaged = F.avg_pool2d(large, SCALE)
    other = (torch.rand(len(large), 1, 1, 1, device=large.device) < 0.15).float()
    small = (torch.lerp(small, averaged, other).clamp(0, 1) * 255).round() / 255
    return compressed(small, odds=0.33, lowest=40, highest=98)


def load(folder: Path) -> SRVGGNetCompact:
    """The network that `save` wrote, in float32."""
    config = json.loads((folder / "config.json").read_text())
    net = SRVGGNetCompact(config["num_feat"], config["num_conv"], config["scale"])
    weights = load_file(folder / "model.safetensors")
    net.load_state_dict({k: v.float() for k, v in weights.items()})
    return net


def save(net: SRVGGNetCompact, out: Path) -> None:
    """Write the folder that `deployments.pipelines.upscale_gan` loads."""
    if not all_finite(net):
        return
    out.mkdir(parents=True, exist_ok=True)
    state = {k: v.half().cpu().contiguous() for k, v in net.state_dict().items()}
    save_file(state, out / "model.safetensors")
    num_conv = sum(isinstance(m, nn.Conv2d) for m in net.body) - 2
    config = {"architecture": "srvgg", "num_feat": NUM_FEAT, "num_conv": num_conv, "scale": SCALE}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main(**options(main))
