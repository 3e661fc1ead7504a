"""Image to image with Stable Diffusion 1.x and 2.x, and with the SDXL refiner."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline

from deployments.buckets import (
    choose_bucket,
    content_box,
    fit_to_bucket,
    restore_from_bucket,
)
from deployments.contract import Img2ImgRequest
from deployments.engine.pipeline import Work
from deployments.notes import Code, Note, note
from deployments.pipelines.blending import Kept, latent_mask, starts_from_noise
from deployments.pipelines.denoiser import Condition
from deployments.pipelines.diffusion import Diffusion, Start
from deployments.pipelines.grey import without_tint
from deployments.pipelines.pictures import require_picture, with_alpha_of
from deployments.pipelines.stock import load_stable_diffusion
from deployments.tiling import tiles_of

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from deployments.engine.row import Pixels, RowInput
    from deployments.images import Picture
    from deployments.pipelines.lanes import Lanes
    from deployments.pipelines.noise import Noise
    from deployments.pipelines.prompts import Wording
    from deployments.registry import ModelSpec

_AESTHETIC, _NEGATIVE_AESTHETIC = 6.0, 2.5
"""Scores the refiner was trained with, as the stock pipeline sends them."""


class Img2Img(Diffusion[Img2ImgRequest]):
    """Starts from the picture's own latents, with noise added as `strength` says.

    With a mask it does what stock inpainting does with the same UNet of four channels: also start
    from noise alone at full strength, if the model can.
    No safety checker runs. Working sizes are the spec's buckets; the result has the input's size.
    """

    def __init__(self, spec: ModelSpec, folder: Path, lanes: Lanes | None = None) -> None:
        self._buckets = spec.buckets
        kinds = StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
        super().__init__(load_stable_diffusion(*kinds, spec, folder), spec, lanes)
        self._starts_from_noise = starts_from_noise(self._stock.scheduler)

    def fit(self, picture: Picture | None, request: Img2ImgRequest) -> Pixels:
        picture = require_picture(picture)
        bucket = self._working_size(picture.width_px, picture.height_px)
        return fit_to_bucket(picture.rgb, bucket)

    def restore(self, output: Pixels, picture: Picture | None, request: Img2ImgRequest) -> Picture:
        picture, working = require_picture(picture), request.output_size == "working"
        rgb = restore_from_bucket(output, picture.width_px, picture.height_px, working=working)
        rgb, grey_notes = without_tint(rgb, picture, request)
        notes = (*picture.notes, *_size_notes(output, picture), *grey_notes)
        return with_alpha_of(replace(picture, notes=notes), rgb)

    def work(self, width_px: int, height_px: int, request: Img2ImgRequest) -> Work:
        grid = tiles_of(request, width_px, height_px, self._buckets)
        if grid is None:
            return super().work(width_px, height_px, request)
        tile = super().work(*grid.tile, request)
        return Work(tile.steps * grid.count, tile.step_px, tile.stage_px * grid.count)

    def _usual_sizes(self) -> Sequence[tuple[int, int]]:
        return self._buckets

    def _working_size(self, width_px: int, height_px: int) -> tuple[int, int]:
        return choose_bucket(width_px, height_px, self._buckets)

    def _steps(self, request: Img2ImgRequest) -> int:
        return min(int(request.steps * request.strength), request.steps)

    def _start(self, row: RowInput[Img2ImgRequest], noise: Noise) -> Generator[None, None, Start]:
        request = row.request
        # The stock pipeline's order: the autoencoder draws first, then the noise.
        # A tile is a view of its picture.
        clean = self.autoencoder.encode(np.ascontiguousarray(row.pixels), noise)
        yield
        drawn = noise.draw(clean.shape, self._stock.unet.dtype, clean.device)
        schedule = self.denoiser.schedule(request.steps, request.steps - self._steps(request))
        noisy = clean.float() * schedule.image + drawn.float() * schedule.noise
        if row.mask is None:
            return Start(noisy, schedule, source=clean)
        # Here the stock pipeline encodes the picture without its masked part, which four channels
        # have no use for, and draws for it.
        self.autoencoder.skip_draw(clean, noise)
        if request.strength == 1 and self._starts_from_noise:
            noisy = drawn.float() * schedule.first_noise
        shares = latent_mask(np.ascontiguousarray(row.mask), self.autoencoder.scale)
        kept = Kept(shares.to(clean.device), clean.float(), drawn.float())
        return Start(noisy, schedule, source=clean, kept=kept)

    def _condition(self, wording: Wording, pixels: Pixels, *, is_negative: bool) -> Condition:
        embeds, pooled = self._texts(wording)
        if pooled is None:
            return Condition(embeds)
        height, width = pixels.shape[:2]
        scored = self._stock.config.requires_aesthetics_score
        aesthetic = _NEGATIVE_AESTHETIC if is_negative else _AESTHETIC
        ids = (height, width, 0, 0, *((aesthetic,) if scored else (height, width)))
        return Condition(embeds, pooled, torch.tensor([ids], dtype=embeds.dtype).to(embeds.device))


def _size_notes(output: Pixels, picture: Picture) -> tuple[Note, ...]:
    """A note if the model did not work at the picture's own size."""
    size = picture.width_px, picture.height_px
    worked = content_box(*size, (output.shape[1], output.shape[0]))
    if worked == size:
        return ()
    percent = 100 * math.prod(worked) / math.prod(size)
    share = f"{percent:.0f}" if percent >= 1 else f"{percent:.1g}"
    told = (
        f"The model worked at {worked[0]} x {worked[1]} px, "
        f"{share} % of the picture's {size[0]} x {size[1]} px."
    )
    return (note(Code.WORKING_SIZE, told),)


PIPELINE = Img2Img
