"""Step-level batching: rows at different points of different schedules share a UNet pass.

A diffusers UNet takes one timestep for each row, so that strength, steps, guidance, seed and time
of arrival may differ within a pass. A row with guidance takes two places in it, others take one.
The noise of schedulers that draw at their steps lies ready when a row begins, so that no row draws
from the generator of another.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deployments.pipelines.lanes import Lanes
from deployments.pipelines.schedules import (
    CLEAN_LATENTS,
    CLEAN_NEW,
    COLUMNS,
    KEEP,
    NOISE,
    REMEMBER_LATENTS,
    REMEMBER_OUTPUT,
    SCALE,
    USE_FORMER,
    USE_NEW,
    make_schedule,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.pipelines.schedules import Schedule

_SCHEDULES = 256


def network_px(pixels: int, *, guided: bool) -> int:
    """Pixels that a pass works on for a picture of `pixels`: twice as many with guidance."""
    return pixels * (2 if guided else 1)


@dataclass(frozen=True, slots=True)
class Condition:
    """What steers a place in the pass.

    Attributes:
        text: `(1, 77, D)` embeddings.
        pooled: `(1, P)`, of an SDXL model.
        time_ids: `(1, 5 or 6)`, of an SDXL model.
        guidance: `(1, G)` embedding of the guidance scale, of a model that was distilled with it.
    """

    text: torch.Tensor
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None
    guidance: torch.Tensor | None = None


@dataclass(slots=True, eq=False)
class Denoising:
    """A row on its way.

    Attributes:
        latents: `(1, C, h, w)` float32.
        schedule: shared with other rows.
        positive: what the picture should become.
        negative: what it should not become; None without guidance.
        guidance_scale: above 1 with guidance.
        picture: `(1, 3, h, w)` shown beside the latents, of the x4 upscaler.
        noise_level: class of the picture's noise, of the x4 upscaler.
        source: the latents of the picture that the row started from, where there is one.
        noises: `(1, C, h, w)` for each step that draws noise.
        index: the next step.
        former: what the latest steps remembered, the last one first: as many as may be needed.
        last: what the last step left for `clean`: its index, its latents and what it remembered.
        scheduler: the row's own copy, if the schedule is not linear.
    """

    latents: torch.Tensor
    schedule: Schedule
    positive: Condition
    negative: Condition | None
    guidance_scale: float
    picture: torch.Tensor | None = None
    noise_level: int | None = None
    source: torch.Tensor | None = None
    noises: tuple[torch.Tensor, ...] = ()
    index: int = 0
    former: tuple[torch.Tensor, ...] = ()
    last: tuple[int, torch.Tensor, torch.Tensor] | None = None
    scheduler: Any = None

    @property
    def guided(self) -> bool:
        return self.negative is not None

    @property
    def clean(self) -> torch.Tensor | None:
        """The clean latents that the last step predicted; None if there are none. Thread-safe."""
        last, factors = self.last, self.schedule.factors
        if last is None or factors is None:
            return None
        index, latents, new = last
        of_latents, of_new = factors[index, [CLEAN_LATENTS, CLEAN_NEW]].tolist()
        return of_latents * latents + of_new * new

    def beyond(self, column: int) -> torch.Tensor:
        """What a factor of the next step in USE_FORMER or NOISE is for, `(1, C, h, w)`."""
        return self.noises[self.index] if column == NOISE else self.former[column - USE_FORMER]

    def advance(self, latents: torch.Tensor, new: torch.Tensor) -> None:
        """Take over a step's latents and what it remembers."""
        self.last = (self.index, latents, new)  # in one, because a preview may read it meanwhile
        self.latents = latents
        self.former = (new, *self.former)[: self.schedule.depth]
        self.index += 1


class Denoiser:
    """A UNet and its scheduler, for one thread.

    Args:
        unet: a diffusers UNet2DConditionModel on its device.
        scheduler: of diffusers; every row gets its own schedule from it.
        lanes: that share the places of a pass.
    """

    def __init__(self, unet: Any, scheduler: Any, lanes: Lanes | None = None) -> None:
        self.unet = unet
        self.scheduler = scheduler
        self._lanes = lanes or Lanes()
        self.schedule = lru_cache(_SCHEDULES)(self._schedule)

    def _schedule(self, steps: int, skipped: int = 0) -> Schedule:
        """The schedule of a row, see `make_schedule`; cached."""
        return make_schedule(self.scheduler, steps, skipped)

    @torch.inference_mode()
    def step(self, rows: Sequence[Denoising]) -> None:
        """One pass for rows of one size. If it raises, no row has changed."""
        rows = sorted(rows, key=lambda row: not row.guided)
        for row in rows:
            _adopt(row)
        steps = [f[row.index] for row in rows if (f := row.schedule.factors) is not None]
        if not steps:
            self._step_with_schedulers(rows)
            return
        table = np.stack(steps)
        factors = self._send(table).T.reshape(COLUMNS, -1, 1, 1, 1)
        latents = torch.cat([row.latents for row in rows])
        output = self._guide(rows, self._forward(rows, latents * factors[SCALE]))
        new = factors[REMEMBER_LATENTS] * latents + factors[REMEMBER_OUTPUT] * output
        after = factors[KEEP] * latents + factors[USE_NEW] * new
        for column in (*range(USE_FORMER, COLUMNS), NOISE):
            if (used := table[:, column]).any():
                # Anything finite will do where the factor is 0.
                pairs = zip(used, _each(rows, new), strict=True)
                values = [row.beyond(column) if factor else one for factor, (row, one) in pairs]
                after = after + factors[column] * torch.cat(values)
        for i, row in enumerate(rows):
            row.advance(after[i : i + 1], new[i : i + 1])

    def _step_with_schedulers(self, rows: Sequence[Denoising]) -> None:
        """A pass for rows whose schedule is not linear: each row's own scheduler steps it."""
        # Copies, so that a failure leaves every row as it was.
        own = [copy.deepcopy(row.scheduler or row.schedule.scheduler) for row in rows]
        times = [
            scheduler.timesteps[row.index - row.schedule.steps]
            for row, scheduler in zip(rows, own, strict=True)
        ]
        shown = torch.cat(
            [
                scheduler.scale_model_input(row.latents, t)
                for row, scheduler, t in zip(rows, own, times, strict=True)
            ]
        )
        output = self._guide(rows, self._forward(rows, shown))
        after = [
            scheduler.step(one, t, row.latents, return_dict=False)[0]
            for (row, one), scheduler, t in zip(_each(rows, output), own, times, strict=True)
        ]
        for row, scheduler, latents in zip(rows, own, after, strict=True):
            row.scheduler, row.latents = scheduler, latents
            row.index += 1

    @property
    def _weight(self) -> torch.Tensor:
        # `unet.device` and `unet.dtype` walk through all modules, which takes milliseconds.
        return next(iter(self.unet.parameters()))

    def _send(self, values: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Small host values on the device, without waiting for it."""
        tensor = torch.as_tensor(values, dtype=dtype)
        device = self._weight.device
        if device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor.to(device)

    def _forward(self, rows: Sequence[Denoising], shown: torch.Tensor) -> torch.Tensor:
        """The UNet's output, float32: a place for each row, then one more for each guided row."""
        guided = [row for row in rows if row.guided]
        places = [*rows, *guided]
        conditions = [row.positive for row in rows] + [
            row.negative for row in guided if row.negative
        ]
        if rows[0].picture is not None:
            pictures = torch.cat([row.picture for row in rows if row.picture is not None])
            shown = torch.cat([shown, pictures.to(shown.dtype)], dim=1)
        if guided:
            shown = torch.cat([shown, shown[: len(guided)]])
        shown = shown.to(self._weight.dtype)
        times = self._send([row.schedule.timesteps[row.index] for row in places])
        texts = torch.cat([condition.text for condition in conditions])
        options = self._options(places, conditions)

        def forward(part: slice) -> torch.Tensor:
            return self.unet(
                shown[part],
                times[part],
                encoder_hidden_states=texts[part],
                return_dict=False,
                **_cut(options, part),
            )[0]

        return self._lanes.run(forward, len(places)).float()

    def _options(
        self, places: Sequence[Denoising], conditions: Sequence[Condition]
    ) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if places[0].noise_level is not None:
            levels = [row.noise_level for row in places]
            options["class_labels"] = self._send(levels, torch.long)
        if places[0].positive.guidance is not None:
            embedded = [c.guidance for c in conditions if c.guidance is not None]
            options["timestep_cond"] = torch.cat(embedded)
        if places[0].positive.pooled is not None:
            options["added_cond_kwargs"] = {
                "text_embeds": torch.cat([c.pooled for c in conditions if c.pooled is not None]),
                "time_ids": torch.cat([c.time_ids for c in conditions if c.time_ids is not None]),
            }
        return options

    def _guide(self, rows: Sequence[Denoising], output: torch.Tensor) -> torch.Tensor:
        """Classifier-free guidance (arXiv:2207.12598) for the rows that have it."""
        count = len(rows)
        guided = output.shape[0] - count
        if not guided:
            return output
        scales = self._send([row.guidance_scale for row in rows[:guided]]).view(-1, 1, 1, 1)
        negative = output[count:]
        steered = negative + scales * (output[:guided] - negative)
        return torch.cat([steered, output[guided:count]])


def _cut(options: dict[str, Any], part: slice) -> dict[str, Any]:
    """The part of every tensor, also in nested dictionaries."""
    return {
        name: _cut(value, part) if isinstance(value, dict) else value[part]
        for name, value in options.items()
    }


def _adopt(row: Denoising) -> None:
    """Tell the allocator that this stream reads from now on what another stream has written."""
    if row.index or not row.latents.is_cuda:
        return
    stream = torch.cuda.current_stream()
    conditions = [condition for condition in (row.positive, row.negative) if condition]
    steering = [value for c in conditions for value in (c.text, c.pooled, c.time_ids, c.guidance)]
    for tensor in (row.latents, row.picture, *row.noises, *steering):
        if tensor is not None:
            tensor.record_stream(stream)


def _each(rows: Sequence[Denoising], values: torch.Tensor) -> list[tuple[Denoising, torch.Tensor]]:
    return list(zip(rows, values.split(1), strict=True))
