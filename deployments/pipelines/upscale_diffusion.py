"""4x upscaling with the Stable Diffusion x4 upscaler."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from diffusers import StableDiffusionUpscalePipeline
from diffusers.utils.torch_utils import randn_tensor

from deployments.buckets import resize
from deployments.engine.pipeline import Work
from deployments.images import Picture
from deployments.pipelines import diffusion
from deployments.pipelines.autoencoder import Autoencoder, image_tensor
from deployments.pipelines.denoiser import Condition, Denoiser, Denoising, network_px

if TYPE_CHECKING:
    from collections.abc import Generator, Hashable, Sequence
    from pathlib import Path

    from deployments.contract import ImageRequest, UpscaleRequest
    from deployments.engine.row import Pixels, Row
    from deployments.pipelines.lanes import Lanes
    from deployments.registry import ModelSpec

SCALE = 4
MULTIPLE = 8
"""The UNet halves its input three times; odd sizes are padded rather than floored."""


class UpscaleDiffusion:
    """Rows of one size share every UNet pass, whatever their noise level, steps and guidance.

    The autoencoder decodes in tiles of the spec's `tile_px`, because its attention over a 512 px
    input would otherwise need hundreds of gigabytes.
    """

    def __init__(
        self, spec: ModelSpec, folder: Path, device: str, lanes: Lanes | None = None
    ) -> None:
        stock = diffusion.load_pipeline(
            StableDiffusionUpscalePipeline,
            spec,
            folder,
            device,
            watermarker=None,
            safety_checker=None,
            feature_extractor=None,
        )
        self._stock = stock
        self._texts = diffusion.PromptCache(self._encode)
        self.autoencoder = Autoencoder(stock.vae, spec.tile_px)
        self.denoiser = Denoiser(stock.unet, stock.scheduler, lanes)
        self._noises = stock.low_res_scheduler.alphas_cumprod.tolist()

    def fit(self, picture: Picture, request: ImageRequest) -> Pixels:
        bottom, right = -picture.height_px % MULTIPLE, -picture.width_px % MULTIPLE
        return np.pad(picture.rgb, ((0, bottom), (0, right), (0, 0)), mode="reflect")

    def to(self, device: str) -> None:
        self._stock.to(device)
        self._texts.clear()

    def work(self, width_px: int, height_px: int, request: ImageRequest) -> Work:
        diffusion = cast("UpscaleRequest", request)
        pixels = (width_px + -width_px % MULTIPLE) * (height_px + -height_px % MULTIPLE)
        steps = diffusion.steps * self._stock.scheduler.order
        return Work(steps, network_px(pixels, diffusion.guidance_scale), pixels)

    def cost_px(self, row: Row) -> int:
        height, width = row.pixels.shape[:2]
        return network_px(height * width, cast("UpscaleRequest", row.request).guidance_scale)

    @torch.inference_mode()
    def begin(self, row: Row) -> Generator[None, None, None]:
        request = cast("UpscaleRequest", row.request)
        wanted = Condition(self._texts(request.prompt)[0])
        guided = request.guidance_scale > 1
        unwanted = Condition(self._texts(request.negative_prompt)[0]) if guided else None
        yield
        unet = self._stock.unet
        generator = torch.Generator("cpu").manual_seed(row.seed)
        picture = image_tensor(row.pixels).to(unet.device, unet.dtype)
        # The stock pipeline's order: noise for the picture, then the latents.
        noise = randn_tensor(picture.shape, generator, unet.device, unet.dtype)
        kept = self._noises[request.noise_level]
        noisy = kept**0.5 * picture + (1 - kept) ** 0.5 * noise
        shape = (1, self._stock.vae.config.latent_channels, *picture.shape[2:])
        schedule = self.denoiser.schedule(request.steps)
        latents = randn_tensor(shape, generator, unet.device, unet.dtype).float()
        row.state = Denoising(
            latents * schedule.first_noise,
            schedule,
            wanted,
            unwanted,
            request.guidance_scale,
            noisy,
            request.noise_level,
        )
        row.steps_left = schedule.steps

    def key(self, row: Row) -> Hashable:
        return row.pixels.shape[:2]

    def step(self, rows: Sequence[Row]) -> None:
        self.denoiser.step([cast("Denoising", row.state) for row in rows])

    def finish(self, row: Row) -> Generator[None, None, Pixels]:
        return self.autoencoder.decode(cast("Denoising", row.state).latents)

    def _encode(self, text: str) -> tuple[torch.Tensor, None]:
        values = self._stock.encode_prompt(
            text,
            device=self._stock.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return values[0], None

    def restore(self, output: Pixels, picture: Picture, request: ImageRequest) -> Picture:
        width, height = picture.width_px * SCALE, picture.height_px * SCALE
        alpha = None if picture.alpha is None else resize(picture.alpha, width, height)
        return Picture(np.ascontiguousarray(output[:height, :width]), alpha, picture.notes)


PIPELINE = UpscaleDiffusion
