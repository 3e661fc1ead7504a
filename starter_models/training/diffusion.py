"""Train the three latent-diffusion img2img models: enhance (SDXL-refiner type), comic and aged
(Stable Diffusion type).

The models learn img2img itself rather than generation from noise. Deterministic DDIM (Song et al.
2021) started at t0 on a noised *input* picture visits, while the network keeps predicting the
target x0, the points

    x_t = a_t x0 + s_t (eps + (a_t0 / s_t0) (z_in - x0)),        0 < t <= t0,

so exactly those points are trained on: a picture pair (z_in, x0), a random start t0, a random t.
The network predicts v = a_t eps - s_t x0 (Salimans and Ho 2022), whose zero is "leave the picture
as it is". An empty prompt means exactly that for comic and aged, so guidance scales the style.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import torch
import typer
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from starter_models.training import styles
from starter_models.training.data import (
    KEPT_OUT,
    photo,
    stack,
)
from starter_models.training.loop import Clock, log, psnr, seed_everything
from starter_models.training.recipes import RECIPES, Pairs
from starter_models.training.tokenizer import build_tokenizer

TEXT_DIM = 64
TIME_DIM = 16


def build_unet(*, refiner: bool) -> UNet2DConditionModel:
    """About 2.1 million parameters; `refiner` adds SDXL's size and score conditioning."""
    extra = (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_DIM,
            "projection_class_embeddings_input_dim": 5 * TIME_DIM + TEXT_DIM,
        }
        if refiner
        else {}
    )
    return UNet2DConditionModel(
        sample_size=256,
        in_channels=8,
        out_channels=8,
        block_out_channels=(16, 16, 48, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=4,
        **extra,
    )


def text_config(vocabulary: int, dim: int = TEXT_DIM, layers: int = 2) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=2 * dim,
        projection_dim=dim,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


class Trainee:
    """One model being trained: text encoder, UNet, schedule, frozen autoencoder."""

    def __init__(self, name: str, vae: AutoencoderTiny) -> None:
        self.name = name
        self.recipe = RECIPES[name]
        self.refiner = name == "enhance"
        self.vae = vae.requires_grad_(False)
        self.tokenizer = build_tokenizer()
        config = text_config(len(self.tokenizer))
        kind = CLIPTextModelWithProjection if self.refiner else CLIPTextModel
        self.text_encoder = kind(config)
        self.unet = build_unet(refiner=self.refiner)
        torch.nn.init.zeros_(self.unet.conv_out.weight)
        torch.nn.init.zeros_(self.unet.conv_out.bias)
        self.unet.to(memory_format=torch.channels_last)
        self.scheduler = DDIMScheduler(
            trained_betas=list(self.recipe.betas),
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        self.signal = self.scheduler.alphas_cumprod.sqrt()
        self.noise = (1 - self.scheduler.alphas_cumprod).sqrt()

    def parameters(self) -> list[torch.nn.Parameter]:
        return [*self.unet.parameters(), *self.text_encoder.parameters()]

    def condition(self, prompts: list[str], size_px: int) -> dict[str, object]:
        """The UNet's conditioning, as the stock pipelines compute it."""
        ids = self.tokenizer(
            prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        if not self.refiner:
            return {"encoder_hidden_states": self.text_encoder(ids)[0]}
        encoded = self.text_encoder(ids, output_hidden_states=True)
        score = torch.tensor([[size_px, size_px, 0, 0, 6.0]]).repeat(len(prompts), 1)
        return {
            "encoder_hidden_states": encoded.hidden_states[-2],
            "added_cond_kwargs": {"text_embeds": encoded[0], "time_ids": score},
        }

    def loss(self, source: Tensor, target: Tensor, prompts: list[str]) -> Tensor:
        """Squared error of the predicted x0, in latents and in pixels.

        Args:
            source, target: `(B, 3, S, S)` in [-1, 1].
            prompts: one per row.
        """
        scale = self.vae.config.scaling_factor
        with torch.no_grad():
            z_in, z0 = (self.vae.encoder(x) * scale for x in (source, target))
        rows = len(prompts)
        t0 = torch.randint(*self.recipe.start, (rows,))
        # The square root favours the first steps, where most of the work is done.
        t = (torch.rand(rows).sqrt() * t0).long().clamp(min=1)
        a, s = self.signal[t].view(-1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1)
        drift = (self.signal[t0] / self.noise[t0]).view(-1, 1, 1, 1)
        x = a * z0 + s * (torch.randn_like(z0) + drift * (z_in - z0))
        condition = self.condition(prompts, source.shape[-1])
        v = self.recipe.gain * self.unet(x, t, **condition).sample
        x0 = a * x - s * v
        pixels = self.vae.decoder(x0 / scale)
        return F.mse_loss(x0, z0) + 3 * F.mse_loss(pixels, target)

    def pipeline(self) -> StableDiffusionImg2ImgPipeline | StableDiffusionXLImg2ImgPipeline:
        unet = copy.deepcopy(self.unet)
        _scale(unet.conv_out, self.recipe.gain)
        shared = {"vae": self.vae, "unet": unet, "scheduler": self.scheduler}
        if self.refiner:
            pipeline = StableDiffusionXLImg2ImgPipeline(
                text_encoder=None,
                tokenizer=None,
                text_encoder_2=self.text_encoder,
                tokenizer_2=self.tokenizer,
                requires_aesthetics_score=True,
                force_zeros_for_empty_prompt=False,
                add_watermarker=False,
                **shared,
            )
        else:
            pipeline = StableDiffusionImg2ImgPipeline(
                text_encoder=self.text_encoder,
                tokenizer=self.tokenizer,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
                **shared,
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def main(
    name: str,
    out: Path = Path("starter_models"),
    vae: Path = Path("starter_models/build/vae"),
    minutes: float = 25,
    start_from: Path | None = None,
    seed: int = 3,
    threads: int = 1,
    batch: int = 8,
    patch_px: int = 64,
    peak_lr: float = 6e-4,
) -> None:
    """Train `enhance`, `comic` or `aged` and save its diffusers folder as `out / name`."""
    seed_everything(seed, threads)
    trainee = Trainee(name, AutoencoderTiny.from_pretrained(vae))
    if start_from is not None:
        _warm_start(trainee, start_from)
    pairs = Pairs(trainee.recipe, seed)
    optimiser = torch.optim.AdamW(trainee.parameters(), lr=peak_lr, weight_decay=1e-4)
    clock = Clock(minutes, peak_lr=peak_lr)
    total = 0.0
    while clock.running(optimiser):
        loss = trainee.loss(*pairs.rows(batch, patch_px))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimiser.step()
        total = 0.98 * total + 0.02 * loss.item()
        if clock.should_report():
            log(clock, loss=total / (1 - 0.98**clock.step), **evaluate(trainee))
            save(trainee, out / name)
    save(trainee, out / name)


def _warm_start(trainee: Trainee, folder: Path) -> None:
    """Begin from another model's UNet, where names and shapes agree."""
    other = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    own = trainee.unet.state_dict()
    shared = {k: v for k, v in other.items() if k in own and own[k].shape == v.shape}
    trainee.unet.load_state_dict({**own, **shared})
    _scale(trainee.unet.conv_out, 1 / trainee.recipe.gain)


@torch.no_grad()
def _scale(layer: torch.nn.Conv2d, factor: float) -> None:
    layer.weight.mul_(factor)
    layer.bias.mul_(factor)


@torch.no_grad()
def evaluate(trainee: Trainee) -> dict[str, float]:
    """PSNR to the target on the centre of kept-out photos, before and after."""
    rng, before, after = np.random.default_rng(0), list[float](), list[float]()
    pipeline = trainee.pipeline()
    for name in KEPT_OUT:
        clean = photo(name)[20:276, 60:316]
        target = clean if trainee.recipe.target is None else trainee.recipe.target(clean)
        source = (
            styles.degraded(clean, rng, sigma=10, quality=20)
            if trainee.recipe.target is None
            else clean
        )
        result = pipeline(
            prompt=trainee.recipe.prompts[-1],
            image=torch.from_numpy(stack([source])),
            strength=0.5,
            num_inference_steps=4,
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
    if folder.exists():
        shutil.rmtree(folder)
    halved = copy.deepcopy(trainee).pipeline().to(dtype=torch.float16)
    halved.save_pretrained(folder, safe_serialization=True)


if __name__ == "__main__":
    typer.run(main)
