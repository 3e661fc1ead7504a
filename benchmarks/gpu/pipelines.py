"""Pipelines for the engine over networks without files: the production denoiser and autoencoder,
with embeddings in place of texts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.gpu.architectures import ARCHITECTURES
from deployments.engine.passes import Passes
from deployments.engine.pipeline import result_of
from deployments.engine.row import RowInput
from deployments.pipelines.autoencoder import Autoencoder, image_tensor
from deployments.pipelines.denoiser import Condition, Denoiser, Denoising, network_px
from deployments.pipelines.noise import Noise

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable, Sequence

    from benchmarks.gpu.workloads import Parts, Request
    from deployments.engine.preparation import Preparation
    from deployments.engine.row import Pixels
    from deployments.registry import NoisePrecision

    Start = tuple[torch.Tensor, Any, torch.Tensor | None]
    """Noisy latents, the schedule, and the picture beside the latents."""


class DiffusionBench:
    """Image to image, and the x4 upscaler; a step is a pass of the UNet.

    Args:
        unet, vae: with the options applied.
        noise: dtype that noise is drawn in.
    """

    def __init__(self, parts: Parts, unet: Any, vae: Any, noise: NoisePrecision) -> None:
        self._parts = parts
        self._noise: NoisePrecision = noise
        self._dtype = unet.dtype
        self._denoiser = Denoiser(unet, parts.scheduler())
        self._autoencoder = Autoencoder(vae, ARCHITECTURES[parts.workload.model].vae_tile_px)
        self._positive, self._negative = (_cast(c, unet.dtype) for c in parts.conditions)

    def cost_px(self, row: RowInput[Request]) -> int:
        guided = row.request.guidance_scale > 1
        return network_px(math.prod(row.pixels.shape[:2]), guided=guided)

    @torch.inference_mode()
    def begin(self, row: RowInput[Request]) -> Generator[None, None, Denoising]:
        request = row.request
        upscales = self._parts.workload.family == "upscale_diffusion"
        start = self._start_upscale if upscales else self._start_img2img
        noise = Noise(row.seed, self._noise)
        latents, schedule, picture = start(row, noise)
        noises = yield from noise.draw_steps(schedule.draws, latents, self._dtype)
        yield
        return Denoising(
            latents,
            schedule,
            positive=self._positive,
            negative=self._negative if request.guidance_scale > 1 else None,
            guidance_scale=request.guidance_scale,
            picture=picture,
            noise_level=request.noise_level if upscales else None,
            noises=noises,
        )

    def _start_img2img(self, row: RowInput[Request], noise: Noise) -> Start:
        clean = self._autoencoder.encode(row.pixels, noise)
        drawn = noise.draw(clean.shape, self._dtype, clean.device)
        schedule = self._denoiser.schedule(row.request.steps, row.request.skipped)
        return clean.float() * schedule.image + drawn.float() * schedule.noise, schedule, None

    def _start_upscale(self, row: RowInput[Request], noise: Noise) -> Start:
        picture = image_tensor(row.pixels).to(self._parts.device, self._dtype)
        drawn = noise.draw(picture.shape, self._dtype, picture.device)
        kept = self._parts.noises[row.request.noise_level]
        noisy = kept**0.5 * picture + (1 - kept) ** 0.5 * drawn
        shape = (1, self._autoencoder.vae.config.latent_channels, *picture.shape[2:])
        schedule = self._denoiser.schedule(row.request.steps)
        latents = noise.draw(shape, self._dtype, picture.device).float()
        return latents * schedule.first_noise, schedule, noisy

    @torch.inference_mode()
    def prepare(self, how: Preparation, group: int) -> None:
        side = self._parts.workload.size_px
        latent_px = ARCHITECTURES[self._parts.workload.model].latent_px
        usual = [(side, side)] if latent_px > 1 else []
        self._autoencoder.prepare(how, usual)
        if not usual:
            return  # as in deployments/: any size may come
        guided = replace(self._parts.workload.request, guidance_scale=5.0)
        row = RowInput(guided, self._parts.pixels, 0, math.inf)
        self._denoiser.prepare(how, [result_of(self.begin(row))], 2 * group)

    def pass_of(self, rows: Sequence[Denoising]) -> Callable[[], torch.Tensor]:
        """The UNet's pass in the next step of these rows, alone."""
        return self._denoiser.pass_of(rows)

    def steps(self, state: Denoising) -> int:
        return state.schedule.steps

    def key(self, state: Denoising) -> Hashable:
        return state.latents.shape[2:]

    def step(self, states: Sequence[Denoising]) -> None:
        self._denoiser.step(states)

    def finish(self, state: Denoising) -> Generator[None, None, Pixels]:
        return self._autoencoder.decode(state.latents)


class NetworkBench:
    """A network that needs one pass: matting, or a GAN on one tile.

    The state of a row is a list of its pixels, and then of its picture.
    """

    def __init__(self, parts: Parts, network: Any, dtype: torch.dtype) -> None:
        self._parts, self._network, self._dtype = parts, network, dtype
        self._passes = Passes(self._call)

    def prepare(self, how: Preparation, group: int) -> None:
        """As deployments/ does: matting has one size, a GAN's passes depend on their margins."""
        if self._parts.workload.family != "matting":
            return
        side = self._parts.workload.size_px
        example = torch.zeros(1, 3, side, side, device=self._parts.device, dtype=self._dtype)
        self._passes.prepare(
            [{"x": example}],
            how.counts(group),
            forward=how.compiled(self._network, self._call),
            recorder=how.recorder,
        )

    def _call(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return call_network(self._parts, tensors, self._network)

    def cost_px(self, row: RowInput[Request]) -> int:
        return math.prod(row.pixels.shape[:2])

    def begin(self, row: RowInput[Request]) -> Generator[None, None, list[Pixels]]:
        yield from ()
        return [row.pixels]

    def steps(self, state: list[Pixels]) -> int:
        return 1

    def key(self, state: list[Pixels]) -> Hashable:
        return "one size"

    def step(self, states: Sequence[list[Pixels]]) -> None:
        pixels = [state[0] for state in states]
        pictures = apply_network(self._parts, self._passes, self._dtype, pixels)
        for state, picture in zip(states, pictures, strict=True):
            state[0] = picture

    def finish(self, state: list[Pixels]) -> Generator[None, None, Pixels]:
        yield from ()
        return state[0]


def call_network(
    parts: Parts, tensors: dict[str, torch.Tensor], network: Any = None
) -> torch.Tensor:
    """The output of a network without steps; the workload's own by default."""
    output = (network or parts.network)(tensors["x"])
    return output[0] if parts.workload.family == "matting" else output


@torch.inference_mode()
def apply_network(
    parts: Parts,
    passes: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    dtype: torch.dtype,
    pictures: Sequence[Pixels],
) -> list[Pixels]:
    """One pass, from pixels to pixels."""
    x = torch.from_numpy(np.stack(pictures)).to(parts.device)
    x = x.permute(0, 3, 1, 2).to(dtype) / 255
    if parts.workload.family == "matting":
        values = passes({"x": x - 0.5}).float().sigmoid()
        low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
        values = (values - low) / (high - low).clamp(min=1e-6)
    else:
        values = passes({"x": x}).float().clamp(0, 1)
    return list((values * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())


def _cast(condition: Condition, dtype: torch.dtype) -> Condition:
    tensors = (condition.text, condition.pooled, condition.time_ids)
    text, *extra = (None if tensor is None else tensor.to(dtype) for tensor in tensors)
    return Condition(text, *extra)
