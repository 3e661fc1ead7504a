"""Train comic and aged, the latent-diffusion img2img models of the Stable Diffusion type.

The models learn img2img itself rather than generation from noise: the whole way of a request, end
to end. It encodes the picture, adds noise up to the first of its steps, and takes the steps of
deterministic DDIM (Song et al. 2021). The network predicts v = a eps - s x0 (Salimans and Ho 2022),
whose zero is "leave the picture as it is". An empty prompt means exactly that, so guidance scales
the style. The last picture still has the noise of the schedule's first step in it.

This program goes on from the committed weights and needs `starter_models.training.collections`.
"""

from __future__ import annotations

import copy
import itertools
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import typer
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from starter_models.training import styles
from starter_models.training.average import Average, all_finite
from starter_models.training.bank import COLLECTIONS
from starter_models.training.data import KEPT_OUT, photo, stack
from starter_models.training.loop import Clock, log, minutes_left, psnr, seed_everything
from starter_models.training.recipes import RECIPES, Pairs

SHAPES = ((64, 8), (128, 3), (256, 1))
"""Pixels and rows of a batch. A network that has only seen small patches, of which the frame is a
large part, draws a strip along the frame of larger pictures.
"""


class Finished(NamedTuple):
    """The picture in [-1, 1], the latents that each pass predicted, and the noise of the last."""

    pixels: Tensor
    latents: list[Tensor]
    noise: Tensor


class Trainee:
    """One model being trained: its UNet, and its decoder unless the recipe has grain.

    Args:
        name: its recipe.
        folder: of its diffusers files, to begin from.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.recipe = RECIPES[name]
        self.vae = AutoencoderTiny.from_pretrained(folder / "vae").float().requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").float()
        self.text_encoder.requires_grad_(False)
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").float()
        _scale(self.unet.conv_out, 1 / self.recipe.gain)
        self.unet.to(memory_format=torch.channels_last)
        self.vae.decoder.requires_grad_(not self.recipe.grain)
        self.scheduler = DDIMScheduler(
            trained_betas=list(self.recipe.betas),
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        self.signal = self.scheduler.alphas_cumprod.sqrt()
        self.noise = (1 - self.scheduler.alphas_cumprod).sqrt()

    @property
    def trained(self) -> torch.nn.ModuleList:
        return torch.nn.ModuleList([self.unet, self.vae.decoder])

    def averaged(self, average: Average) -> Trainee:
        """A copy with the mean of the weights."""
        other = copy.copy(self)
        other.vae = copy.deepcopy(self.vae)
        other.unet, other.vae.decoder = average.module
        return other

    def states(self, prompts: list[str]) -> Tensor:
        """The text encoder's, as the stock pipeline computes them."""
        ids = self.tokenizer(
            prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        return self.text_encoder(ids)[0]

    def loss(self, source: Tensor, target: Tensor, prompts: list[str]) -> Tensor:
        """Error of the finished picture and of its slopes, and of the latents on the way.

        Args:
            source, target: `(B, 3, S, S)` in [-1, 1].
            prompts: one per row.
        """
        times, z0 = self._times(), self._latents(target)
        noise = torch.randn_like(z0)
        made = self.finished(source, prompts, times, noise)
        if self.recipe.grain:
            styled = torch.tensor([[[[float(bool(p))]]] for p in prompts])
            target = target + styled * self._grain(z0, made.noise)
        off = sum(F.mse_loss(latents, z0) for latents in made.latents) / len(times)
        error = made.pixels - target
        slopes = sum(error.diff(dim=axis).abs().mean() for axis in (2, 3))
        return 0.3 * off + 3 * error.square().mean() + 0.3 * error.abs().mean() + 0.5 * slopes

    def finished(
        self, source: Tensor, prompts: list[str], times: list[int], noise: Tensor
    ) -> Finished:
        """What a request makes of `source` at those timesteps, from that noise."""
        states, latents = self.states(prompts), list[Tensor]()
        x = self.signal[times[0]] * self._latents(source) + self.noise[times[0]] * noise
        for t, after in itertools.pairwise([*times, 0]):
            a, s = self.signal[t], self.noise[t]
            v = self.recipe.gain * self.unet(x, t, states).sample
            clean, noise = a * x - s * v, s * x + a * v
            x = self.signal[after] * clean + self.noise[after] * noise
            latents.append(clean)
        pixels = self.vae.decoder(x / self.vae.config.scaling_factor)
        return Finished(pixels, latents, noise.detach())

    def _times(self) -> list[int]:
        """Mostly those of the default request, else up to four of 2 to 8 steps."""
        if torch.rand(()) < 0.6:
            return self.times(self.recipe.steps, self.recipe.passes)
        steps = int(torch.randint(2, 9, ()))
        return self.times(steps, int(torch.randint(1, min(steps, 4) + 1, ())))

    @staticmethod
    def times(steps: int, passes: int) -> list[int]:
        """The last `passes` timesteps of a request of `steps`."""
        return [step * (1000 // steps) + 1 for step in reversed(range(passes))]

    @torch.no_grad()
    def _latents(self, picture: Tensor) -> Tensor:
        return self.vae.encoder(picture) * self.vae.config.scaling_factor

    @torch.no_grad()
    def _grain(self, z0: Tensor, noise: Tensor) -> Tensor:
        """What the first step's noise adds to a picture, without its colours and its blotches."""
        scale = self.vae.config.scaling_factor
        clean = self.signal[0] * z0
        added = self.vae.decoder((clean + self.noise[0] * noise) / scale)
        added -= self.vae.decoder(clean / scale)
        luma = (added * torch.from_numpy(styles.LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
        fine = luma - F.avg_pool2d(F.pad(luma, (2, 2, 2, 2), mode="reflect"), 5, 1)
        tones = torch.from_numpy(styles.PAPER - styles.BLACK).view(1, 3, 1, 1)
        return self.recipe.grain * fine * tones

    def pipeline(self) -> StableDiffusionImg2ImgPipeline:
        unet = copy.deepcopy(self.unet)
        _scale(unet.conv_out, self.recipe.gain)
        pipeline = StableDiffusionImg2ImgPipeline(
            vae=self.vae,
            unet=unet,
            scheduler=self.scheduler,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def main(
    name: str,
    out: Path = Path("starter_models"),
    start: Path = Path("starter_models"),
    collections: Path = COLLECTIONS,
    minutes: float = 40,
    until: float = 0.0,
    seed: int = 3,
    threads: int = 2,
    peak_lr: float = 4e-4,
) -> None:
    """Go on training `comic` or `aged` from `start / name`; save its folder as `out / name`."""
    seed_everything(seed, threads)
    trainee = Trainee(name, start / name)
    pairs = Pairs(trainee.recipe, collections, seed)
    average = Average(trainee.trained)
    parameters = [p for p in trainee.trained.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=1e-4)
    clock = Clock(minutes_left(minutes, until), peak_lr=peak_lr)
    total = torch.zeros(())
    while clock.running(optimiser):
        patch_px, rows = SHAPES[int(torch.randint(len(SHAPES), ()))]
        loss = trainee.loss(*pairs.rows(rows, patch_px))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        average.update(trainee.trained)
        total = total.lerp(loss.detach(), 0.02)
        if clock.should_report():
            finished = trainee.averaged(average)
            log(clock, loss=total.item() / (1 - 0.98**clock.step), **evaluate(finished))
            save(finished, out / name)
    save(trainee.averaged(average), out / name)


@torch.no_grad()
def _scale(layer: torch.nn.Conv2d, factor: float) -> None:
    layer.weight.mul_(factor)
    layer.bias.mul_(factor)


@torch.no_grad()
def evaluate(trainee: Trainee) -> dict[str, float]:
    """PSNR to the target on the centre of kept-out photos, before and after."""
    before, after = list[float](), list[float]()
    pipeline = trainee.pipeline()
    for name in KEPT_OUT:
        source = photo(name)[20:276, 60:316]
        target = trainee.recipe.target(source)
        result = pipeline(
            prompt=trainee.recipe.prompts[-1],
            image=torch.from_numpy(stack([source])),
            strength=trainee.recipe.passes / trainee.recipe.steps,
            num_inference_steps=trainee.recipe.steps,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images[0]
        before.append(psnr(torch.from_numpy(source), torch.from_numpy(target)))
        after.append(psnr(torch.from_numpy(result), torch.from_numpy(target)))
    names = [n.split(":")[1].split(".")[0] for n in KEPT_OUT]
    return {f"{n}_{k}": v for k, vs in (("in", before), ("out", after))
            for n, v in zip(names, vs, strict=True)}  # fmt: skip


def save(trainee: Trainee, folder: Path) -> None:
    """Save fp16 safetensors, as the production folders have them."""
    if not all_finite(trainee.trained):
        return
    halved = copy.deepcopy(trainee).pipeline().to(dtype=torch.float16)
    # Whole before it takes the place of the last one: training goes on from it.
    new = folder.with_name(f"{folder.name}.new")
    halved.save_pretrained(new, safe_serialization=True)
    if folder.exists():
        shutil.rmtree(folder)
    new.rename(folder)


if __name__ == "__main__":
    typer.run(main)
