"""What the diffusion families share: prompts, the way into the latents, steps, and the way back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch

from deployments.buckets import resize
from deployments.contract import DiffusionRequest
from deployments.engine.pipeline import Work, result_of
from deployments.engine.row import RowInput
from deployments.notes import Code, Note, note
from deployments.pipelines.autoencoder import Autoencoder
from deployments.pipelines.denoiser import Condition, Denoiser, Denoising, network_px
from deployments.pipelines.noise import Noise, NoiseField
from deployments.pipelines.prompts import (
    Embeddings,
    PromptCache,
    Wording,
    cut_note,
    encode_in_chunks,
    match_lengths,
    tokenizers_of,
    wordings,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Hashable, Sequence

    from deployments.engine.grouping import GroupLimits
    from deployments.engine.preparation import Preparation
    from deployments.engine.row import Pixels
    from deployments.pipelines.blending import Kept
    from deployments.pipelines.lanes import Lanes
    from deployments.pipelines.schedules import Schedule
    from deployments.registry import ModelSpec, NoisePrecision

RequestT = TypeVar("RequestT", bound=DiffusionRequest)
_GENERATOR_SEEDS = 2**32
"""Of torch's generator on the CPU (Mersenne Twister), as stock pipelines are seeded: it takes the
lower 32 bits."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a row's denoising starts.

    Attributes:
        latents: `(1, C, h, w)` float32, noisy.
        schedule: the steps to run.
        picture: `(1, 3, h, w)` shown beside the latents, of the x4 upscaler.
        noise_level: class of that picture's noise.
        source: the latents of the picture that the row starts from, where there is one.
        kept: the part of that picture that stays; None if all may change.
    """

    latents: torch.Tensor
    schedule: Schedule
    picture: torch.Tensor | None = None
    noise_level: int | None = None
    source: torch.Tensor | None = None
    kept: Kept | None = None


class Diffusion(ABC, Generic[RequestT]):
    """A UNet between two ends of an autoencoder.

    Rows of one working size and number of prompt chunks share every UNet pass, whatever else their
    requests say. A family says which size that is, where the latents start, and how the result fits
    the picture: `fit`, `restore` and the abstract methods below.

    Args:
        stock: a stock diffusers pipeline.
        spec: names the precision of noise.
        lanes: that share the places of a pass.
        tile_px: of the autoencoder, see `Autoencoder`.
    """

    def __init__(
        self, stock: Any, spec: ModelSpec, lanes: Lanes | None, tile_px: int | None = None
    ) -> None:
        self._stock = stock
        self._noise: NoisePrecision = spec.noise
        # A model that was distilled with guidance is told its scale, and needs no negative place.
        self._guidance_dim = stock.unet.config.time_cond_proj_dim
        self._texts = PromptCache(self._embed)
        self._tokenizers = tokenizers_of(stock)
        self.autoencoder = Autoencoder(stock.vae, tile_px)
        self.denoiser = Denoiser(stock.unet, stock.scheduler, lanes)

    @abstractmethod
    def _working_size(self, width_px: int, height_px: int) -> tuple[int, int]:
        """Width and height in px that the model works at, for a picture of this size."""

    @abstractmethod
    def _steps(self, request: RequestT) -> int:
        """Steps of the schedule that run, at least 1 where the request is valid."""

    @abstractmethod
    def _start(self, row: RowInput[RequestT], noise: Noise) -> Generator[None, None, Start]:
        """The row's noisy latents. Draws from `noise` in the stock pipeline's order."""

    def _embed(self, wording: Wording) -> Embeddings:
        if wording.is_plain:
            return self._encode(wording.text)
        return encode_in_chunks(self._stock, wording)

    def _encode(self, text: str) -> Embeddings:
        # Of SDXL the stock call gives two more: the texts as one vector each.
        embeds, _, *pooled = self._stock.encode_prompt(
            text,
            device=self._stock.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return embeds, pooled[0] if pooled else None

    def _condition(self, wording: Wording, pixels: Pixels, *, is_negative: bool) -> Condition:
        """What steers a place of the pass that works on `pixels`."""
        return Condition(self._texts(wording)[0])

    def _conditions(self, request: RequestT, pixels: Pixels) -> tuple[Condition, Condition | None]:
        """What the picture should become, and what not; None without guidance."""
        wanted, unwanted = wordings(request)
        positive = self._condition(wanted, pixels, is_negative=False)
        positive = replace(positive, guidance=self._embedded(request.guidance_scale))
        if not self._guided(request):
            return positive, None
        negative = self._condition(unwanted, pixels, is_negative=True)
        if positive.text.shape == negative.text.shape:
            return positive, negative
        return match_lengths(positive, negative, self._texts(Wording(""))[0])

    def to(self, device: str) -> None:
        self._stock.to(device)
        self._texts.clear()
        self.autoencoder.clear()
        self.denoiser.passes.clear()

    @torch.inference_mode()
    def prepare(self, how: Preparation, request: RequestT, limits: GroupLimits) -> int:
        sizes = self._usual_sizes()
        self.autoencoder.prepare(how, sizes)
        if sizes:
            rows = [self._begun(request, size) for size in sizes]
            largest_px = max(math.prod(size) for size in sizes)
            self.denoiser.prepare(how, rows, most_places(limits, largest_px))
        passes = (self.autoencoder.encodes, self.autoencoder.decodes, self.denoiser.passes)
        return sum(one.prepared for one in passes)

    def _usual_sizes(self) -> Sequence[tuple[int, int]]:
        """Widths and heights in px that passes are prepared for, the most usual first; none where
        any size may come.
        """
        return ()

    def _begun(self, request: RequestT, size: tuple[int, int]) -> Denoising:
        grey = np.full((size[1], size[0], 3), 127, np.uint8)
        return result_of(self.begin(RowInput(request, grey, 0, math.inf)))

    def work(self, width_px: int, height_px: int, request: RequestT) -> Work:
        pixels = math.prod(self._working_size(width_px, height_px))
        steps = max(self._steps(request) * self._stock.scheduler.order, 1)
        return Work(steps, network_px(pixels, guided=self._guided(request)), pixels)

    def cost_px(self, row: RowInput[RequestT]) -> int:
        return network_px(math.prod(row.pixels.shape[:2]), guided=self._guided(row.request))

    def _guided(self, request: RequestT) -> bool:
        return request.guidance_scale > 1 and self._guidance_dim is None

    def _embedded(self, guidance_scale: float) -> torch.Tensor | None:
        """`(1, G)` embedding of the guidance scale, for a model that was distilled with it."""
        if self._guidance_dim is None:
            return None
        scale, unet = torch.tensor([guidance_scale - 1]), self._stock.unet
        embedded = self._stock.get_guidance_scale_embedding(scale, self._guidance_dim)
        return embedded.to(unet.device, unet.dtype)

    @torch.inference_mode()
    def begin(self, row: RowInput[RequestT]) -> Generator[None, None, Denoising]:
        request = row.request
        row.notes.extend(self._prompt_notes(request, row.seed))
        positive, negative = self._conditions(request, row.pixels)
        yield
        noise = self._noise_of(row)
        start = yield from self._start(row, noise)
        draws, dtype = start.schedule.draws, self._stock.unet.dtype
        noises = yield from noise.draw_steps(draws, start.latents, dtype)
        return Denoising(
            start.latents,
            start.schedule,
            positive=positive,
            negative=negative,
            guidance_scale=request.guidance_scale,
            picture=start.picture,
            noise_level=start.noise_level,
            source=start.source,
            noises=noises,
            kept=start.kept,
        )

    def _noise_of(self, row: RowInput[RequestT]) -> Noise:
        if row.place is None:
            return Noise(row.seed, self._noise)
        scale = self.autoencoder.scale
        left, top = row.place.left_px // scale, row.place.top_px // scale
        return NoiseField(row.seed, self._noise, left, top)

    def steps(self, state: Denoising) -> int:
        return state.schedule.steps

    def key(self, state: Denoising) -> Hashable:
        return state.latents.shape[2:], state.positive.text.shape[1]

    def step(self, states: Sequence[Denoising]) -> None:
        self.denoiser.step(states)

    @torch.inference_mode()
    def preview(self, row: RowInput[RequestT], state: Denoising) -> Pixels | None:
        """The clean latents that the last step predicted, as colours, a pixel for each latent.

        The row's own picture and its latents say which colours latents stand for: a linear map
        fits them well enough for a preview, without the autoencoder.
        """
        clean = state.clean
        if state.source is None or clean is None:
            return None
        height, width = state.source.shape[2:]
        shown = torch.from_numpy(resize(row.pixels, width, height)).reshape(-1, 3) / 255
        colours = torch.linalg.lstsq(_columns(state.source), shown).solution
        pixels = (_columns(clean) @ colours).clamp(0, 1) * 255
        return pixels.round().to(torch.uint8).reshape(height, width, 3).numpy()

    def finish(self, state: Denoising) -> Generator[None, None, Pixels]:
        return self.autoencoder.decode(state.latents)

    def _prompt_notes(self, request: RequestT, seed: int) -> list[Note]:
        """What the model does not read of the prompts and the seed."""
        wanted, unwanted = wordings(request)
        notes = cut_note("prompt", wanted, self._tokenizers)
        if self._guided(request):
            notes += cut_note("negative_prompt", unwanted, self._tokenizers)
        elif request.negative_prompt:
            why = "guidance_scale is not above 1"
            if self._guidance_dim is not None:
                why = "the model was distilled with guidance"
            told = f"negative_prompt had no effect, because {why}."
            notes.append(note(Code.NEGATIVE_PROMPT_UNUSED, told))
        if seed >= _GENERATOR_SEEDS:
            told = (
                f"The generator reads 32 bits of the seed: {seed % _GENERATOR_SEEDS} is the same."
            )
            notes.append(note(Code.SEED_SHORTENED, told))
        return notes


def most_places(limits: GroupLimits, pixels: int) -> int:
    """Places of the largest pass that pictures of `pixels` with guidance share, at least 1."""
    rows = 1 if limits.exact else limits.max_batch_size
    if limits.budget_px is None:
        return 2 * rows
    return max(min(2 * rows, limits.budget_px // pixels), 1)


def _columns(latents: torch.Tensor) -> torch.Tensor:
    """`(1, C, h, w)` as `(h * w, C + 1)` on the CPU: a row for each place, and a constant."""
    flat = latents[0].flatten(1).T.float().cpu()
    return torch.cat([flat, torch.ones(len(flat), 1)], dim=1)
