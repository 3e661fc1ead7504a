"""Tiny models with random weights, saved in the folder formats of the production ones."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from deployments.images import Picture
from deployments.loader import build
from deployments.pipelines.nets.isnet import ISNet, ISNetWidths
from deployments.pipelines.nets.rrdb import RRDBNet
from deployments.pipelines.nets.srvgg import SRVGGNetCompact
from deployments.registry import ModelSpec
from deployments.settings import Settings
from deployments.store.folder_bucket import local_folder
from deployments.tasks import Task
from starter_models.training.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import DiffusionPipeline, SchedulerMixin
    from torch import nn
    from transformers import CLIPTokenizer

    from deployments.engine.pipeline import AnyPipeline

TEXT_DIM = 16
TIME_DIM = 8
GUIDANCE_DIM = 16
_NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
SCHEDULERS: dict[str, SchedulerMixin] = {
    "sd_ddim": DDIMScheduler(**_NOISE, clip_sample=False),
    "sd_pndm": PNDMScheduler(**_NOISE, skip_prk_steps=True),
    "sd_v": DDIMScheduler(**_NOISE, clip_sample=False, prediction_type="v_prediction"),
    "sd_lcm": LCMScheduler(**_NOISE),
}
"""Stable Diffusion 1.5 by DDIM and as published, Stable Diffusion 2.1, and one that was distilled
with guidance.
"""

STOCK: dict[str, type[DiffusionPipeline]] = {
    "sd_ddim": StableDiffusionImg2ImgPipeline,
    "sd_pndm": StableDiffusionImg2ImgPipeline,
    "sd_v": StableDiffusionImg2ImgPipeline,
    "sd_lcm": StableDiffusionImg2ImgPipeline,
    "refiner": StableDiffusionXLImg2ImgPipeline,
    "x4": StableDiffusionUpscalePipeline,
    "txt_sd": StableDiffusionPipeline,
    "txt_lcm": StableDiffusionPipeline,
    "txt_xl": StableDiffusionXLPipeline,
}
"""The diffusers class of each tiny diffusion model."""

ISNET_PX = 64
FAMILY: dict[str, str] = {
    **dict.fromkeys(("sd_ddim", "sd_pndm", "sd_v", "sd_lcm", "refiner"), "img2img"),
    **dict.fromkeys(("txt_sd", "txt_lcm", "txt_xl"), "text2img"),
    "x4": "upscale_diffusion",
    "isnet": "matting",
    "srvgg": "upscale_gan",
    "rrdb": "upscale_gan",
}
_TASK: dict[str, Task] = {
    "img2img": Task.COMIC,
    "text2img": Task.GENERATE,
    "upscale_diffusion": Task.UPSCALE,
    "upscale_gan": Task.UPSCALE,
    "matting": Task.BACKGROUND,
}


def save(name: str, folder: Path) -> None:
    """Write the tiny model `name`, one of `FAMILY`, to `folder`."""
    torch.manual_seed(0)
    if name in SCHEDULERS:
        _save_sd(folder, SCHEDULERS[name], GUIDANCE_DIM if name == "sd_lcm" else None)
    elif name in ("txt_sd", "txt_lcm"):  # the components are those of image to image
        like = "sd_lcm" if name == "txt_lcm" else "sd_ddim"
        _save_sd(folder, SCHEDULERS[like], GUIDANCE_DIM if name == "txt_lcm" else None)
    elif name == "txt_xl":
        _save_xl(folder)
    elif name == "refiner":
        _save_refiner(folder)
    elif name == "x4":
        _save_x4(folder)
    else:
        _save_network(name, folder)


def spec(name: str, folder: Path, **changes: Any) -> ModelSpec:
    """How a registry would name the tiny model `name`."""
    family = FAMILY[name]
    values: dict[str, Any] = {
        "name": name.replace("_", "-"),
        "task": _TASK[family],
        "family": family,
        "origins": [{"source": f"file://{folder}", "files": ["config.json"]}],
        "summary": "tiny, random weights",
        "licence": "none",
        "commercial": False,
        "buckets": ((64, 64),) if family in ("img2img", "text2img") else (),
        "tile_px": 256 if name == "x4" else 64,
    }
    return ModelSpec.model_validate(values | changes)


def pipeline(spec: ModelSpec, settings: Settings | None = None) -> AnyPipeline:
    """The pipeline of a tiny model, from the folder `spec` was given."""
    folder = local_folder(spec.origins[0].source)
    return build(spec, folder, settings or Settings(device="cpu"))


def picture(
    seed: int, height_px: int = 64, width_px: int = 64, *, with_alpha: bool = False
) -> Picture:
    """A picture of soft random colours, or a transparent one."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height_px, :width_px] / 16
    waves = np.sin(np.stack([a * x + b * y for a, b in rng.uniform(-1, 1, (3, 2))], axis=-1))
    noise = rng.normal(0, 0.1, waves.shape)
    rgb = ((waves + noise).clip(-1, 1) * 127 + 128).astype(np.uint8)
    alpha = rng.integers(0, 256, rgb.shape[:2], np.uint8) if with_alpha else None
    return Picture(rgb, alpha)


@cache
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer(vocabulary=600)


def _text_config(initializer_factor: float = 20.0) -> CLIPTextConfig:
    """Wide enough by default that different prompts are really different."""
    size = len(tokenizer())
    return CLIPTextConfig(
        vocab_size=size,
        hidden_size=TEXT_DIM,
        intermediate_size=2 * TEXT_DIM,
        projection_dim=TEXT_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
        initializer_factor=initializer_factor,
    )


def _vae(widths: tuple[int, ...], **options: Any) -> AutoencoderKL:
    levels = len(widths)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        **options,
    )


def _unet(widths: tuple[int, ...], **options: Any) -> UNet2DConditionModel:
    plain = len(widths) - 1
    return UNet2DConditionModel(
        sample_size=8,
        out_channels=4,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * plain,
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        **{"in_channels": 4, "cross_attention_dim": TEXT_DIM, **options},
    )


def _save_sd(folder: Path, scheduler: SchedulerMixin, guidance_dim: int | None) -> None:
    StableDiffusionImg2ImgPipeline(
        vae=_vae((4, 4, 8, 8)),
        text_encoder=CLIPTextModel(_text_config()),
        tokenizer=tokenizer(),
        unet=_unet((8, 16), time_cond_proj_dim=guidance_dim),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def _save_refiner(folder: Path) -> None:
    """Of the refiner's kind: the second text encoder only, a score, a float32 autoencoder."""
    StableDiffusionXLImg2ImgPipeline(
        vae=_vae((4, 4, 8, 8), force_upcast=True),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=CLIPTextModelWithProjection(_text_config(3.0)),
        tokenizer_2=tokenizer(),
        unet=_unet(
            (8, 16),
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_DIM,
            projection_class_embeddings_input_dim=5 * TIME_DIM + TEXT_DIM,
        ),
        scheduler=DDIMScheduler(**_NOISE, clip_sample=False),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    ).save_pretrained(folder)


def _save_xl(folder: Path) -> None:
    """Of SDXL's kind: both text encoders, and zeros in place of an empty negative prompt."""
    StableDiffusionXLPipeline(
        vae=_vae((4, 4, 8, 8), force_upcast=True),
        text_encoder=CLIPTextModel(_text_config(3.0)),
        tokenizer=tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(3.0)),
        tokenizer_2=tokenizer(),
        unet=_unet(
            (8, 16),
            cross_attention_dim=2 * TEXT_DIM,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_DIM,
            projection_class_embeddings_input_dim=6 * TIME_DIM + TEXT_DIM,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder)


def _save_x4(folder: Path) -> None:
    """Of the x4 upscaler's kind: noise level classes, picture beside latents, three levels."""
    StableDiffusionUpscalePipeline(
        vae=_vae((4, 8, 8), sample_size=256, scaling_factor=0.08333),
        text_encoder=CLIPTextModel(_text_config()),
        tokenizer=tokenizer(),
        unet=_unet((8, 8, 8, 16), in_channels=7, num_class_embeds=1000),
        low_res_scheduler=DDPMScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear"
        ),
        scheduler=DDIMScheduler(
            beta_start=0.0001,
            beta_end=0.02,
            beta_schedule="scaled_linear",
            steps_offset=1,
            set_alpha_to_one=False,
            clip_sample=False,
            prediction_type="v_prediction",
        ),
        watermarker=None,
        max_noise_level=350,
    ).save_pretrained(folder)


def _save_network(name: str, folder: Path) -> None:
    net, config = _network(name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(net.state_dict(), folder / "model.safetensors")


def _network(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name == "srvgg":
        return SRVGGNetCompact(8, 3), {"architecture": "srvgg", "num_feat": 8, "num_conv": 3}
    if name == "rrdb":
        return RRDBNet(num_block=1), {"architecture": "rrdb", "num_block": 1}
    widths = {
        "stem": 4,
        "middle": (2, 2, 2, 4, 4, 4),
        "out": (4, 4, 4, 8, 8, 8),
        "decoder_middle": (4, 4, 2, 2, 2),
        "decoder_out": (8, 8, 4, 4, 4),
    }
    return ISNet(ISNetWidths(**widths)), {
        "architecture": "isnet",
        "input_px": ISNET_PX,
        "widths": widths,
    }
