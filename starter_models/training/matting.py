"""Train the background-removal model: a small U-Net with attention on composed scenes.

`python -m starter_models.training.matting` needs `starter_models.training.collections` first. It is
meant for a GPU: a CPU composes only a few scenes a second, although it could train on fifty.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from deployments.pipelines.nets.cutout import CutoutNet, CutoutWidths
from starter_models.training.average import Average, all_finite
from starter_models.training.bank import COLLECTIONS, cut_outs, squares
from starter_models.training.judged import judged_scenes
from starter_models.training.loop import Clock, log, minutes_left, options, seed_everything
from starter_models.training.scenes import Scenes

INPUT_PX = 320
WIDTHS = CutoutWidths()
PEAK_LR = 1.5e-3


def main(
    out: Path = Path("starter_models/background"),
    minutes: float = 60.0,
    until: float = 0.0,
    collections: Path = COLLECTIONS,
    judging: Path = Path("starter_models/judging"),
    device: str = "cuda",
    batch: int = 128,
    seed: int = 2,
) -> None:
    """Train for `minutes`; save `model.safetensors` and `config.json` in `out`, on the way too."""
    seed_everything(seed, threads=2)
    scenes = Scenes(
        cut_outs(collections, "stamps", device),
        cut_outs(collections, "drawings", device),
        squares(collections, "scenes", device),
    )
    test = [t.to(device) for t in judged_scenes(judging, INPUT_PX)]
    net = CutoutNet(WIDTHS, norm=True).to(device, memory_format=torch.channels_last)
    average = Average(net)
    optimiser = torch.optim.AdamW(_grouped(net), lr=PEAK_LR, betas=(0.9, 0.98))
    clock = Clock(minutes_left(minutes, until), peak_lr=PEAK_LR, every_s=20)
    while clock.running(optimiser):
        # Small pictures first: most of what has to be learned shows in them.
        size = 224 if clock.progress < 0.45 else INPUT_PX
        x, alpha = scenes.batch(batch, size)
        x = (x.nan_to_num(0.5) - 0.5).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            fine, coarse = net(x)
        loss = matting_loss(fine.float(), coarse.float(), alpha)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        average.update(net)
        if clock.should_report():
            log(clock, loss=loss.item(), **evaluate(average.module, *test))
            save(average.module, out)
    log(clock, **evaluate(average.module, *test))
    save(average.module, out)


def _grouped(net: nn.Module) -> list[dict[str, object]]:
    """Weight decay for matrices alone."""
    matrices = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": 2e-2},
        {"params": others, "weight_decay": 0.0},
    ]


def matting_loss(fine: Tensor, coarse: Tensor, alpha: Tensor) -> Tensor:
    """Cross-entropy, L1, soft IoU where there is a foreground, and the L1 of the slopes, which asks
    for sharp edges; and cross-entropy of the coarse answer.
    """
    small = F.avg_pool2d(alpha, 8)
    p = fine.sigmoid()
    edge = (F.max_pool2d(alpha, 5, 1, 2) + F.max_pool2d(-alpha, 5, 1, 2)).clamp(0, 1)
    entropy = F.binary_cross_entropy_with_logits(fine, alpha, reduction="none")
    overlap = (p * alpha).sum((1, 2, 3))
    area = alpha.sum((1, 2, 3))
    union = p.sum((1, 2, 3)) + area - overlap
    some = (area > 0.002 * alpha[0].numel()).float()
    iou = ((1 - overlap / union.clamp(min=1)) * some).sum() / some.sum().clamp(min=1)
    slopes = sum(F.l1_loss(p.diff(dim=axis), alpha.diff(dim=axis)) for axis in (2, 3))
    return (
        (entropy * (1 + 2 * edge)).mean()
        + 0.5 * F.binary_cross_entropy_with_logits(coarse, small)
        + F.l1_loss(p, alpha)
        + 0.7 * iou
        + 2 * slopes
    )  # fmt: skip


@torch.no_grad()
def evaluate(net: CutoutNet, picture: Tensor, alpha: Tensor) -> dict[str, float]:
    """On kept-out scenes: mean IoU at 0.5 where there is a subject, share kept where there is none,
    and mean alpha error.
    """
    p = torch.cat([net(x - 0.5)[0].sigmoid() for x in picture.split(16)])
    some = alpha.amax((1, 2, 3)) > 0.5
    inside, truth = p[some] > 0.5, alpha[some] > 0.5
    iou = (inside & truth).sum((1, 2, 3)) / (inside | truth).sum((1, 2, 3))
    return {
        "iou": iou.mean().item(),
        "worst": iou.min().item(),
        "kept_of_empty": (p[~some] > 0.5).float().mean().item(),
        "mae": (p - alpha).abs().mean().item(),
    }


@torch.no_grad()
def folded(net: CutoutNet) -> CutoutNet:
    """The same network without batch norms, whose factors go into the convolutions before them."""
    net = copy.deepcopy(net).eval()
    for module in list(net.modules()):
        norm = getattr(module, "norm", None)
        if isinstance(norm, nn.BatchNorm2d):
            factor = norm.weight / (norm.running_var + norm.eps).sqrt()
            module.conv.weight.mul_(factor.view(-1, 1, 1, 1))
            module.conv.bias.sub_(norm.running_mean).mul_(factor).add_(norm.bias)
            module.norm = nn.Identity()
    return net


def save(net: CutoutNet, out: Path) -> None:
    """Write the folder that `deployments.pipelines.matting` loads."""
    if not all_finite(net):
        return
    out.mkdir(parents=True, exist_ok=True)
    state = {k: v.half().cpu().contiguous() for k, v in folded(net).state_dict().items()}
    save_file(state, out / "model.safetensors")
    widths = {k: v if isinstance(v, int) else list(v) for k, v in vars(WIDTHS).items()}
    config = {
        "architecture": "cutout",
        "input_px": INPUT_PX,
        "stretch": False,
        "refine": True,
        "widths": widths,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main(**options(main))
