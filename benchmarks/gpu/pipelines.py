"""Pipelines for the engine over networks without files: the production denoiser and autoencoder,
with embeddings in place of texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from benchmarks.gpu.architectures import ARCHITECTURES
from deployments.engine.row import Row, RowInput
from deployments.pipelines.autoencoder import Autoencoder, image_tensor
from deployments.pipelines.denoiser import Condition, Denoiser, Denoising

if TYPE_CHECKING:
    from collections.abc import Generator, Hashable, Sequence

    from benchmarks.gpu.workloads import Item, Parts, Request
    from deployments.engine.pipeline import AnyPipeline
    from deployments.engine.row import Pixels

_FOREVER_S = float("inf")


class DiffusionBench:
    """Image to image, and the x4 upscaler; a step is a pass of the UNet.

    Args:
        denoiser: over the UNet, with the options applied.
        vae: with the options applied.
    """

    def __init__(self, parts: Parts, denoiser: Denoiser, vae: Any) -> None:
        self._parts = parts
        self._denoiser = denoiser
        self._autoencoder = Autoencoder(vae, ARCHITECTURES[parts.workload.model].vae_tile_px)
        dtype = denoiser.unet.dtype
        assert parts.positive
        assert parts.negative
        self._positive, self._negative = _cast(parts.positive, dtype), _cast(parts.negative, dtype)
        self._dtype = dtype

    def cost_px(self, row: RowInput[Request]) -> int:
        guided = row.request.guidance_scale > 1
        return row.pixels.shape[0] * row.pixels.shape[1] * (2 if guided else 1)

    @torch.inference_mode()
    def begin(self, row: RowInput[Request]) -> Generator[None, None, Denoising]:
        request = row.request
        generator = torch.Generator("cpu").manual_seed(row.seed)
        negative = self._negative if request.guidance_scale > 1 else None
        upscales = self._parts.workload.family == "upscale_diffusion"
        start = self._start_upscale if upscales else self._start_img2img
        state = start(row, generator, negative)
        yield
        return state

    def _start_img2img(
        self, row: RowInput[Request], generator: torch.Generator, negative: Condition | None
    ) -> Denoising:
        request = row.request
        clean = self._autoencoder.encode(row.pixels, generator)
        noise = randn_tensor(clean.shape, generator, clean.device, self._dtype)
        schedule = self._denoiser.schedule(request.steps, request.skipped)
        latents = clean.float() * schedule.image + noise.float() * schedule.noise
        return Denoising(latents, schedule, self._positive, negative, request.guidance_scale)

    def _start_upscale(
        self, row: RowInput[Request], generator: torch.Generator, negative: Condition | None
    ) -> Denoising:
        request, device = row.request, torch.device(self._parts.device)
        picture = image_tensor(row.pixels).to(device, self._dtype)
        noise = randn_tensor(picture.shape, generator, device, self._dtype)
        kept = self._parts.noises[request.noise_level]
        noisy = kept**0.5 * picture + (1 - kept) ** 0.5 * noise
        shape = (1, self._autoencoder.vae.config.latent_channels, *picture.shape[2:])
        schedule = self._denoiser.schedule(request.steps)
        latents = randn_tensor(shape, generator, device, self._dtype).float()
        return Denoising(
            latents * schedule.first_noise,
            schedule,
            self._positive,
            negative,
            request.guidance_scale,
            noisy,
            request.noise_level,
        )

    def steps(self, state: Denoising) -> int:
        return state.schedule.steps

    def key(self, state: Denoising) -> Hashable:
        return state.latents.shape[2:]

    def step(self, states: Sequence[Denoising]) -> None:
        self._denoiser.step(states)

    def finish(self, state: Denoising) -> Generator[None, None, Pixels]:
        return self._autoencoder.decode(state.latents)


@dataclass(slots=True)
class Single:
    """A row of one pass: its pixels, then its picture."""

    pixels: Pixels


class NetworkBench:
    """A network that needs one pass: matting, or a GAN on one tile."""

    def __init__(self, parts: Parts, network: Any, dtype: torch.dtype) -> None:
        self._parts = parts
        self._network = network
        self._dtype = dtype

    def cost_px(self, row: RowInput[Request]) -> int:
        return row.pixels.shape[0] * row.pixels.shape[1]

    def begin(self, row: RowInput[Request]) -> Generator[None, None, Single]:
        yield from ()
        return Single(row.pixels)

    def steps(self, state: Single) -> int:
        return 1

    def key(self, state: Single) -> Hashable:
        return state.pixels.shape[:2]

    def step(self, states: Sequence[Single]) -> None:
        pictures = apply_network(
            self._parts, self._network, self._dtype, [state.pixels for state in states]
        )
        for state, picture in zip(states, pictures, strict=True):
            state.pixels = picture

    def finish(self, state: Single) -> Generator[None, None, Pixels]:
        yield from ()
        return state.pixels


@torch.inference_mode()
def apply_network(
    parts: Parts, network: Any, dtype: torch.dtype, pictures: Sequence[Pixels]
) -> list[Pixels]:
    """One pass, from pixels to pixels."""
    x = torch.from_numpy(np.stack(pictures)).to(parts.device)
    x = x.permute(0, 3, 1, 2).to(dtype) / 255
    if parts.workload.family == "matting":
        values = network(x - 0.5)[0].float().sigmoid()
        low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
        values = (values - low) / (high - low).clamp(min=1e-6)
    else:
        values = network(x).float().clamp(0, 1)
    return list((values * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())


def make_row(parts: Parts, item: Item) -> Row:
    return Row(RowInput(item.request, parts.pixels, item.seed, _FOREVER_S))


def drive(pipeline: AnyPipeline, rows: Sequence[Row]) -> list[Pixels]:
    """Run rows through a pipeline together on this thread, without an engine."""
    states = [_exhaust(pipeline.begin(row.input)) for row in rows]
    steps = [pipeline.steps(state) for state in states]
    for done in range(max(steps)):
        pipeline.step([state for state, n in zip(states, steps, strict=True) if n > done])
    return [_exhaust(pipeline.finish(state)) for state in states]


def synchronize() -> None:
    """Wait until the GPU has finished, if there is one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _exhaust(pieces: Generator[None, None, Any]) -> Any:
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def _cast(condition: Condition, dtype: torch.dtype) -> Condition:
    def to(tensor: torch.Tensor | None) -> Any:
        return None if tensor is None else tensor.to(dtype)

    return Condition(to(condition.text), to(condition.pooled), to(condition.time_ids))
