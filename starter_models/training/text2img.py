"""Train the text-to-image starter model, in four steps that each save what they made:

1. `autoencoder`: pictures of the toy world to latents of an eighth of the size, and back;
2. `scenes`: latents of many scenes, drawn once;
3. `words`: the text encoder (see `text_encoder`);
4. `unet`: the UNet, which goes on from the committed one unless it is told to start `--fresh`, as
   it must after the first.

Without the first and the third, the committed autoencoder and text encoder are used.

The UNet predicts v = a_t eps - s_t x0 (Salimans and Ho 2022) on a cosine schedule (Nichol and
Dhariwal 2021) moved towards noise, because flat areas of colour show through much of it
(Hoogeboom et al. 2023).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import typer
from diffusers import (
    AutoencoderTiny,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from starter_models.training import text_encoder, toy_drawing, toy_world
from starter_models.training.average import Average, all_finite
from starter_models.training.loop import Clock, log, psnr, seed_everything

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

FACTOR = 8
LATENT_CHANNELS = 8
PATCH_PX = 96
CHANNELS = 32
# Moves the log of the signal-to-noise ratio down by 2 log 2.
NOISE_SHIFT = 2.0
NO_PROMPT_SHARE = 0.1

BUILD = Path("starter_models/build/text2img")
OUT = Path("starter_models/generate")
app = typer.Typer()
Minutes = Annotated[float, typer.Option(help="how long to train")]


def build_autoencoder() -> AutoencoderTiny:
    """About 340 thousand parameters, which begin with three latents that are the mean colours.

    From random weights the tint of pale areas takes thousands of steps to learn.
    """
    vae = AutoencoderTiny(
        encoder_block_out_channels=(CHANNELS,) * 4,
        decoder_block_out_channels=(CHANNELS,) * 4,
        num_encoder_blocks=(0, 1, 1, 2),
        num_decoder_blocks=(2, 2, 1, 1),
        latent_channels=LATENT_CHANNELS,
    )
    _pass_colours(vae)
    return vae


@torch.no_grad()
def _pass_colours(vae: AutoencoderTiny) -> None:
    """Let the first three channels of every layer carry red, green and blue."""
    for block in vae.modules():
        if isinstance(block, AutoencoderTinyBlock):
            block.conv[-1].weight[:3] = 0
            block.conv[-1].bias[:3] = 0
    inward = [layer for layer in vae.encoder.layers if isinstance(layer, torch.nn.Conv2d)]
    outward = [layer for layer in vae.decoder.layers if isinstance(layer, torch.nn.Conv2d)]
    for layer in inward + outward:
        layer.weight[:3] = 0
        if layer.bias is not None:
            layer.bias[:3] = 0
        for colour in range(3):
            if layer.stride == (2, 2):
                layer.weight[colour, colour, 1:, 1:] = 0.25
            else:
                layer.weight[colour, colour, 1, 1] = 1
    # Colours of 0 to 1 are latents of -1 to 1.
    inward[-1].weight[:3] *= 2
    inward[-1].bias[:3] = -1
    outward[0].weight[:3] *= 0.5
    outward[0].bias[:3] = 0.5


def build_unet() -> UNet2DConditionModel:
    """About 4.9 million parameters.

    What the text says comes by cross-attention and, pooled, is added to the time, which every block
    sees: blocks of the finest level have no cross-attention.
    """
    return UNet2DConditionModel(
        sample_size=toy_drawing.SIZE_PX // FACTOR,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96, 112),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=text_encoder.TEXT_DIM,
        attention_head_dim=4,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def build_scheduler() -> EulerAncestralDiscreteScheduler:
    """1000 steps whose last is all but pure noise; sampling starts there.

    It draws noise at each step: without, outlines follow that of the start rather than the prompt.
    """
    at = np.linspace(0, 1, 1001) * 0.994
    kept = 1 / (1 + (NOISE_SHIFT * np.tan(np.pi / 2 * at)) ** 2)
    betas = np.clip(1 - kept[1:] / kept[:-1], 0, 0.999)
    return EulerAncestralDiscreteScheduler(
        trained_betas=[float(f"{beta:.4g}") for beta in betas],
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


@app.command()
def autoencoder(
    minutes: Minutes = 20,
    seed: int = 1,
    threads: int = 2,
    batch: int = 12,
    peak_lr: float = 2e-3,
    keep_latents: Annotated[
        bool, typer.Option("--keep-latents", help="train the decoder alone, for the same UNet")
    ] = False,
) -> None:
    """Train the autoencoder on patches of scenes, from that of an earlier run if there is one."""
    seed_everything(seed, threads)
    rng = np.random.default_rng(seed)
    pool = np.stack([_picture(toy_world.training_scene(rng), rng) for _ in range(2000)])
    folder = BUILD / "vae"
    vae = _autoencoder() if keep_latents or folder.exists() else build_autoencoder()
    vae.to(memory_format=torch.channels_last)
    vae.encoder.requires_grad_(not keep_latents)
    optimiser = torch.optim.AdamW(
        vae.parameters(), lr=peak_lr, weight_decay=1e-4, betas=(0.9, 0.98)
    )
    clock = Clock(minutes, peak_lr=peak_lr)
    while clock.running(optimiser):
        rows = rng.integers(16, len(pool), batch)
        top, left = rng.integers(0, (toy_drawing.SIZE_PX - PATCH_PX) // FACTOR + 1, 2) * FACTOR
        x = _tensor(pool[rows, top : top + PATCH_PX, left : left + PATCH_PX])
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encoder(x)
            y = vae.decoder(z + 0.03 * torch.randn_like(z))
        z, y = z.float(), y.float()
        off_unit = z.mean((0, 2, 3)).square() + (z.std((0, 2, 3)) - 1).square()
        # Errors that fill an area: a pale background of the wrong tint is small, and seen first.
        tint = F.mse_loss(F.avg_pool2d(y, 8), F.avg_pool2d(x, 8))
        loss = F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 4 * tint + 1e-3 * off_unit.sum()
        _step([optimiser], loss, vae, 0.5)
        if clock.should_report():
            log(clock, loss=loss.item(), z_std=z.std().item(), psnr=_rebuilt(vae, pool[:16]))
            vae.save_pretrained(folder)
    vae.save_pretrained(folder)


@torch.no_grad()
def _rebuilt(vae: AutoencoderTiny, pictures: np.ndarray) -> float:
    x = _tensor(pictures)
    y = vae.decoder(vae.encoder(x)).clamp(-1, 1)
    return float(np.mean([psnr(a, b, span=2.0) for a, b in zip(x, y, strict=True)]))


@app.command()
def words(minutes: Minutes = 8, seed: int = 2, threads: int = 2, batch: int = 64) -> None:
    """Train the text encoder to draft the scenes, from the start."""
    seed_everything(seed, threads)
    rng = np.random.default_rng(seed)
    kept = torch.load(BUILD / "scenes.pt")
    tokens = text_encoder.tokenizer()
    encoder = text_encoder.build(len(tokens))
    draft = text_encoder.Draft(LATENT_CHANNELS, toy_drawing.SIZE_PX // FACTOR)
    both = torch.nn.ModuleList([encoder, draft])
    optimisers = _muon_and_adamw(both, lr=2.5e-3)
    unseen = toy_world.kept_out_scenes(rng, 64)
    unseen_latents = _latents(_autoencoder(), unseen, rng)
    unseen_ids = text_encoder.token_ids(tokens, [scene.prompt for scene in unseen])

    def error(ids: Tensor, latents: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            drafted = draft(encoder(ids[:, : text_encoder.DRAFT_TOKENS])[0])
        return F.mse_loss(drafted.float(), latents.float())

    ids = text_encoder.token_ids(tokens, kept["prompts"])
    clock = Clock(minutes, peak_lr=2.5e-3, every_s=20)
    # A list, so that each of them gets its learning rate.
    while all([clock.running(optimiser) for optimiser in optimisers]):
        rows = torch.randint(len(ids), (batch,))
        loss = error(ids[rows], kept["latents"][rows])
        _step(optimisers, loss, both, 1.0)
        if clock.should_report():
            with torch.no_grad():
                of_unseen = error(unseen_ids, unseen_latents)
            log(clock, loss=loss.item(), unseen=of_unseen.item())
    encoder.save_pretrained(BUILD / "text_encoder")
    tokens.save_pretrained(BUILD / "tokenizer")


def _muon_and_adamw(net: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices, AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, values in net.named_parameters():
        is_matrix = name.endswith("weight") and values.ndim == 2 and "embedding" not in name
        (matrices if is_matrix else rest).append(values)
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=1e-3, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, weight_decay=1e-3, betas=(0.9, 0.98)),
    ]


@app.command()
def scenes(count: int = 16000, seed: int = 3, threads: int = 2) -> None:
    """Draw scenes and keep their latents, so that the UNet's steps need not."""
    seed_everything(seed, threads)
    rng = np.random.default_rng(seed)
    vae = _autoencoder().to(memory_format=torch.channels_last)
    latents: list[Tensor] = []
    prompts: list[str] = []
    for first in range(0, count, 32):
        drawn = [toy_world.training_scene(rng) for _ in range(min(32, count - first))]
        latents.append(_latents(vae, drawn, rng))
        prompts += [scene.prompt for scene in drawn]
    torch.save({"latents": torch.cat(latents), "prompts": prompts}, BUILD / "scenes.pt")


def _latents(
    vae: AutoencoderTiny, scenes: Sequence[toy_world.Scene], rng: np.random.Generator
) -> Tensor:
    """`B x LATENT_CHANNELS x 32 x 32`, float16."""
    pictures = _tensor(np.stack([_picture(scene, rng) for scene in scenes]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return vae.encoder(pictures).half()


@app.command()
def unet(
    minutes: Minutes = 60,
    seed: int = 4,
    threads: int = 2,
    batch: int = 16,
    peak_lr: float = 1e-3,
    out: Path = OUT,
    fresh: Annotated[bool, typer.Option("--fresh", help="not from the weights in out")] = False,
) -> None:
    """Train the UNet, and save the whole model in `out`."""
    seed_everything(seed, threads)
    kept = torch.load(BUILD / "scenes.pt")
    states, prompt_of = _encoded(kept["prompts"])
    nothing = states[-1]
    latents, schedule = kept["latents"], build_scheduler()
    net = build_unet() if fresh else UNet2DConditionModel.from_pretrained(out / "unet").float()
    net.to(memory_format=torch.channels_last)
    # The backward pass of the usual one is slow on a CPU. Do not compile the network: torch 2.13
    # then gives gradients of zero to many of its layers, which do not learn.
    net.set_attn_processor(AttnProcessor())
    average = Average(net, 0.999)
    optimiser = torch.optim.AdamW(net.parameters(), lr=peak_lr, weight_decay=1e-3)
    clock, total = Clock(minutes, peak_lr=peak_lr), 0.0
    while clock.running(optimiser):
        rows = torch.randint(len(latents), (batch,))
        told = states[prompt_of[rows]]
        told[torch.rand(batch) < NO_PROMPT_SHARE] = nothing
        loss = _denoising_loss(net, schedule, latents[rows].float(), told)
        _step([optimiser], loss, net, 1.0)
        average.update(net)
        total = 0.98 * total + 0.02 * loss.item()
        if clock.should_report():
            log(clock, loss=total / (1 - 0.98**clock.step))
            save(average.module, out)
    save(average.module, out)


def _autoencoder() -> AutoencoderTiny:
    return AutoencoderTiny.from_pretrained(_latest("vae")).float()


def _text_encoder() -> tuple[CLIPTokenizer, CLIPTextModel]:
    encoder = CLIPTextModel.from_pretrained(_latest("text_encoder")).float()
    return CLIPTokenizer.from_pretrained(_latest("tokenizer")), encoder


def _latest(part: str) -> Path:
    """A part that was just trained, or else the committed one."""
    trained = BUILD / part
    return trained if trained.exists() else OUT / part


def _encoded(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The states of every prompt that occurs, those of the empty one last, and which is whose."""
    tokens, encoder = _text_encoder()
    texts = [*dict.fromkeys(prompts), ""]
    places = {text: k for k, text in enumerate(texts)}
    with torch.no_grad():
        parts = [
            encoder(text_encoder.token_ids(tokens, texts[first : first + 256]))[0]
            for first in range(0, len(texts), 256)
        ]
    return torch.cat(parts), torch.tensor([places[text] for text in prompts])


def _denoising_loss(
    net: nn.Module, schedule: EulerAncestralDiscreteScheduler, x0: Tensor, told: Tensor
) -> Tensor:
    rows = len(x0)
    # One time from each part of the schedule, so that every step sees all noise levels. The parts
    # are narrower towards noise, where an outline must follow the prompt and not the noise.
    share = (torch.arange(rows) + torch.rand(rows)) / rows
    t = (share.sqrt() * 1000).long().clamp(max=999)
    kept = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    a, s = kept.sqrt(), (1 - kept).sqrt()
    noise = torch.randn_like(x0)
    x = (a * x0 + s * noise).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        v = net(x, t, told).sample
    return F.mse_loss(v.float(), a * noise - s * x0)


def _step(
    optimisers: Sequence[torch.optim.Optimizer], loss: Tensor, net: nn.Module, largest_norm: float
) -> None:
    net.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), largest_norm)
    for optimiser in optimisers:
        optimiser.step()


def _picture(scene: toy_world.Scene, rng: np.random.Generator) -> np.ndarray:
    return toy_drawing.draw(scene, rng)


def _tensor(pictures: np.ndarray) -> Tensor:
    """`B x H x W x 3` uint8 as `B x 3 x H x W` in [-1, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
    return (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def save(net: UNet2DConditionModel, folder: Path) -> None:
    """Save fp16 safetensors in the format of Stable Diffusion; a broken run saves nothing."""
    if not all_finite(net):
        raise ValueError("The weights are not finite: lower --peak-lr.")
    tokens, encoder = _text_encoder()
    pipeline = StableDiffusionPipeline(
        vae=_autoencoder(),
        text_encoder=encoder,
        tokenizer=tokens,
        unet=copy.deepcopy(net),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    for config in folder.glob("*/config.json"):
        # Where its weights were read from says nothing on another machine.
        values = json.loads(config.read_text(encoding="utf-8"))
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
