"""Text to image with Stable Diffusion 1.x and 2.x, SDXL, and models distilled from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from deployments.buckets import choose_bucket, content_box, resize
from deployments.contract import GenerateRequest
from deployments.images import Picture
from deployments.notes import Code, note
from deployments.pipelines.denoiser import Condition
from deployments.pipelines.diffusion import Diffusion, Start
from deployments.pipelines.stock import load_stable_diffusion

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from deployments.engine.row import Pixels, RowInput
    from deployments.pipelines.denoiser import Denoising
    from deployments.pipelines.lanes import Lanes
    from deployments.pipelines.noise import Noise
    from deployments.pipelines.prompts import Wording
    from deployments.registry import ModelSpec


class Text2Img(Diffusion[GenerateRequest]):
    """Starts from noise alone.

    No safety checker runs. The model works at one of the spec's buckets; a result of another size
    is cut from its middle and scaled.
    """

    def __init__(self, spec: ModelSpec, folder: Path, lanes: Lanes | None = None) -> None:
        self._buckets = spec.buckets
        kinds = StableDiffusionPipeline, StableDiffusionXLPipeline
        super().__init__(load_stable_diffusion(*kinds, spec, folder), spec, lanes)

    def fit(self, picture: Picture | None, request: GenerateRequest) -> Pixels:
        """An empty canvas of the bucket's size, which takes no memory."""
        width, height = self._working_size(*request.canvas(self._buckets[0]))
        return np.broadcast_to(np.uint8(0), (height, width, 3))

    def restore(self, output: Pixels, picture: Picture | None, request: GenerateRequest) -> Picture:
        height, width = output.shape[:2]
        asked = request.canvas(self._buckets[0])
        if asked == (width, height):
            return Picture(output, None)
        worked = content_box(*asked, (width, height))
        left, top = (width - worked[0]) // 2, (height - worked[1]) // 2
        content = output[top : top + worked[1], left : left + worked[0]]
        told = f"The model worked at {worked[0]} x {worked[1]} px"
        told += "." if worked == (width, height) else f" of {width} x {height} px."
        return Picture(resize(content, *asked), None, (note(Code.WORKING_SIZE, told),))

    @torch.inference_mode()
    def preview(self, row: RowInput[GenerateRequest], state: Denoising) -> Pixels | None:
        clean = state.clean
        return None if clean is None else self.autoencoder.sketch(clean)

    def _usual_sizes(self) -> Sequence[tuple[int, int]]:
        return self._buckets

    def _working_size(self, width_px: int, height_px: int) -> tuple[int, int]:
        if not width_px:
            return self._buckets[0]
        return choose_bucket(width_px, height_px, self._buckets)

    def _steps(self, request: GenerateRequest) -> int:
        return request.steps

    def _start(self, row: RowInput[GenerateRequest], noise: Noise) -> Generator[None, None, Start]:
        unet, scale = self._stock.unet, self._stock.vae_scale_factor
        height, width = row.pixels.shape[:2]
        shape = (1, unet.config.in_channels, height // scale, width // scale)
        schedule = self.denoiser.schedule(row.request.steps)
        latents = noise.draw(shape, unet.dtype, unet.device).float()
        yield from ()
        return Start(latents * schedule.first_noise, schedule)

    def _condition(self, wording: Wording, pixels: Pixels, *, is_negative: bool) -> Condition:
        embeds, pooled = self._texts(wording)
        if pooled is None:
            return Condition(embeds)
        if is_negative and not wording.text and self._stock.config.force_zeros_for_empty_prompt:
            # SDXL was trained with zeros in place of an empty text, not with its embedding.
            embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
        height, width = pixels.shape[:2]
        ids = torch.tensor([(height, width, 0, 0, height, width)], dtype=embeds.dtype)
        return Condition(embeds, pooled, ids.to(embeds.device))


PIPELINE = Text2Img
