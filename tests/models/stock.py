"""Ours beside the stock diffusers pipelines."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from PIL import Image

from deployments.engine.row import Row, RowInput
from deployments.pipelines.denoiser import Denoiser
from deployments.pipelines.matting import Matting

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from deployments.contract import DiffusionRequest
    from deployments.engine.pipeline import AnyPipeline
    from deployments.images import Picture

SCHEDULERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1}),
    "dpm": (DPMSolverMultistepScheduler, {"steps_offset": 1}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1}),
    "euler_a": (EulerAncestralDiscreteScheduler, {"steps_offset": 1}),
    "lcm": (LCMScheduler, {"steps_offset": 1}),
}
"""Class and options of each scheduler, as the published models have them."""


def with_scheduler(pipeline: Any, scheduler: SchedulerMixin) -> Any:
    """The pipeline, ours or stock, with its own weights and another scheduler."""
    other = copy.copy(pipeline)
    if hasattr(pipeline, "denoiser"):
        other.denoiser = Denoiser(pipeline._stock.unet, scheduler)
    else:
        other.scheduler = scheduler
    return other


def scheduler_like(pipeline: Any, name: str, **options: Any) -> SchedulerMixin:
    """Scheduler `name` of the noise and the prediction that the stock pipeline's model knows."""
    kind, published = SCHEDULERS[name]
    config = pipeline.scheduler.config
    model = ("beta_start", "beta_end", "beta_schedule", "prediction_type")
    return kind(**{key: config[key] for key in model}, **published | options)


def as_row(pipeline: AnyPipeline, request: Any, picture: Picture | None, seed: int = 0) -> Row:
    """A row of a picture, or of none, with the request's seed if it has one."""
    given = getattr(request, "seed", None)
    seed = seed if given is None else given
    return Row(RowInput(request, pipeline.fit(picture, request), seed, time.monotonic() + 120))


def call_stock(pipeline: Any, request: DiffusionRequest, picture: Picture | None) -> np.ndarray:
    """One picture by the stock pipeline, from a PIL image or from a size."""
    wanted = {"strength", "noise_level"} & set(type(request).model_fields)
    if picture is None:
        wanted |= {"width", "height"}
    # Stock takes "" for a text, and None for the text that its model stands for.
    negative = request.negative_prompt or None if picture is None else request.negative_prompt
    return pipeline(
        prompt=request.prompt,
        negative_prompt=negative,
        **({} if picture is None else {"image": Image.fromarray(picture.rgb)}),
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
        **{name: getattr(request, name) for name in wanted},
    ).images[0]


def images_of(pipeline: AnyPipeline, rows: list[Row]) -> list[np.ndarray]:
    """The float images in [0, 1] behind the pixels of finished rows."""
    if isinstance(pipeline, Matting):
        return [row.state.alpha.numpy() for row in rows]
    autoencoder = pipeline.autoencoder
    vae = autoencoder.vae
    vae.use_tiling = autoencoder._tile is not None
    latents = torch.cat([row.state.latents for row in rows])
    with torch.no_grad():
        images = vae.decode(latents / vae.config.scaling_factor).sample
    vae.use_tiling = False
    return list((images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())


def apart(pipeline: AnyPipeline, rows: list[Row], expected: list[np.ndarray]) -> float:
    """The largest difference of float images; holds the 8-bit ones to one level."""
    for row, image in zip(rows, expected, strict=True):
        levels = (image * 255).round().astype(int)
        assert np.abs(row.future.result() - levels).max() <= 1
    found = zip(images_of(pipeline, rows), expected, strict=True)
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in found)
