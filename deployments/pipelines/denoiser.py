"""Step-level batching: rows at different points of different schedules share a UNet pass.

A diffusers UNet takes one timestep for each row, so that strength, steps, guidance, seed and time
of arrival may differ within a pass. A row with guidance takes two places in it, others take one.
The noise of schedulers that draw at their steps lies ready when a row begins, so that no row draws
from the generator of another.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deployments.engine.passes import Passes
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
    from collections.abc import Callable, Sequence

    from deployments.engine.passes import Tensors
    from deployments.engine.preparation import Preparation
    from deployments.pipelines.blending import Kept
    from deployments.pipelines.schedules import Factors, Schedule

_SCHEDULES = 256
_TIMESTEP, _NOISE_LEVEL, _GUIDANCE = range(3)
"""Columns of `_facts`."""
_ADDED = ("text_embeds", "time_ids")
"""Tensors that the UNet takes as `added_cond_kwargs`."""


def network_px(pixels: int, *, guided: bool) -> int:
    """Pixels that a pass works on for a picture of `pixels`: twice as many with guidance."""
    return pixels * (2 if guided else 1)


@dataclass(frozen=True, slots=True)
class Condition:
    """What steers a place in the pass.

    Attributes:
        text: `(1, 77, D)` embeddings, or a multiple of 77; rows of one pass have the same.
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
        kept: the part of its picture that stays; None if all may change.
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
    kept: Kept | None = None
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
        clean = of_latents * latents + of_new * new
        return clean if self.kept is None else self.kept.blended(clean, 1.0, 0.0)

    def blended(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents after the next step, with what stays of the picture."""
        if self.kept is None:
            return latents
        return self.kept.blended(latents, *self.schedule.after[self.index].tolist())

    def beyond(self, column: int) -> torch.Tensor:
        """What a factor of the next step in USE_FORMER or NOISE is for, `(1, C, h, w)`."""
        return self.noises[self.index] if column == NOISE else self.former[column - USE_FORMER]

    def advance(self, made: torch.Tensor, latents: torch.Tensor, new: torch.Tensor) -> None:
        """Take over a step's latents, as it made them and blended, and what it remembers."""
        self.last = (self.index, made, new)  # in one, because a preview may read it meanwhile
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
        self.passes = Passes(self._lanes.spread(partial(call_unet, unet)))
        self.schedule = lru_cache(_SCHEDULES)(self._schedule)

    @torch.inference_mode()
    def prepare(self, how: Preparation, rows: Sequence[Denoising], most_places: int) -> None:
        """Prepare passes of the sizes of these rows, which have begun; the first are compiled.

        Args:
            how: what is done.
            rows: one of each size.
            most_places: of a pass; a row with guidance takes two.
        """
        examples = [self._tensors([row], row.latents, self._send(_facts([row]))) for row in rows]
        counts = how.counts(most_places)
        forward = how.compiled(self.unet, partial(call_unet, self.unet))
        if forward is not None:
            spread = self._lanes.spread(forward)
            first, examples = examples[: how.sizes], examples[how.sizes :]
            self.passes.prepare(first, counts, forward=spread, recorder=how.recorder)
        if how.mode == "blocks" or how.recorder is not None:
            examples.sort(key=lambda tensors: tensors["sample"].numel(), reverse=True)
            self.passes.prepare(examples, counts, recorder=how.recorder)

    def pass_of(self, rows: Sequence[Denoising]) -> Callable[[], torch.Tensor]:
        """The UNet's pass alone for rows of one size that all have guidance, for measurements."""
        latents = torch.cat([row.latents for row in rows])
        tensors = self._tensors(rows, latents, self._send(_facts(rows)))
        return partial(self.passes, tensors)

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
        # One upload a pass.
        sent = self._send(np.concatenate([table, _facts(rows)], axis=1))
        factors, facts = sent[:, :COLUMNS].T.reshape(COLUMNS, -1, 1, 1, 1), sent[:, COLUMNS:]
        latents = torch.cat([row.latents for row in rows])
        output = self._forward(rows, latents * factors[SCALE], facts)
        new = factors[REMEMBER_LATENTS] * latents + factors[REMEMBER_OUTPUT] * output
        after = factors[KEEP] * latents + factors[USE_NEW] * new
        for column in (*range(USE_FORMER, COLUMNS), NOISE):
            if (used := table[:, column]).any():
                # Anything finite will do where the factor is 0.
                pairs = zip(used, _each(rows, new), strict=True)
                values = [row.beyond(column) if factor else one for factor, (row, one) in pairs]
                after = after + factors[column] * torch.cat(values)
        made = _each(rows, after)
        blended = [row.blended(one) for row, one in made]  # all, before any row changes
        for (row, one), latents, memory in zip(made, blended, new.split(1), strict=True):
            row.advance(one, latents, memory)

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
        output = self._forward(rows, shown, self._send(_facts(rows)))
        after = [
            row.blended(scheduler.step(one, t, row.latents, return_dict=False)[0])
            for (row, one), scheduler, t in zip(_each(rows, output), own, times, strict=True)
        ]
        for row, scheduler, latents in zip(rows, own, after, strict=True):
            row.scheduler, row.latents = scheduler, latents
            row.index += 1

    @property
    def _weight(self) -> torch.Tensor:
        # `unet.device` and `unet.dtype` walk through all modules, which takes milliseconds.
        return next(iter(self.unet.parameters()))

    def _send(self, values: Factors) -> torch.Tensor:
        """A small table on the device, float32, without waiting for it."""
        tensor = torch.as_tensor(values, dtype=torch.float32)
        device = self._weight.device
        if device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor.to(device)

    def _forward(
        self, rows: Sequence[Denoising], shown: torch.Tensor, facts: torch.Tensor
    ) -> torch.Tensor:
        """What the UNet says of each row, guided where it is, float32."""
        output = self.passes(self._tensors(rows, shown, facts))
        # A copy, because the next pass may overwrite the output.
        return _guide(output.to(torch.float32, copy=True), facts[:, _GUIDANCE])

    def _tensors(
        self, rows: Sequence[Denoising], shown: torch.Tensor, facts: torch.Tensor
    ) -> Tensors:
        """The UNet's inputs: a place for each row, then one more for each guided row.

        Args:
            rows: those with guidance first.
            shown: their latents, scaled.
            facts: see `_facts`.
        """
        guided = [row for row in rows if row.guided]
        conditions = [row.positive for row in rows] + [
            row.negative for row in guided if row.negative
        ]
        if rows[0].picture is not None:
            pictures = torch.cat([row.picture for row in rows if row.picture is not None])
            shown = torch.cat([shown, pictures.to(shown.dtype)], dim=1)
        if guided:
            shown = torch.cat([shown, shown[: len(guided)]])
            facts = torch.cat([facts, facts[: len(guided)]])
        tensors = {
            "sample": shown.to(self._weight.dtype),
            "timestep": facts[:, _TIMESTEP],
            "encoder_hidden_states": torch.cat([condition.text for condition in conditions]),
        }
        if rows[0].noise_level is not None:
            tensors["class_labels"] = facts[:, _NOISE_LEVEL].long()
        if rows[0].positive.guidance is not None:
            embedded = [c.guidance for c in conditions if c.guidance is not None]
            tensors["timestep_cond"] = torch.cat(embedded)
        if rows[0].positive.pooled is not None:
            pooled = [c.pooled for c in conditions if c.pooled is not None]
            time_ids = [c.time_ids for c in conditions if c.time_ids is not None]
            tensors |= {"text_embeds": torch.cat(pooled), "time_ids": torch.cat(time_ids)}
        return tensors


def _facts(rows: Sequence[Denoising]) -> Factors:
    """What a pass has to know of each row beside its factors, `(rows, 3)`."""
    return np.array(
        [
            (row.schedule.timesteps[row.index], row.noise_level or 0, row.guidance_scale)
            for row in rows
        ],
        np.float64,
    )


def _guide(output: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance (arXiv:2207.12598) for the first rows, which have it.

    Args:
        output: a place for each row, then one more for each guided row.
        scales: of the rows.
    """
    count = len(scales)
    guided = len(output) - count
    if not guided:
        return output
    negative = output[count:]
    steered = negative + scales[:guided].view(-1, 1, 1, 1) * (output[:guided] - negative)
    return torch.cat([steered, output[guided:count]])


def call_unet(unet: Any, tensors: Tensors) -> torch.Tensor:
    """The output of a diffusers UNet for named tensors with a place each in the first dimension."""
    options: dict[str, Any] = dict(tensors)
    added = {name: options.pop(name) for name in _ADDED if name in options}
    if added:
        options["added_cond_kwargs"] = added
    sample, timestep = options.pop("sample"), options.pop("timestep")
    return unet(sample, timestep, **options, return_dict=False)[0]


def _adopt(row: Denoising) -> None:
    """Tell the allocator that this stream reads from now on what another stream has written."""
    if row.index or not row.latents.is_cuda:
        return
    stream = torch.cuda.current_stream()
    conditions = [condition for condition in (row.positive, row.negative) if condition]
    steering = [value for c in conditions for value in (c.text, c.pooled, c.time_ids, c.guidance)]
    kept = (row.kept.mask, row.kept.clean, row.kept.noise) if row.kept else ()
    for tensor in (row.latents, row.picture, *row.noises, *kept, *steering):
        if tensor is not None:
            tensor.record_stream(stream)


def _each(rows: Sequence[Denoising], values: torch.Tensor) -> list[tuple[Denoising, torch.Tensor]]:
    return list(zip(rows, values.split(1), strict=True))
