"""Each row's own denoising schedule, as factors of one update that rows of any schedule share.

A diffusers scheduler keeps one step index for all that it steps, so that rows at different points
cannot share it. The schedulers computed here are linear in the latents, the network's output, what
earlier steps remembered, and noise. Their factors depend on the schedule alone and are computed on
the host, in float64. With any other scheduler, each row is stepped by a copy of its own.

Sources: DDIM, arXiv:2010.02502; Euler and Euler ancestral as in arXiv:2206.00364; DPM-Solver++ 2M,
arXiv:2211.01095; PLMS (PNDM without its Runge-Kutta steps), arXiv:2202.09778; LCM,
arXiv:2310.04378. Each follows the scheduler of diffusers to the step.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from deployments.errors import ConfigError, InvalidParameter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Factors = NDArray[np.float64]
SCALE, REMEMBER_LATENTS, REMEMBER_OUTPUT, KEEP, USE_NEW, NOISE = range(6)
CLEAN_LATENTS, CLEAN_NEW, USE_FORMER = 6, 7, 8
"""Columns of `Schedule.factors`, see there. From USE_FORMER on there are FORMERS columns."""
FORMERS = 4
COLUMNS = USE_FORMER + FORMERS
_QUIET = {"DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"}
"""Their `step` takes a generator, but draws nothing the way they are used here."""
_DRAWING = {"EulerAncestralDiscreteScheduler", "LCMScheduler"}
"""They draw noise at their steps, which each row has from its own generator."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps of a row, shared by all rows of the same steps and strength.

    With latents x, network output o and normal noise z, step i computes

        new = REMEMBER_LATENTS * x + REMEMBER_OUTPUT * o
        x   = KEEP * x + USE_NEW * new + NOISE * z
              + the sum over k of USE_FORMER[k] * the new of k + 1 steps before

    where the network is shown SCALE * x. Afterwards CLEAN_LATENTS * x + CLEAN_NEW * new are the
    clean latents that the step predicts. What a step remembers as `new` is the clean latents too,
    or, for PLMS, the network's output.

    Attributes:
        timesteps: (S,) what the network is told.
        factors: (S, COLUMNS), or None where `scheduler` steps by itself.
        image, noise: factors of both in latents that start from a picture.
        after: (S, 2) factors of both in a picture's latents as noisy as each step leaves them.
        first_noise: factor of the noise in latents that start from noise alone.
        scheduler: a diffusers scheduler before its first step, which each row copies; None where
            there are factors.
        depth: former steps whose `new` a step may need.
        draws: first steps that draw noise; those after them draw none.
    """

    timesteps: Factors
    factors: Factors | None
    image: float
    noise: float
    after: Factors
    first_noise: float
    scheduler: Any
    depth: int = 0
    draws: int = 0

    @property
    def steps(self) -> int:
        """Steps that run."""
        return len(self.timesteps)


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler that draws noise at its steps unless rows can draw it themselves.

    A seed would not fix its result.

    Raises:
        ConfigError: it draws; the remedy names schedulers that can be used.
    """
    name = type(scheduler).__name__
    stochastic = "sde" in scheduler.config.get("algorithm_type", "")
    draws = "generator" in inspect.signature(scheduler.step).parameters and name not in _QUIET
    known = name in _DRAWING and _linear(scheduler)
    if stochastic or (draws and not known):
        raise ConfigError(
            f"The scheduler {name}, as it is set up, draws noise at every step, which no"
            " request's seed controls.",
            remedy=f"Name one of {', '.join(sorted(_QUIET | _DRAWING))} or PNDMScheduler in the"
            " model's scheduler/scheduler_config.json, without an SDE variant; LCMScheduler also"
            " without clip_sample and thresholding.",
        )


def make_schedule(scheduler: Any, steps: int, skipped: int = 0) -> Schedule:
    """The schedule of `steps` steps without its first `skipped` ones.

    Args:
        scheduler: of diffusers; not changed.
        steps: length of the whole schedule.
        skipped: first steps, which img2img replaces by the picture.

    Raises:
        InvalidParameter: the scheduler knows no schedule of so many steps.
    """
    _check_length(scheduler, steps)
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps)
    first = skipped * own.order
    levels = _levels(own, first)
    if hasattr(own, "set_begin_index"):
        own.set_begin_index(first)
    timesteps = np.asarray(own.timesteps, np.float64)[first:]
    (image, noise), after = levels[0].tolist(), levels[1:]
    pure = float(own.init_noise_sigma)
    linear = _linear(own)
    if linear is None:
        return Schedule(timesteps, None, image, noise, after, pure, own)
    factors = linear(own, first)
    depth = _last_used(np.abs(factors[:, USE_FORMER:]).sum(axis=0))
    draws = _last_used(factors[:, NOISE])
    return Schedule(timesteps, factors, image, noise, after, pure, None, depth, draws)


def _check_length(scheduler: Any, steps: int) -> None:
    """Refuse more steps than a consistency model was distilled from."""
    most = scheduler.config.get("original_inference_steps")
    if most is not None and steps > most:
        raise InvalidParameter(
            f"steps: this model's schedule has at most {most} steps.",
            value=steps,
            remedy=f"Send at most {most} steps; such a model needs only 4 to 8.",
        )


def _last_used(values: Factors) -> int:
    """How many of the first values include all that are not zero."""
    return int(np.flatnonzero(values).max(initial=-1)) + 1


def _linear(scheduler: Any) -> Callable[[Any, int], Factors] | None:
    """How to compute the factors from a first step on; None if the scheduler is not known to be
    linear.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if config.get("thresholding") or config.get("prediction_type") not in _DATA:
        return None
    is_linear = {
        "DDIMScheduler": not config.get("clip_sample"),
        "DPMSolverMultistepScheduler": _is_plain_dpm(config),
        "EulerAncestralDiscreteScheduler": True,
        "EulerDiscreteScheduler": True,
        "LCMScheduler": not config.get("clip_sample"),
        "PNDMScheduler": config.get("skip_prk_steps") and config.prediction_type != "sample",
    }
    return _FACTORS[name] if is_linear.get(name) else None


def _is_plain_dpm(config: Any) -> bool:
    plain = config.get("algorithm_type") == "dpmsolver++" and not config.get("use_flow_sigmas")
    return plain and config.get("solver_order") <= 2


def _levels(scheduler: Any, first: int) -> Factors:
    """Factors of clean latents and of noise in a picture's latents at each step from `first` on,
    and at the end, which has no noise.
    """
    other, levels = copy.deepcopy(scheduler), []
    # Twice the latents: clean ones without noise, and noise alone.
    clean = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for at in range(first, len(other.timesteps)):
        if hasattr(other, "set_begin_index"):
            other.set_begin_index(at)
        both = other.add_noise(clean, 1 - clean, other.timesteps[at : at + 1].repeat(2))
        levels.append(both.tolist())
    return np.array([*levels, (1.0, 0.0)])


_DATA: dict[str, Callable[[Factors, Factors], tuple[Factors, Factors]]] = {
    "epsilon": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "v_prediction": lambda alpha, sigma: (alpha, -sigma),
    "sample": lambda alpha, sigma: (np.zeros_like(alpha), np.ones_like(alpha)),
}
"""Factors of latents and output in the clean latents, by what the network predicts.

alpha^2 + sigma^2 = 1.
"""


def _table(steps: int, columns: Mapping[int, Factors]) -> Factors:
    """Factors of `steps` steps that remember the clean latents, unless the columns say else."""
    table = np.zeros((steps, COLUMNS))
    table[:, [SCALE, CLEAN_NEW]] = 1
    for column, values in columns.items():
        table[:, column] = values
    return table


def _timesteps(scheduler: Any, first: int) -> NDArray[np.int64]:
    return np.asarray(scheduler.timesteps)[first:].astype(np.int64)


def _ddim(scheduler: Any, first: int) -> Factors:
    kept = np.asarray(scheduler.alphas_cumprod, np.float64)
    now = _timesteps(scheduler, first)
    after = _kept_after(scheduler, now)
    alpha, sigma = np.sqrt(kept[now]), np.sqrt(1 - kept[now])
    keep = np.sqrt(1 - after) / sigma
    latents, output = _DATA[scheduler.config.prediction_type](alpha, sigma)
    use = np.sqrt(after) - keep * alpha
    columns = {REMEMBER_LATENTS: latents, REMEMBER_OUTPUT: output, KEEP: keep, USE_NEW: use}
    return _table(len(now), columns)


def _kept_after(scheduler: Any, now: NDArray[np.int64]) -> Factors:
    """`alphas_cumprod` a whole step of the schedule after each of these timesteps."""
    kept = np.asarray(scheduler.alphas_cumprod, np.float64)
    then = now - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return np.where(then >= 0, kept[np.maximum(then, 0)], float(scheduler.final_alpha_cumprod))


def _plms(scheduler: Any, first: int) -> Factors:
    kept = np.asarray(scheduler.alphas_cumprod, np.float64)
    now = _timesteps(scheduler, first)
    level, after = kept[now], _kept_after(scheduler, now)
    # The second call takes the step of the first one again, from the same latents.
    again = slice(1, 2)
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    level[again], after[again] = kept[now[again] + stride], kept[now[again]]
    is_v = scheduler.config.prediction_type == "v_prediction"
    keep, use = _plms_update(level, after, is_v=is_v)
    weights = use[:, None] * _PLMS[np.minimum(np.arange(len(now)), len(_PLMS) - 1)]
    # With x1 = keep0 * x0 + use0 * e0, the first latents x0 are linear in x1 and e0.
    keep[again] /= keep[0]
    weights[again, 1] -= keep[again] * use[0]
    seen = kept[now] if is_v else after
    latents, output = _plms_clean(seen, after, is_v=is_v)
    columns = {REMEMBER_OUTPUT: np.ones(len(now)), KEEP: keep, USE_NEW: weights[:, 0]}
    table = _table(len(now), columns | {CLEAN_LATENTS: latents, CLEAN_NEW: output})
    table[:, USE_FORMER:] = weights[:, 1:]
    return table


_PLMS = np.array(
    [
        [1, 0, 0, 0, 0],
        [1 / 2, 1 / 2, 0, 0, 0],
        [3 / 2, 0, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 0, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, 0, -9 / 24],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24, 0],
    ]
)
"""Weights of the output and of former ones; the last row stands for all further steps.

The output of the second step counts in that step alone.
"""


def _plms_update(level: Factors, after: Factors, *, is_v: bool) -> tuple[Factors, Factors]:
    """Factors of the latents and of the averaged output, formula (9) of arXiv:2202.09778."""
    below = level * np.sqrt(1 - after) + np.sqrt(level * (1 - level) * after)
    keep, use = np.sqrt(after / level), (level - after) / below
    if is_v:
        return keep + use * np.sqrt(1 - level), use * np.sqrt(level)
    return keep, use


def _plms_clean(seen: Factors, after: Factors, *, is_v: bool) -> tuple[Factors, Factors]:
    """Factors of the latents at level `after`, and of an output for level `seen`, in the clean
    latents.
    """
    alpha, sigma = np.sqrt(after), np.sqrt(1 - after)
    if not is_v:
        return 1 / alpha, -sigma / alpha
    # The levels are angles: the latents are cos * clean + sin * noise, v is cos * noise - sin *
    # clean.
    apart = np.sqrt(seen) * alpha + np.sqrt(1 - seen) * sigma
    return np.sqrt(seen) / apart, -sigma / apart


def _lcm(scheduler: Any, first: int) -> Factors:
    kept = np.asarray(scheduler.alphas_cumprod, np.float64)
    now = _timesteps(scheduler, first)
    alpha, sigma = np.sqrt(kept[now]), np.sqrt(1 - kept[now])
    latents, output = _DATA[scheduler.config.prediction_type](alpha, sigma)
    scaled = now * scheduler.config.timestep_scaling
    variance = _LCM_SIGMA**2 / (scaled**2 + _LCM_SIGMA**2)
    out = np.sqrt(1 - variance)
    after = np.append(kept[now[1:]], 1.0)  # the last step leaves no noise
    columns = {REMEMBER_LATENTS: out * latents + variance, REMEMBER_OUTPUT: out * output}
    return _table(len(now), columns | {USE_NEW: np.sqrt(after), NOISE: np.sqrt(1 - after)})


_LCM_SIGMA = 0.5
"""Standard deviation of the data, as consistency models were distilled with."""


def _sigmas(scheduler: Any, first: int) -> Factors:
    """The sigma of each step, and the one after the last."""
    # There are more where Euler interpolates log-linearly.
    return np.asarray(scheduler.sigmas, np.float64)[first : len(scheduler.timesteps) + 1]


def _euler(scheduler: Any, first: int) -> Factors:
    sigmas = _sigmas(scheduler, first)
    return _euler_steps(scheduler, sigmas[:-1], sigmas[1:])


def _euler_ancestral(scheduler: Any, first: int) -> Factors:
    sigmas = _sigmas(scheduler, first)
    sigma, after = sigmas[:-1], sigmas[1:]
    # A step goes further down, and noise brings it up again.
    down = after**2 / sigma
    table = _euler_steps(scheduler, sigma, down)
    table[:, NOISE] = np.sqrt(after**2 - down**2)
    return table


def _euler_steps(scheduler: Any, sigma: Factors, after: Factors) -> Factors:
    """Euler's steps from each sigma to the one after."""
    scale = 1 / np.sqrt(1 + sigma**2)
    # These latents are x / alpha; the network is shown x.
    latents, output = _DATA[scheduler.config.prediction_type](scale, sigma * scale)
    keep = after / sigma
    columns = {SCALE: scale, REMEMBER_LATENTS: latents * scale, REMEMBER_OUTPUT: output}
    return _table(len(sigma), columns | {KEEP: keep, USE_NEW: 1 - keep})


def _dpm(scheduler: Any, first: int) -> Factors:
    sigmas = _sigmas(scheduler, first)
    alphas = 1 / np.sqrt(1 + sigmas**2)
    with np.errstate(divide="ignore"):
        logs = -np.log(sigmas)  # of the signal to noise ratio; infinite where no noise is left
    alpha, after, sigma = alphas[:-1], alphas[1:], sigmas[:-1] * alphas[:-1]
    keep = sigmas[1:] * after / sigma
    height = np.diff(logs)
    whole = -after * np.expm1(-height)
    slope = _second_order(scheduler.config, height, after, whole)
    slope[_first_order(scheduler, len(height))] = 0
    latents, output = _DATA[scheduler.config.prediction_type](alpha, sigma)
    columns = {REMEMBER_LATENTS: latents, REMEMBER_OUTPUT: output, KEEP: keep}
    return _table(len(height), columns | {USE_NEW: whole + slope, USE_FORMER: -slope})


_FACTORS: dict[str, Callable[[Any, int], Factors]] = {
    "DDIMScheduler": _ddim,
    "DPMSolverMultistepScheduler": _dpm,
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "EulerDiscreteScheduler": _euler,
    "LCMScheduler": _lcm,
    "PNDMScheduler": _plms,
}


def _second_order(config: Any, height: Factors, after: Factors, whole: Factors) -> Factors:
    """Factor of (data - former data) in each step; the first step's has no meaning."""
    ratio = np.ones_like(height)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio[1:] = height[:-1] / height[1:]
        if config.solver_type == "midpoint":
            return 0.5 * whole / ratio
        return after * (np.expm1(-height) / height + 1) / ratio


def _first_order(scheduler: Any, steps: int) -> list[int]:
    """Steps that use no former prediction: the first of those that run and, if so configured, the
    last.
    """
    config = scheduler.config
    if config.solver_order == 1:
        return list(range(steps))
    last_too = config.euler_at_final or config.final_sigmas_type == "zero"
    short = config.lower_order_final and len(scheduler.timesteps) < 15
    return sorted({0} | ({steps - 1} if last_too or short else set()))
