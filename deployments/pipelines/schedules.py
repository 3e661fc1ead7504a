"""Each row's own denoising schedule, as factors of one update that rows of any schedule share.

A diffusers scheduler keeps one step index for all that it steps, so that rows at different points
cannot share it. DDIM, Euler and DPM-Solver++ (2M) are linear in the latents, the network's output
and the last prediction. Their factors depend on the schedule alone and are computed here, on the
host, in float64. With any other scheduler, each row is stepped by a copy of its own.

Sources: DDIM, arXiv:2010.02502; Euler as in arXiv:2206.00364; DPM-Solver++ 2M, arXiv:2211.01095.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from deployments.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

Factors = NDArray[np.float64]
SCALE, DATA_LATENTS, DATA_OUTPUT, KEEP, USE_DATA, USE_FORMER = range(6)
"""Columns of `Schedule.factors`, see there."""
_QUIET = {"DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"}
"""Their `step` takes a generator, but draws nothing the way they are used here."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps of a row, shared by all rows of the same steps and strength.

    With latents x and network output o, step i computes

        data = DATA_LATENTS * x + DATA_OUTPUT * o       the clean latents it predicts
        x    = KEEP * x + USE_DATA * data + USE_FORMER * data of the step before

    and the network is shown SCALE * x.

    Attributes:
        timesteps: (S,) what the network is told.
        factors: (S, 6), or None where `scheduler` steps by itself.
        image, noise: factors of both in latents that start from a picture.
        first_noise: factor of the noise in latents that start from noise alone.
        scheduler: a diffusers scheduler before its first step, which each row copies; None where
            there are factors.
    """

    timesteps: Factors
    factors: Factors | None
    image: float
    noise: float
    first_noise: float
    scheduler: Any

    @property
    def steps(self) -> int:
        """Steps that run."""
        return len(self.timesteps)

    @property
    def multistep(self) -> bool:
        """Whether a step needs the prediction of the one before."""
        return self.factors is not None and bool(self.factors[:, USE_FORMER].any())


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler that draws noise while it steps, because a seed would not fix its result.

    Raises:
        ConfigError: it does; the remedy names schedulers that do not.
    """
    name = type(scheduler).__name__
    stochastic = "sde" in scheduler.config.get("algorithm_type", "")
    draws = "generator" in inspect.signature(scheduler.step).parameters
    if stochastic or (draws and name not in _QUIET):
        raise ConfigError(
            f"The scheduler {name} draws noise at every step, which no request's seed controls.",
            remedy=f"Name one of {', '.join(sorted(_QUIET))} or PNDMScheduler in the model's"
            " scheduler/scheduler_config.json.",
        )


def make_schedule(scheduler: Any, steps: int, skipped: int = 0) -> Schedule:
    """The schedule of `steps` steps without its first `skipped` ones.

    Args:
        scheduler: of diffusers; not changed.
        steps: length of the whole schedule.
        skipped: first steps, which img2img replaces by the picture.
    """
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps)
    first = skipped * own.order
    if hasattr(own, "set_begin_index"):
        own.set_begin_index(first)
    timesteps = np.asarray(own.timesteps, np.float64)
    linear = _linear(own)
    factors = linear(own, timesteps)[first:] if linear else None
    image, noise = _start(own, first)
    pure = float(own.init_noise_sigma)
    return Schedule(timesteps[first:], factors, image, noise, pure, None if linear else own)


def _linear(scheduler: Any) -> Callable[[Any, Factors], Factors] | None:
    """How to compute the factors; None if the scheduler is not known to be linear."""
    name, config = type(scheduler).__name__, scheduler.config
    if config.get("thresholding") or config.get("prediction_type") not in _DATA:
        return None
    if name == "DDIMScheduler" and not config.clip_sample:
        return _ddim
    if name == "EulerDiscreteScheduler":
        return _euler
    plain = config.get("algorithm_type") == "dpmsolver++" and not config.get("use_flow_sigmas")
    if name == "DPMSolverMultistepScheduler" and plain and config.solver_order <= 2:
        return _dpm
    return None


def _start(scheduler: Any, first: int) -> tuple[float, float]:
    """Factors of clean latents and of noise in the latents that a schedule starts from."""
    at = scheduler.timesteps[first : first + 1]
    one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    return float(scheduler.add_noise(one, none, at)), float(scheduler.add_noise(none, one, at))


_DATA: dict[str, Callable[[Factors, Factors], tuple[Factors, Factors]]] = {
    "epsilon": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "v_prediction": lambda alpha, sigma: (alpha, -sigma),
    "sample": lambda alpha, sigma: (np.zeros_like(alpha), np.ones_like(alpha)),
}
"""Factors of latents and output in the clean latents, by what the network predicts.

alpha^2 + sigma^2 = 1.
"""


def _table(scale: Factors, data: tuple[Factors, Factors], *update: Factors) -> Factors:
    return np.stack([scale, *data, *update], axis=1)


def _ddim(scheduler: Any, timesteps: Factors) -> Factors:
    kept = np.asarray(scheduler.alphas_cumprod, np.float64)
    now = timesteps.astype(int)
    then = now - scheduler.config.num_train_timesteps // len(now)
    after = np.where(then >= 0, kept[np.maximum(then, 0)], float(scheduler.final_alpha_cumprod))
    alpha, sigma = np.sqrt(kept[now]), np.sqrt(1 - kept[now])
    keep = np.sqrt(1 - after) / sigma
    data = _DATA[scheduler.config.prediction_type](alpha, sigma)
    use = np.sqrt(after) - keep * alpha
    return _table(np.ones_like(alpha), data, keep, use, np.zeros_like(alpha))


def _euler(scheduler: Any, timesteps: Factors) -> Factors:
    sigmas = np.asarray(scheduler.sigmas, np.float64)
    sigma, after = sigmas[:-1], sigmas[1:]
    scale = 1 / np.sqrt(1 + sigma**2)
    # These latents are x / alpha; the network is shown x.
    latents, output = _DATA[scheduler.config.prediction_type](scale, sigma * scale)
    data = (latents * scale, output)
    keep = after / sigma
    return _table(scale, data, keep, 1 - keep, np.zeros_like(sigma))


def _dpm(scheduler: Any, timesteps: Factors) -> Factors:
    sigmas = np.asarray(scheduler.sigmas, np.float64)
    alphas = 1 / np.sqrt(1 + sigmas**2)
    with np.errstate(divide="ignore"):
        logs = -np.log(sigmas)  # of the signal to noise ratio; infinite where no noise is left
    alpha, after, sigma = alphas[:-1], alphas[1:], sigmas[:-1] * alphas[:-1]
    keep = sigmas[1:] * after / sigma
    height = np.diff(logs)
    whole = -after * np.expm1(-height)
    slope = _second_order(scheduler.config, height, after, whole)
    slope[_first_order(scheduler, len(timesteps))] = 0
    data = _DATA[scheduler.config.prediction_type](alpha, sigma)
    return _table(np.ones_like(alpha), data, keep, whole + slope, -slope)


def _second_order(config: Any, height: Factors, after: Factors, whole: Factors) -> Factors:
    """Factor of (data - former data) in each step; the first step's has no meaning."""
    ratio = np.ones_like(height)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio[1:] = height[:-1] / height[1:]
        if config.solver_type == "midpoint":
            return 0.5 * whole / ratio
        return after * (np.expm1(-height) / height + 1) / ratio


def _first_order(scheduler: Any, steps: int) -> list[int]:
    """Steps that use no former prediction: the first one run and, if so configured, the last."""
    config = scheduler.config
    if config.solver_order == 1:
        return list(range(steps))
    last_too = config.euler_at_final or config.final_sigmas_type == "zero"
    short = config.lower_order_final and steps < 15
    # If img2img skips steps, the first one run has no former prediction either.
    first = {0, scheduler.begin_index or 0}
    return sorted(first | ({steps - 1} if last_too or short else set()))
