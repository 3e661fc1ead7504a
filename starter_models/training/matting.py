"""Train the background-removal model: a narrow IS-Net on composites."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from deployments.pipelines.nets.isnet import ISNet, ISNetWidths
from starter_models.training.composites import composite, square
from starter_models.training.data import KEPT_OUT, Picture, dead_leaves, photo, training_photos
from starter_models.training.loop import Clock, log, seed_everything

INPUT_PX = 256
TRAINING_PX = 192
WIDTHS = ISNetWidths(
    stem=16,
    middle=(8, 12, 16, 24, 32, 32),
    out=(16, 32, 48, 64, 64, 64),
    decoder_middle=(32, 24, 16, 12, 8),
    decoder_out=(64, 48, 32, 16, 16),
)


def main(
    out: Path = Path("starter_models/background"),
    minutes: float = 60,
    seed: int = 2,
    threads: int = 1,
    batch: int = 8,
) -> None:
    """Train for `minutes`; save `model.safetensors` and `config.json` in `out`."""
    seed_everything(seed, threads)
    rng = np.random.default_rng(seed)
    pictures = training_photos() + [dead_leaves(rng) for _ in range(60)]
    net = ISNet(WIDTHS).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-4)
    clock = Clock(minutes, peak_lr=2e-3)
    while clock.running(optimiser):
        x, alpha = composites(rng, pictures, batch, TRAINING_PX)
        loss = matting_loss(net(x - 0.5), alpha)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        if clock.should_report():
            log(clock, loss=loss.item(), **evaluate(net))
            save(net, out)
    save(net, out)
    log(clock, **evaluate(net, count=100))


def composites(
    rng: np.random.Generator,
    pictures: list[Picture],
    count: int,
    size: int,
    *,
    recoloured: bool = True,
) -> tuple[Tensor, Tensor]:
    """Pictures `(count, 3, size, size)` in [0, 1] and their alphas `(count, 1, size, size)`."""
    images: list[Picture] = []
    alphas: list[Picture] = []
    for _ in range(count):
        first, second = rng.choice(len(pictures), 2, replace=False)
        image, alpha = composite(
            rng,
            square(rng, pictures[first], size, recoloured=recoloured),
            square(rng, pictures[second], size, recoloured=recoloured),
        )
        images.append(image)
        alphas.append(alpha[..., None])
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    a = torch.from_numpy(np.stack(alphas)).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last), a.contiguous()


def matting_loss(sides: list[Tensor], alpha: Tensor) -> Tensor:
    """Cross-entropy on every side output, and soft IoU plus L1 on the finest."""
    entropy = sum(F.binary_cross_entropy_with_logits(s, alpha) for s in sides) / len(sides)
    probability = sides[0].sigmoid()
    overlap = (probability * alpha).sum((1, 2, 3))
    union = (probability + alpha - probability * alpha).sum((1, 2, 3))
    return entropy + (1 - overlap / union).mean() + F.l1_loss(probability, alpha)


@torch.no_grad()
def evaluate(net: ISNet, count: int = 24) -> dict[str, float]:
    """Mean IoU at 0.5 and mean absolute alpha error on composites of kept-out photos."""
    net.eval()
    x, alpha = composites(
        np.random.default_rng(0), [photo(n) for n in KEPT_OUT], count, INPUT_PX, recoloured=False
    )
    probability = net(x - 0.5)[0].sigmoid()
    net.train()
    inside, truth = probability > 0.5, alpha > 0.5
    iou = (inside & truth).sum((1, 2, 3)) / (inside | truth).sum((1, 2, 3))
    return {"iou": iou.mean().item(), "mae": (probability - alpha).abs().mean().item()}


def save(net: ISNet, out: Path) -> None:
    """Write the folder that `deployments.pipelines.matting` loads."""
    out.mkdir(parents=True, exist_ok=True)
    state = {
        k: v.half().contiguous() if v.is_floating_point() else v
        for k, v in net.state_dict().items()
    }
    save_file(state, out / "model.safetensors")
    widths = {k: v if isinstance(v, int) else list(v) for k, v in vars(WIDTHS).items()}
    config = {"architecture": "isnet", "input_px": INPUT_PX, "stretch": False, "widths": widths}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
