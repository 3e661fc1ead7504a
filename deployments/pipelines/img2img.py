"""Image to image with Stable Diffusion 1.x and 2.x, and with the SDXL refiner."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from diffusers.utils.torch_utils import randn_tensor

from deployments.buckets import choose_bucket, fit_to_bucket, resize, restore_from_bucket
from deployments.contract import Img2ImgRequest
from deployments.engine.pipeline import Work
from deployments.images import Picture
from deployments.pipelines import diffusion
from deployments.pipelines.autoencoder import Autoencoder
from deployments.pipelines.denoiser import Condition, Denoiser, Denoising, network_px

if TYPE_CHECKING:
    from collections.abc import Generator, Hashable, Sequence
    from pathlib import Path

    from deployments.contract import ImageRequest
    from deployments.engine.row import Pixels, Row
    from deployments.pipelines.lanes import Lanes
    from deployments.registry import ModelSpec


_AESTHETIC, _UNWANTED_AESTHETIC = 6.0, 2.5
"""Scores the refiner was trained with, as the stock pipeline sends them."""


class Img2Img:
    """Rows of one bucket share every UNet pass, whatever their strength, steps and guidance.

    No safety checker runs. Working sizes are the spec's buckets; the result has the input's size.
    """

    def __init__(
        self, spec: ModelSpec, folder: Path, device: str, lanes: Lanes | None = None
    ) -> None:
        self._buckets = spec.buckets
        self._is_xl = "XL" in diffusion.read_index(spec, folder)["_class_name"]
        if self._is_xl:
            stock = diffusion.load_pipeline(
                StableDiffusionXLImg2ImgPipeline, spec, folder, device, add_watermarker=False
            )
        else:
            stock = diffusion.load_pipeline(
                StableDiffusionImg2ImgPipeline,
                spec,
                folder,
                device,
                **diffusion.NO_SAFETY_CHECKER,
            )
        self._stock = stock
        self._texts = diffusion.PromptCache(self._encode)
        self.autoencoder = Autoencoder(stock.vae)
        self.denoiser = Denoiser(stock.unet, stock.scheduler, lanes)

    def fit(self, picture: Picture, request: ImageRequest) -> Pixels:
        bucket = choose_bucket(picture.width_px, picture.height_px, self._buckets)
        return fit_to_bucket(picture.rgb, bucket)

    def to(self, device: str) -> None:
        self._stock.to(device)
        self._texts.clear()

    def work(self, width_px: int, height_px: int, request: ImageRequest) -> Work:
        img2img = cast("Img2ImgRequest", request)
        bucket_width_px, bucket_height_px = choose_bucket(width_px, height_px, self._buckets)
        pixels = bucket_width_px * bucket_height_px
        steps = int(img2img.steps * img2img.strength) * self._stock.scheduler.order
        return Work(max(steps, 1), network_px(pixels, img2img.guidance_scale), pixels)

    def cost_px(self, row: Row) -> int:
        height, width = row.pixels.shape[:2]
        return network_px(height * width, cast("Img2ImgRequest", row.request).guidance_scale)

    @torch.inference_mode()
    def begin(self, row: Row) -> Generator[None, None, None]:
        request = cast("Img2ImgRequest", row.request)
        wanted = self._condition(request.prompt, row.pixels, _AESTHETIC)
        unwanted = None
        if request.guidance_scale > 1:
            unwanted = self._condition(request.negative_prompt, row.pixels, _UNWANTED_AESTHETIC)
        yield
        # The stock pipeline's order: the autoencoder draws first, then the noise.
        generator = torch.Generator("cpu").manual_seed(row.seed)
        clean = self.autoencoder.encode(row.pixels, generator)
        yield
        noise = randn_tensor(clean.shape, generator, clean.device, self._stock.unet.dtype)
        run = min(int(request.steps * request.strength), request.steps)
        schedule = self.denoiser.schedule(request.steps, request.steps - run)
        latents = clean.float() * schedule.image + noise.float() * schedule.noise
        row.state = Denoising(latents, schedule, wanted, unwanted, request.guidance_scale)
        row.steps_left = schedule.steps

    def key(self, row: Row) -> Hashable:
        return row.pixels.shape[:2]

    def step(self, rows: Sequence[Row]) -> None:
        self.denoiser.step([cast("Denoising", row.state) for row in rows])

    def finish(self, row: Row) -> Generator[None, None, Pixels]:
        return self.autoencoder.decode(cast("Denoising", row.state).latents)

    def _encode(self, text: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        values = self._stock.encode_prompt(
            text,
            device=self._stock.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return values[0], values[2] if self._is_xl else None

    def _condition(self, text: str, pixels: Pixels, aesthetic: float) -> Condition:
        embeds, pooled = self._texts(text)
        if pooled is None:
            return Condition(embeds)
        height, width = pixels.shape[:2]
        scored = self._stock.config.requires_aesthetics_score
        ids = (height, width, 0, 0, *((aesthetic,) if scored else (height, width)))
        return Condition(embeds, pooled, torch.tensor([ids], dtype=embeds.dtype).to(embeds.device))

    def restore(self, output: Pixels, picture: Picture, request: ImageRequest) -> Picture:
        working = cast("Img2ImgRequest", request).output_size == "working"
        rgb = restore_from_bucket(output, picture.width_px, picture.height_px, working=working)
        alpha = picture.alpha
        if alpha is not None and working:
            alpha = resize(alpha, rgb.shape[1], rgb.shape[0])
        return Picture(rgb, alpha, picture.notes)


PIPELINE = Img2Img
