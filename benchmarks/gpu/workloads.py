"""The workloads: a model, a size, and the requests it gets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler

from benchmarks.gpu.architectures import (
    ARCHITECTURES,
    build_network,
    build_unet,
    build_vae,
    unet_inputs,
)
from deployments.pipelines.denoiser import Condition

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.engine.row import Pixels

_TINY_PX = {"img2img": 128, "upscale_diffusion": 32, "matting": 64, "upscale_gan": 32}
_TINY_STEPS = 2
_NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
_DDIM = partial(DDIMScheduler, clip_sample=False, set_alpha_to_one=False)


@dataclass(frozen=True, slots=True)
class Request:
    """A request to a diffusion model."""

    steps: int = 1
    strength: float = 1.0
    guidance_scale: float = 1.0
    noise_level: int = 20

    @property
    def skipped(self) -> int:
        """Steps that img2img leaves out, because it starts from a picture."""
        return self.steps - min(int(self.steps * self.strength), self.steps)


@dataclass(frozen=True, slots=True)
class Item:
    """One request of a load, and its seed."""

    request: Request
    seed: int


@dataclass(frozen=True, slots=True)
class Workload:
    """One model at one size.

    Attributes:
        model: a key of `ARCHITECTURES`.
        size_px: edge of the input.
        group: largest group of the engine, as in the registry; the x4 upscaler's is larger here.
        request: of every client of a uniform load.
        mixed: of the clients of a mixed load, in turn; empty for networks without steps.
        scheduler: of diffusers, as the model's repository has it.
        upcast: whether the repository's own autoencoder is cast to float32 and back at each call.
        tuned_by: the workload whose options also count for this one; None tries its own.
        brief: without mixed loads.
    """

    name: str
    model: str
    size_px: int
    group: int
    request: Request = Request()
    mixed: tuple[Request, ...] = ()
    scheduler: Callable[[], Any] | None = None
    upcast: bool = False
    tuned_by: str | None = None
    brief: bool = False

    @property
    def family(self) -> str:
        return ARCHITECTURES[self.model].family

    @property
    def tunes(self) -> str:
        return self.tuned_by or self.name

    def tiny(self) -> Workload:
        def shorten(request: Request) -> Request:
            return replace(request, steps=_TINY_STEPS, strength=1.0)

        return replace(
            self,
            size_px=_TINY_PX[self.family],
            group=2,
            request=shorten(self.request),
            mixed=tuple(shorten(request) for request in self.mixed[3:5]),
        )


def _mix(*values: tuple[Any, ...]) -> tuple[Request, ...]:
    return tuple(Request(*each) for each in values)


_ENHANCE_MIX = _mix(
    *((30, 0.3, 5), (20, 0.4, 5), (40, 0.2, 5), (30, 0.5, 1)),
    *((25, 0.3, 7.5), (30, 0.2, 5), (10, 0.9, 3), (20, 0.6, 1)),
)
_STYLE_MIX = _mix(
    *((30, 0.5, 7.5), (20, 0.6, 7.5), (40, 0.4, 9), (30, 0.7, 1)),
    *((25, 0.5, 5), (30, 0.3, 7.5), (10, 0.9, 3), (20, 0.8, 1)),
)
_UPSCALE_MIX = _mix(
    *((20, 1, 5, 20), (15, 1, 5, 10), (30, 1, 7, 40), (25, 1, 1, 20)),
    *((20, 1, 9, 5), (10, 1, 4, 60), (20, 1, 1, 20), (25, 1, 6, 0)),
)

_enhance = partial(
    Workload,
    model="enhance-sdxl-refiner",
    request=Request(30, 0.3, 5),
    mixed=_ENHANCE_MIX,
    scheduler=partial(EulerDiscreteScheduler, **_NOISE, timestep_spacing="leading"),
    upcast=True,
)
_comic = partial(
    Workload,
    model="comic-ghibli",
    group=4,
    request=Request(30, 0.5, 7),
    mixed=_STYLE_MIX,
    scheduler=partial(PNDMScheduler, **_NOISE, skip_prk_steps=True),
)
_aged = partial(
    Workload,
    model="aged-sd21",
    group=4,
    request=Request(30, 0.5, 7.5),
    mixed=_STYLE_MIX,
    scheduler=partial(_DDIM, **_NOISE, prediction_type="v_prediction"),
    tuned_by="comic-512",
)
_upscale = partial(
    Workload,
    model="upscale-sd-x4",
    request=Request(20, 1, 5, 20),
    mixed=_UPSCALE_MIX,
    scheduler=partial(
        _DDIM,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        steps_offset=1,
        prediction_type="v_prediction",
    ),
    tuned_by="comic-512",
)

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        _enhance(name="enhance-1024", size_px=1024, group=2),
        _comic(name="comic-512", size_px=512),
        _aged(name="aged-768", size_px=768),
        _upscale(name="upscale-128", size_px=128, group=4),
        Workload("background-1024", "background-rmbg14", 1024, group=8),
        Workload("realesrgan-512", "upscale-realesrgan-x4plus", 512, group=4),
        _enhance(name="enhance-768", brief=True, size_px=768, group=2, tuned_by="enhance-1024"),
        _enhance(name="enhance-512", brief=True, size_px=512, group=2, tuned_by="enhance-1024"),
        _comic(name="comic-768", brief=True, size_px=768, tuned_by="comic-512"),
        _upscale(name="upscale-256", brief=True, size_px=256, group=2),
        _comic(name="comic-1024", brief=True, size_px=1024, tuned_by="comic-512"),
        _aged(name="aged-512", brief=True, size_px=512),
        _aged(name="aged-1024", brief=True, size_px=1024),
    )
}
"""In order of importance; limited time cuts off the end."""


@dataclass(slots=True)
class Parts:
    """A workload's networks on the device, and the inputs of its requests.

    Attributes:
        unet, vae: of a diffusion model.
        network: of a model without steps.
        conditions: embeddings of a prompt and of a negative prompt.
        noises: `alphas_cumprod` of the x4 upscaler's own noise.
    """

    workload: Workload
    device: str
    dtype: torch.dtype
    pixels: Pixels
    unet: Any = None
    vae: Any = None
    network: Any = None
    conditions: tuple[Condition, ...] = ()
    noises: tuple[float, ...] = ()

    @property
    def timed(self) -> bool:
        """Whether times matter; a dry run needs no warm-up."""
        return self.device == "cuda"

    def scheduler(self) -> Any:
        assert self.workload.scheduler is not None
        return self.workload.scheduler()


def serving_dtype(device: str) -> torch.dtype:
    """The dtype in which the registry's models are served."""
    return torch.float16 if device == "cuda" else torch.float32


def build(workload: Workload, device: str, *, tiny: bool = False) -> Parts:
    """The workload's networks, always with the same random weights."""
    torch.manual_seed(0)
    dtype = serving_dtype(device)
    where: dict[str, Any] = {"device": device, "dtype": dtype, "tiny": tiny}
    side, name = workload.size_px, workload.model
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    parts = Parts(workload, device, dtype, pixels)
    if ARCHITECTURES[name].unet is None:
        parts.network = build_network(name, **where)
        return parts
    parts.unet, parts.vae = build_unet(name, **where), build_vae(name, **where)
    use_the_range(name, parts.unet, parts.vae)
    parts.conditions = tuple(_condition(parts, aesthetic) for aesthetic in (6.0, 2.5))
    if workload.family == "upscale_diffusion":
        parts.noises = tuple(low_res_scheduler().alphas_cumprod.tolist())
    return parts


def low_res_scheduler() -> Any:
    """The x4 upscaler's scheduler for the noise on its input."""
    return DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear")


@torch.no_grad()
def use_the_range(name: str, unet: Any, vae: Any) -> None:
    """Scale the last layers so that the UNet predicts unit variance, as trained ones do, and
    pictures use the whole range of levels. Nearly grey pictures would all be alike.
    """
    predicted = unet(**random_inputs(name, unet, 1, 32 * ARCHITECTURES[name].latent_px)).sample
    latents = torch.randn(1, vae.config.latent_channels, 8, 8).to(vae.device, vae.dtype)
    _scale(unet.conv_out, 1 / predicted.float().std())
    _scale(vae.decoder.conv_out, 0.4 / vae.decode(latents).sample.float().std())


def _scale(layer: Any, factor: torch.Tensor) -> None:
    layer.weight.mul_(factor)
    layer.bias.zero_()


def random_inputs(name: str, unet: Any, rows: int, size_px: int) -> dict[str, Any]:
    """Random arguments of one pass: on zeros, which draw less power, networks can be faster."""
    inputs = unet_inputs(name, unet, rows, size_px, size_px)
    extra = inputs.get("added_cond_kwargs", {})
    for tensor in (inputs["sample"], inputs["encoder_hidden_states"], extra.get("text_embeds")):
        if tensor is not None:
            tensor.normal_()
    return inputs


def _condition(parts: Parts, aesthetic: float) -> Condition:
    side = parts.workload.size_px
    inputs = random_inputs(parts.workload.model, parts.unet, 1, side)
    if "added_cond_kwargs" not in inputs:
        return Condition(inputs["encoder_hidden_states"])
    pooled = inputs["added_cond_kwargs"]["text_embeds"]
    ids = torch.tensor([(side, side, 0, 0, aesthetic)], device=parts.device, dtype=parts.dtype)
    return Condition(inputs["encoder_hidden_states"], pooled, ids)
