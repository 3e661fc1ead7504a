"""4x upscaling with the Stable Diffusion x4 upscaler."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from diffusers import StableDiffusionUpscalePipeline

from deployments.contract import UpscaleRequest
from deployments.pipelines.autoencoder import image_tensor
from deployments.pipelines.diffusion import Diffusion, Start
from deployments.pipelines.pictures import as_asked, require_picture
from deployments.pipelines.stock import load_stock

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from deployments.engine.row import Pixels, RowInput
    from deployments.images import Picture
    from deployments.pipelines.lanes import Lanes
    from deployments.pipelines.noise import Noise
    from deployments.registry import ModelSpec

SCALE = 4
MULTIPLE_PX = 8
"""The UNet halves its input three times; other sizes are padded rather than cut."""


class UpscaleDiffusion(Diffusion[UpscaleRequest]):
    """Starts from noise, and shows the network the noisy picture beside it.

    The autoencoder decodes in tiles of the spec's `tile_px`, because its attention over a 512 px
    input would otherwise need hundreds of gigabytes.
    """

    def __init__(self, spec: ModelSpec, folder: Path, lanes: Lanes | None = None) -> None:
        stock = load_stock(
            StableDiffusionUpscalePipeline,
            spec,
            folder,
            watermarker=None,
            safety_checker=None,
            feature_extractor=None,
        )
        super().__init__(stock, spec, lanes, spec.tile_px)
        self._noises = stock.low_res_scheduler.alphas_cumprod.tolist()

    def fit(self, picture: Picture | None, request: UpscaleRequest) -> Pixels:
        picture = require_picture(picture)
        width, height = self._working_size(picture.width_px, picture.height_px)
        bottom, right = height - picture.height_px, width - picture.width_px
        return np.pad(picture.rgb, ((0, bottom), (0, right), (0, 0)), mode="reflect")

    def restore(self, output: Pixels, picture: Picture | None, request: UpscaleRequest) -> Picture:
        picture = require_picture(picture)
        width, height = picture.width_px * SCALE, picture.height_px * SCALE
        content = np.ascontiguousarray(output[:height, :width])
        return as_asked(picture, content, request, SCALE)

    def _working_size(self, width_px: int, height_px: int) -> tuple[int, int]:
        return width_px + -width_px % MULTIPLE_PX, height_px + -height_px % MULTIPLE_PX

    def _steps(self, request: UpscaleRequest) -> int:
        return request.steps

    def _start(self, row: RowInput[UpscaleRequest], noise: Noise) -> Generator[None, None, Start]:
        request, unet = row.request, self._stock.unet
        picture = image_tensor(row.pixels).to(unet.device, unet.dtype)
        # The stock pipeline's order: noise for the picture first, then the latents.
        drawn = noise.draw(picture.shape, unet.dtype, unet.device)
        kept = self._noises[request.noise_level]
        noisy = kept**0.5 * picture + (1 - kept) ** 0.5 * drawn
        shape = (1, self._stock.vae.config.latent_channels, *picture.shape[2:])
        schedule = self.denoiser.schedule(request.steps)
        latents = noise.draw(shape, unet.dtype, unet.device).float()
        yield from ()
        return Start(latents * schedule.first_noise, schedule, noisy, request.noise_level)


PIPELINE = UpscaleDiffusion
