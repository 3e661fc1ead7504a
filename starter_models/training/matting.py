"""Train the background-removal model: a small U-Net with attention on composed scenes.

`python -m starter_models.training.matting` needs `starter_models.training.collections` first. It
goes on from the shipped weights. Two CPU cores train on some thirty scenes a second.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from deployments.pipelines.nets.cutout import Bottleneck, CutoutNet, CutoutWidths
from starter_models.training.average import Average, all_finite
from starter_models.training.backbone import load_imagenet
from starter_models.training.bank import COLLECTIONS, cut_outs, squares
from starter_models.training.judged import judged_scenes
from starter_models.training.loop import Clock, log, minutes_left, options, seed_everything
from starter_models.training.patches import CleanPatches
from starter_models.training.scenes import Scenes

INPUT_PX = 320
WIDTHS = CutoutWidths()
PEAK_LR = 6e-4
KEPT_STAGES = 3


def main(
    out: Path = Path("starter_models/background"),
    minutes: float = 20.0,
    until: float = 0.0,
    start: Path = Path("starter_models/background"),
    rate: float = PEAK_LR,
    encoder_share: float = 0.0,
    small: float = 0.5,
    teacher: str = "",
    collections: Path = COLLECTIONS,
    judging: Path = Path("starter_models/judging"),
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    batch: int = 12,
    pool: int = 3072,
    uses: float = 6.0,
    seed: int = 2,
) -> None:
    """Train for `minutes` from the weights in `start`; save `model.safetensors` and `config.json`
    in `out`, on the way too. Of `pool` scenes, each is trained on `uses` times on average, for a
    share of `small` of the time at 224 pixels: most of what has to be learned shows in them.

    `rate` is the peak learning rate, and `encoder_share` the share of it for the encoder. Some
    minutes at 0.2 teach it to tell things from their surroundings; longer, and it learns the
    cut-outs by heart: kept-out ones come out worse, while the loss still falls.

    New kinds of scenes make a network forget photographs. `teacher` names the folder of one whose
    answers on photographs stay right (Li and Hoiem, 2017, Learning without Forgetting).
    """
    seed_everything(seed, threads=2)
    scenes = Scenes(
        cut_outs(collections, "stamps", device),
        cut_outs(collections, "drawings", device),
        squares(collections, "scenes", device),
        textures=squares(collections, "textures", device),
    )
    known = Known(begin_from(Path(teacher)), collections, device) if teacher else None
    scenes = ScenePool(scenes, pool, INPUT_PX, uses=uses, known=known)
    test = [t.to(device) for t in judged_scenes(judging, INPUT_PX)]
    net = begin_from(start)
    if not encoder_share:
        net.encoder.requires_grad_(False)
    net.to(device, memory_format=torch.channels_last)
    average = Average(net)
    optimiser = torch.optim.AdamW(_grouped(net, encoder_share), lr=rate, betas=(0.9, 0.98))
    clock = Clock(minutes_left(minutes, until), peak_lr=rate, every_s=60)
    total = torch.zeros((), device=device)
    while clock.running(optimiser):
        x, alpha = scenes.batch(batch, 224 if clock.progress < small else INPUT_PX)
        x = net.normalised(x * 255).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            fine, coarse = net(x)
        loss = matting_loss(fine.float(), coarse.float(), alpha)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        average.update(net)
        total = total.lerp(loss.detach(), 0.01)
        if clock.should_report():
            log(clock, loss=total.item(), **evaluate(average.module, *test))
            save(average.module, out)
    log(clock, **evaluate(average.module, *test))
    save(average.module, out)


class Known:
    """Crops of photographs, with what an earlier network makes of them."""

    def __init__(self, net: CutoutNet, collections: Path, device: str) -> None:
        self.net = net.to(device)
        self.photos = CleanPatches(collections, device)

    @torch.no_grad()
    def batch(self, count: int, size: int) -> tuple[Tensor, Tensor]:
        """Pictures `(count, 3, size, size)` and their alphas `(count, 1, size, size)`."""
        picture = self.photos.photographs(count, size)
        return picture, self.net(self.net.normalised(picture * 255))[0].sigmoid()


class ScenePool:
    """Scenes that are each trained on a few times before a new one takes their place.

    Composing a scene takes a CPU about as long as training on one.

    Args:
        scenes: where they come from.
        count, size: how many are kept, `size x size` pixels each.
        uses: how often a scene is drawn on average.
        known: where a quarter of them come from instead.
    """

    PART = 24
    """Scenes composed at a time."""

    def __init__(
        self, scenes: Scenes, count: int, size: int, *, uses: float, known: Known | None = None
    ) -> None:
        self.scenes, self.size, self.uses, self.known = scenes, size, uses, known
        self.stored = torch.cat([self._composed() for _ in range(-(-count // self.PART))])
        self._due, self._oldest = 0.0, 0

    @torch.no_grad()
    def batch(self, count: int, size: int) -> tuple[Tensor, Tensor]:
        """Pictures `(count, 3, size, size)` and their alphas `(count, 1, size, size)`."""
        self._due += count / self.uses
        while self._due >= self.PART:
            rows = slice(self._oldest, self._oldest + self.PART)
            self.stored[rows] = self._composed()
            self._oldest = (self._oldest + self.PART) % len(self.stored)
            self._due -= self.PART
        index = torch.randint(len(self.stored), (count,)).to(self.stored.device)
        found = self.stored[index].float() / 255
        if torch.rand(()).item() < 0.5:
            found = found.flip(3)
        if size != self.size:
            found = F.interpolate(
                found, size=size, mode="bilinear", antialias=True, align_corners=False
            )
        return found[:, :3], found[:, 3:]

    def _composed(self) -> Tensor:
        known = self.PART // 4 if self.known else 0
        parts = [self.scenes.batch(self.PART - known, self.size)]
        if self.known:
            parts.append(self.known.batch(known, self.size))
        both = torch.cat([torch.cat(part, 1) for part in parts]).nan_to_num(0.5).clamp(0, 1)
        return (both * 255).round().to(torch.uint8)


def begin_from(start: Path) -> CutoutNet:
    """The network with the weights in `start`, or, for `none`, with the encoder that was
    published alone. What finds edges and textures in it is kept as it was published, and so are the
    kernels of its depthwise convolutions, on which a CPU would spend half of the time.
    """
    net = CutoutNet(WIDTHS)
    if start == Path("none"):
        load_imagenet(net.encoder)
    else:
        weights = load_file(start / "model.safetensors")
        net.load_state_dict({k: v.float() for k, v in weights.items()})
    net.encoder.stem.requires_grad_(False)
    net.encoder.stages[:KEPT_STAGES].requires_grad_(False)
    for block in net.encoder.modules():
        if isinstance(block, Bottleneck):
            block.depthwise.requires_grad_(False)
    return net


def _grouped(net: CutoutNet, encoder_share: float) -> list[dict[str, object]]:
    """Weight decay for matrices alone, and a lower rate for the encoder."""
    groups = list[dict[str, object]]()
    for share, part in (encoder_share, True), (1.0, False):
        named = [
            p
            for name, p in net.named_parameters()
            if p.requires_grad and name.startswith("encoder.") == part
        ]
        matrices = [p for p in named if p.ndim > 1]
        others = [p for p in named if p.ndim <= 1]
        groups.append({"params": matrices, "weight_decay": 2e-2, "share": share})
        groups.append({"params": others, "weight_decay": 0.0, "share": share})
    return groups


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
    p = torch.cat([net(net.normalised(x * 255))[0].sigmoid() for x in picture.split(16)])
    some = alpha.amax((1, 2, 3)) > 0.5
    inside, truth = p[some] > 0.5, alpha[some] > 0.5
    iou = (inside & truth).sum((1, 2, 3)) / (inside | truth).sum((1, 2, 3))
    return {
        "iou": iou.mean().item(),
        "worst": iou.min().item(),
        "kept_of_empty": (p[~some] > 0.5).float().mean().item(),
        "mae": (p - alpha).abs().mean().item(),
    }


def save(net: CutoutNet, out: Path) -> None:
    """Write the folder that `deployments.pipelines.matting` loads."""
    if not all_finite(net):
        return
    out.mkdir(parents=True, exist_ok=True)
    state = {k: v.half().cpu().contiguous() for k, v in net.state_dict().items()}
    save_file(state, out / "model.safetensors")
    widths = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(WIDTHS).items()}
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
