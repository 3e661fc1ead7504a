"""The shipped starter models as plain functions: picture in, picture out.

Pictures are `H x W x 3`, float32, sRGB in [0, 1]; results are rounded to 8 bits, as a client gets
them.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from PIL import Image
from safetensors.torch import load_file

from deployments.pipelines.nets.isnet import ISNet, ISNetWidths
from deployments.pipelines.nets.srvgg import SRVGGNetCompact
from starter_models.training.data import Picture, stack

ROOT = Path(__file__).parent

SETTINGS: dict[str, dict[str, object]] = {
    "enhance": {
        "prompt": "high quality, sharp, detailed photo",
        "strength": 0.25,
        "num_inference_steps": 16,
    },
    "comic": {"prompt": "comic style", "strength": 0.5, "num_inference_steps": 8},
    "aged": {"prompt": "old photograph", "strength": 0.5, "num_inference_steps": 8},
}


def available(task: str) -> bool:
    """Whether the model of `task` has been trained."""
    file = "model_index.json" if task in SETTINGS else "model.safetensors"
    return (ROOT / task / file).is_file()


@torch.inference_mode()
def run_upscale(picture: Picture) -> Picture:
    """Four times as high and wide."""
    net, _ = _network("upscale")
    output = net(torch.from_numpy(stack([picture])))
    return from_image(to_image(output[0].permute(1, 2, 0).numpy()))


@torch.inference_mode()
def run_background(picture: Picture) -> Picture:
    """The picture with its alpha as a fourth channel: `H x W x 4`."""
    net, side = _network("background")
    x = from_image(to_image(picture).resize((side, side), Image.Resampling.BICUBIC))
    alpha = net(torch.from_numpy(stack([x])) - 0.5)[0].sigmoid()[0, 0].numpy()
    size = (picture.shape[1], picture.shape[0])
    alpha = from_image(to_image(alpha).resize(size, Image.Resampling.BICUBIC))
    return np.dstack([picture, alpha])


def run_enhance(picture: Picture) -> Picture:
    """Without noise and JPEG artefacts. Sides are multiples of 64, here and below."""
    return _run_diffusion("enhance", picture)


def run_comic(picture: Picture) -> Picture:
    """As a comic."""
    return _run_diffusion("comic", picture)


def run_aged(picture: Picture) -> Picture:
    """As an old print."""
    return _run_diffusion("aged", picture)


def to_image(picture: Picture) -> Image.Image:
    """`H x W x 3` or `H x W`, clipped and rounded to 8 bits."""
    return Image.fromarray((np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8))


def from_image(image: Image.Image) -> Picture:
    """The inverse of `to_image`."""
    return np.asarray(image, np.float32) / 255


@lru_cache
def _network(task: str) -> tuple[torch.nn.Module, int]:
    """Our own network of `task`, and the side in px it wants its input at (0: any)."""
    config = json.loads((ROOT / task / "config.json").read_text())
    if config["architecture"] == "srvgg":
        net = SRVGGNetCompact(config["num_feat"], config["num_conv"], config["scale"])
    else:
        net = ISNet(ISNetWidths(**config["widths"]))
    net.load_state_dict(load_file(ROOT / task / "model.safetensors"))
    return net.eval(), config.get("input_px", 0)


@lru_cache
def _diffusion(task: str) -> StableDiffusionImg2ImgPipeline | StableDiffusionXLImg2ImgPipeline:
    kind = StableDiffusionXLImg2ImgPipeline if task == "enhance" else StableDiffusionImg2ImgPipeline
    pipeline = kind.from_pretrained(ROOT / task, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _run_diffusion(task: str, picture: Picture) -> Picture:
    output = _diffusion(task)(
        image=to_image(picture),
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        **SETTINGS[task],
    )
    return from_image(output.images[0])
