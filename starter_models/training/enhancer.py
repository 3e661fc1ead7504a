"""Train enhance: the whole way of a request, from the picture to the picture, end to end.

A request of the defaults encodes the picture, adds a little noise, lets the UNet predict the clean
latents twice (DDIM, Song et al., 2021) and decodes. Both predictions are trained through that way,
and the autoencoder with them. The schedule keeps a share of its noise until the last step, or the
second prediction could change nothing: a prediction x0 = a x - s v moves by s times the output.

Damage is noise and JPEG, blur, or none at all: a clean picture is to stay as it is, a touch
sharper. The text encoder is the shipped one, unchanged, and the rest starts from the shipped
weights, too. This program needs `starter_models.training.collections` first, and
`starter_models.training.conditions`.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from starter_models.training.average import Average, all_finite
from starter_models.training.bank import COLLECTIONS
from starter_models.training.damage import compressed, gaussian, noisy
from starter_models.training.loop import Clock, log, minutes_left, options, seed_everything
from starter_models.training.patches import CleanPatches, PatchBank

BETAS = (2.5e-5, *(1.5e-6,) * 999)
GAIN = 20.0
"""Size that the UNet's output comes to: trained as a factor behind it, folded in when saved."""
FIRST, LAST = 251, 1
"""The timesteps of the defaults: 4 steps at strength 0.5."""
PEAK_LR = 5e-4


class Enhancer(nn.Module):
    """UNet and autoencoder, with the text of the prompts already encoded.

    Args:
        folder: the shipped model, where training starts.
        conditions: `embeds` (P, 77, C) and `pooled` (P, C), a row a prompt.
    """

    def __init__(self, folder: Path, conditions: dict[str, Tensor]) -> None:
        super().__init__()
        how = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", **how)
        self.vae = AutoencoderTiny.from_pretrained(folder / "vae", **how)
        with torch.no_grad():
            for weights in self.unet.conv_out.parameters():
                weights.div_(GAIN)
        self.register_buffer("embeds", conditions["embeds"].float())
        self.register_buffer("pooled", conditions["pooled"].float())
        kept = scheduler().alphas_cumprod
        self.register_buffer("signal", kept.sqrt())
        self.register_buffer("noise", (1 - kept).sqrt())

    def forward(
        self, source: Tensor, first: Tensor, second: Tensor, prompt: Tensor
    ) -> list[Tensor]:
        """Pictures after each prediction, `(B, 3, S, S)` in [-1, 1].

        Args:
            source: as that.
            first, second: (B,) timesteps.
            prompt: (B,) rows of the conditions.
        """
        z = self.vae.encoder(source)
        size_px = torch.randint(256, 705, (len(z), 2), device=z.device)
        fixed = torch.tensor([[0, 0, 6]], device=z.device).repeat(len(z), 1)
        condition = {
            "encoder_hidden_states": self.embeds[prompt],
            "added_cond_kwargs": {
                "text_embeds": self.pooled[prompt],
                "time_ids": torch.cat([size_px, fixed], 1).to(z.dtype),
            },
        }
        a, s = (part[first].view(-1, 1, 1, 1) for part in (self.signal, self.noise))
        x = a * z + s * torch.randn_like(z)
        pictures: list[Tensor] = []
        for t, after in ((first, second), (second, None)):
            a, s = (part[t].view(-1, 1, 1, 1) for part in (self.signal, self.noise))
            clean = a * x - s * GAIN * self.unet(x, t, **condition).sample
            pictures.append(self.vae.decoder(clean))
            if after is not None:
                noise = (x - a * clean) / s
                a, s = (part[after].view(-1, 1, 1, 1) for part in (self.signal, self.noise))
                x = a * clean + s * noise
        return pictures


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        trained_betas=list(BETAS),
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def main(
    out: Path = Path("starter_models/enhance"),
    minutes: float = 60.0,
    until: float = 0.0,
    start: Path = Path("starter_models/enhance"),
    conditions: Path = Path("starter_models/build/conditions.safetensors"),
    collections: Path = COLLECTIONS,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    batch: int = 16,
    patch_px: int = 128,
    seed: int = 3,
) -> None:
    """Train for `minutes` from the model in `start`; save its changed parts in `out`."""
    seed_everything(seed, threads=2)
    patches = PatchBank(CleanPatches(collections, device), 6144, patch_px)
    net = Enhancer(start, load_file(conditions)).to(device, memory_format=torch.channels_last)
    average = Average(net, decay=0.997)
    optimiser = torch.optim.AdamW(
        net.parameters(), lr=PEAK_LR, weight_decay=1e-4, betas=(0.9, 0.98)
    )
    clock = Clock(minutes_left(minutes, until), peak_lr=PEAK_LR, every_s=60)
    while clock.running(optimiser):
        clean = patches.batch(batch)
        bad, target, kind = damaged(clean)
        losses = enhancing_loss(net, bad, target)
        loss = losses.mean() + 0.3 * reconstruction_loss(net, clean[::4])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimiser.step()
        average.update(net)
        if clock.should_report():
            scores = decibels(average.module, bad, target, kind)
            log(clock, loss=loss.item(), **scores)
            save(average.module, out)
    log(clock, **decibels(average.module, bad, target, kind))
    save(average.module, out)


def damaged(clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and kinds: 0 noise and JPEG, 1 blur, 2 neither. All in [0, 1]."""
    count, device = len(clean), clean.device
    kind = torch.multinomial(torch.tensor([0.6, 0.2, 0.2]), count, replacement=True).to(device)
    bad, target = clean.clone(), clean.clone()
    for part in (kind == 0).nonzero()[:, 0].split(8):
        spoiled = noisy(clean[part], odds=0.9, strongest=14 / 255)
        bad[part] = compressed(spoiled, odds=0.9, lowest=14, highest=50)
    for part in (kind == 1).nonzero()[:, 0].tensor_split(4):
        if len(part):
            soft = gaussian(clean[part], 0.6 + 1.4 * torch.rand(()).item())
            soft = noisy(soft, odds=0.3, strongest=3 / 255)
            bad[part] = compressed(soft, odds=0.4, lowest=75)
    # Least squares alone leaves a clean picture softer than it came.
    for i, more in ((1, 0.15), (2, 0.4)):
        rows = (kind == i).nonzero()[:, 0]
        if len(rows):
            target[rows] = clean[rows] + more * (clean[rows] - gaussian(clean[rows], 1.0))
    return (bad.clamp(0, 1) * 255).round() / 255, target, kind


def enhancing_loss(net: Enhancer, bad: Tensor, target: Tensor) -> Tensor:
    """(B,): mostly the squared error of the last picture, and L1 of it and of its slopes."""
    count, device = len(bad), bad.device
    usual = torch.rand(count, device=device) < 0.8
    first = torch.where(usual, FIRST, torch.randint(150, 999, (count,), device=device))
    second = torch.where(usual, LAST, (first * torch.rand(count, device=device)).long().clamp(1))
    prompt = torch.randint(len(net.embeds), (count,), device=device)
    source = (bad * 2 - 1).contiguous(memory_format=torch.channels_last)
    early, late = net(source, first, second, prompt)
    target = target * 2 - 1
    return 0.3 * _difference(early, target) + _difference(late, target)


def _difference(x: Tensor, target: Tensor) -> Tensor:
    error = x - target
    slopes = sum(error.diff(dim=axis).abs().mean((1, 2, 3)) for axis in (2, 3))
    return 10 * error.square().mean((1, 2, 3)) + 0.2 * error.abs().mean((1, 2, 3)) + 0.1 * slopes


def reconstruction_loss(net: Enhancer, clean: Tensor) -> Tensor:
    """The autoencoder by itself, and its latents near zero mean and unit deviation."""
    x = (clean * 2 - 1).contiguous(memory_format=torch.channels_last)
    z = net.vae.encoder(x)
    off = z.mean((0, 2, 3)).square().sum() + (z.std((0, 2, 3)) - 1).square().sum()
    return _difference(net.vae.decoder(z), x).mean() + 1e-3 * off


@torch.no_grad()
def decibels(net: Enhancer, bad: Tensor, target: Tensor, kind: Tensor) -> dict[str, float]:
    """Mean PSNR by kind of damage, before and after, on the last training batch."""
    zero = torch.zeros(len(bad), dtype=torch.long, device=bad.device)
    late = net(bad * 2 - 1, zero + FIRST, zero + LAST, zero)[1].clamp(-1, 1) / 2 + 0.5

    def score(x: Tensor) -> Tensor:
        return -10 * (x - target).square().mean((1, 2, 3)).clamp(min=1e-7).log10()

    before, after = score(bad), score(late)
    names = ("noise", "blur", "clean")
    return {
        f"{name}_{when}": values[kind == i].mean().item()
        for i, name in enumerate(names)
        for when, values in (("in", before), ("out", after))
    }


@torch.no_grad()
def save(net: Enhancer, out: Path) -> None:
    """Save unet, vae and scheduler in fp16, as the production folders have them."""
    if not all_finite(net):
        return
    unet = copy.deepcopy(net.unet)
    unet.conv_out.weight.mul_(GAIN)
    unet.conv_out.bias.mul_(GAIN)
    unet.half().to(memory_format=torch.contiguous_format).save_pretrained(out / "unet")
    vae = copy.deepcopy(net.vae).half().to(memory_format=torch.contiguous_format)
    vae.save_pretrained(out / "vae")
    scheduler().save_pretrained(out / "scheduler")


if __name__ == "__main__":
    main(**options(main))
