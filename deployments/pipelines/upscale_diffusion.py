"""4x upscaling with the Stable Diffusion x4 upscaler."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from diffusers import StableDiffusionUpscalePipeline

from deployments.buckets import resize
from deployments.contract import UpscaleRequest
from deployments.images import Picture
from deployments.pipelines import diffusion

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence
    from pathlib import Path

    from deployments.contract import TaskRequest
    from deployments.pipelines.base import Pixels, Row
    from deployments.registry import ModelSpec

SCALE = 4
MULTIPLE = 8
"""The UNet halves its input three times; odd sizes are padded rather than floored."""


class UpscaleDiffusion:
    """One stock call for a group of rows of one size and one set of scalars.

    The autoencoder decodes in tiles, because its attention over a 512 px input would otherwise
    need hundreds of gigabytes.
    """

    def __init__(self, spec: ModelSpec, folder: Path, device: str) -> None:
        self._pipeline = diffusion.load_pipeline(
            StableDiffusionUpscalePipeline,
            spec,
            folder,
            device,
            watermarker=None,
            safety_checker=None,
            feature_extractor=None,
        )
        self._pipeline.vae.enable_tiling()
        if spec.dtype == "float16":
            # The stock call would cast the autoencoder to float32 and back on every request.
            self._pipeline.vae.to(torch.float32)

    def fit(self, picture: Picture, request: TaskRequest) -> Pixels:
        bottom, right = -picture.height_px % MULTIPLE, -picture.width_px % MULTIPLE
        return np.pad(picture.rgb, ((0, bottom), (0, right), (0, 0)), mode="reflect")

    def to(self, device: str) -> None:
        self._pipeline.to(device)

    def key(self, row: Row) -> Hashable:
        request = cast("UpscaleRequest", row.request)
        size = row.pixels.shape[:2]
        return (*size, request.steps, request.guidance_scale, request.noise_level)

    def begin(self, row: Row) -> None:
        """Nothing: the stock call prepares its own latents."""

    def step(self, rows: Sequence[Row]) -> None:
        requests = [cast("UpscaleRequest", row.request) for row in rows]
        with suppress(_Abandoned):
            result = self._pipeline(
                prompt=[r.prompt for r in requests],
                negative_prompt=[r.negative_prompt for r in requests],
                image=diffusion.to_tensor(rows),
                num_inference_steps=requests[0].steps,
                guidance_scale=requests[0].guidance_scale,
                noise_level=requests[0].noise_level,
                generator=diffusion.generators(rows),
                callback=_stop_when_abandoned(rows),
                output_type="np",
            )
            diffusion.set_images(rows, result.images)

    def finish(self, row: Row) -> Pixels:
        return diffusion.to_pixels(row.state)

    def restore(self, output: Pixels, picture: Picture, request: TaskRequest) -> Picture:
        width, height = picture.width_px * SCALE, picture.height_px * SCALE
        alpha = None if picture.alpha is None else resize(picture.alpha, width, height)
        return Picture(np.ascontiguousarray(output[:height, :width]), alpha, picture.notes)


class _Abandoned(Exception):
    """Nobody waits any more."""


def _stop_when_abandoned(rows: Sequence[Row]) -> Any:
    """A step callback that ends the call early; this stock pipeline knows no other way."""

    def callback(_step: int, _t: Any, _latents: Any) -> None:
        if all(row.cancelled for row in rows):
            raise _Abandoned

    return callback
