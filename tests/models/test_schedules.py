"""Our factors beside the schedulers of diffusers, on the host alone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.errors import ConfigError, InvalidParameter
from deployments.pipelines.denoiser import Condition, Denoising
from deployments.pipelines.schedules import (
    COLUMNS,
    KEEP,
    NOISE,
    REMEMBER_LATENTS,
    REMEMBER_OUTPUT,
    SCALE,
    USE_FORMER,
    USE_NEW,
    check_scheduler,
    make_schedule,
)

if TYPE_CHECKING:
    from collections.abc import Callable

# diffusers calls NumPy in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
_PREDICTIONS = ["epsilon", "v_prediction", "sample"]
_SPACINGS = ["linspace", "leading", "trailing"]
_RNG = np.random.default_rng(0)
CLEAN = torch.from_numpy(_RNG.normal(0, 0.5, 32))
NOISY = torch.from_numpy(_RNG.normal(0, 1, 32))
_MIXES = torch.from_numpy(_RNG.normal(0, 1, (7, 32)))


def network(shown: torch.Tensor, step: int) -> torch.Tensor:
    """Anything that depends on what it is shown."""
    return torch.tanh(shown * _MIXES[step % 7]) + 0.1 * _MIXES[(step + 3) % 7]


def run_stock(scheduler: Any, steps: int, skipped: int) -> tuple[list[torch.Tensor], Any]:
    """Latents before, between and after the steps, as a stock img2img pipeline makes them."""
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps)
    own.set_begin_index(skipped * own.order) if hasattr(own, "set_begin_index") else None
    timesteps = own.timesteps[skipped * own.order :]
    latents = [own.add_noise(CLEAN, NOISY, timesteps[:1])]
    draws = {"generator": torch.Generator().manual_seed(7)} if is_drawing(own) else {}
    for i, t in enumerate(timesteps):
        output = network(own.scale_model_input(latents[-1], t), i)
        # Some multiply a float64 of no dimensions by float32, which gives float32.
        before = latents[-1]
        latents.append(own.step(output, t, before, return_dict=False, **draws)[0].double())
    return latents, timesteps.numpy()


def is_drawing(scheduler: Any) -> bool:
    return isinstance(scheduler, (EulerAncestralDiscreteScheduler, LCMScheduler))


def run_ours(scheduler: Any, steps: int, skipped: int) -> tuple[list[torch.Tensor], Any]:
    schedule = make_schedule(scheduler, steps, skipped)
    assert schedule.factors is not None
    assert schedule.scheduler is None
    latents = [CLEAN * schedule.image + NOISY * schedule.noise]
    generator = torch.Generator().manual_seed(7)
    former: list[torch.Tensor] = []
    for i, factors in enumerate(schedule.factors):
        x = latents[-1]
        output = network(factors[SCALE] * x, i)
        new = factors[REMEMBER_LATENTS] * x + factors[REMEMBER_OUTPUT] * output
        after = factors[KEEP] * x + factors[USE_NEW] * new
        for k in np.flatnonzero(factors[USE_FORMER:]):
            after = after + factors[USE_FORMER + k] * former[k]  # there must be one
        if i < schedule.draws:
            drawn = torch.randn(CLEAN.shape, generator=generator, dtype=CLEAN.dtype)
            after = after + factors[NOISE] * drawn
        else:
            assert not factors[NOISE]
        former = [new, *former][: schedule.depth]
        latents.append(after)
    return latents, schedule.timesteps


def assert_same_schedule(scheduler: Any, steps: int, skipped: int) -> float:
    before = copy.deepcopy(scheduler.__dict__)
    (theirs, their_times), (ours, our_times) = (
        run(scheduler, steps, skipped) for run in (run_stock, run_ours)
    )
    assert len(theirs) == len(ours)
    assert np.abs(their_times - our_times).max() <= 1e-3
    apart = max(
        float((a - b).abs().max() / (1 + a.abs().max())) for a, b in zip(theirs, ours, strict=True)
    )
    # The schedulers keep their own factors in float32.
    assert apart <= 2e-5
    for name, value in before.items():
        if not isinstance(value, torch.Tensor) and name not in ("timesteps", "_timesteps"):
            assert scheduler.__dict__[name] == value
    return apart


@st.composite
def ddim(draw: st.DrawFn) -> Any:
    return DDIMScheduler(
        **BETAS,
        clip_sample=False,
        prediction_type=draw(st.sampled_from(_PREDICTIONS)),
        timestep_spacing=draw(st.sampled_from(_SPACINGS)),
        set_alpha_to_one=draw(st.booleans()),
        steps_offset=draw(st.integers(0, 1)),
    )


@st.composite
def euler(draw: st.DrawFn) -> Any:
    spread = draw(st.sampled_from([None, "use_karras_sigmas", "use_exponential_sigmas"]))
    return EulerDiscreteScheduler(
        **BETAS,
        prediction_type=draw(st.sampled_from(_PREDICTIONS)),
        timestep_spacing=draw(st.sampled_from(_SPACINGS)),
        steps_offset=draw(st.integers(0, 1)),
        final_sigmas_type=draw(st.sampled_from(["zero", "sigma_min"])),
        interpolation_type=draw(st.sampled_from(["linear", "log_linear"]))
        if not spread
        else "linear",
        **({spread: True} if spread else {}),
    )


@st.composite
def dpm(draw: st.DrawFn) -> Any:
    spread = draw(
        st.sampled_from([None, "use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas"])
    )
    return DPMSolverMultistepScheduler(
        **BETAS,
        solver_order=draw(st.integers(1, 2)),
        prediction_type=draw(st.sampled_from(_PREDICTIONS)),
        timestep_spacing=draw(st.sampled_from(_SPACINGS)),
        solver_type=draw(st.sampled_from(["midpoint", "heun"])),
        lower_order_final=draw(st.booleans()),
        euler_at_final=draw(st.booleans()),
        # Else the last two sigmas may be equal, where the stock scheduler divides 0 by 0.
        final_sigmas_type="zero" if spread else draw(st.sampled_from(["zero", "sigma_min"])),
        **({spread: True} if spread else {}),
    )


@st.composite
def pndm(draw: st.DrawFn) -> Any:
    return PNDMScheduler(
        **BETAS,
        skip_prk_steps=True,
        prediction_type=draw(st.sampled_from(["epsilon", "v_prediction"])),
        timestep_spacing=draw(st.sampled_from(_SPACINGS)),
        set_alpha_to_one=draw(st.booleans()),
        steps_offset=draw(st.integers(0, 1)),
    )


@st.composite
def euler_ancestral(draw: st.DrawFn) -> Any:
    return EulerAncestralDiscreteScheduler(
        **BETAS,
        prediction_type=draw(st.sampled_from(["epsilon", "v_prediction"])),
        timestep_spacing=draw(st.sampled_from(_SPACINGS)),
        steps_offset=draw(st.integers(0, 1)),
    )


@st.composite
def lcm(draw: st.DrawFn) -> Any:
    return LCMScheduler(
        **BETAS,
        prediction_type=draw(st.sampled_from(_PREDICTIONS)),
        set_alpha_to_one=draw(st.booleans()),
        original_inference_steps=draw(st.sampled_from([31, 50, 100])),
        timestep_scaling=draw(st.sampled_from([1.0, 10.0])),
    )


@pytest.mark.parametrize("kind", [ddim, euler, dpm, pndm, euler_ancestral, lcm])
def test_every_schedule_is_that_of_the_stock_scheduler(kind: Callable[..., Any]) -> None:
    worst = 0.0

    # Few and many steps, all and some of them; a DPM++ schedule changes its last step at 15.
    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(
        scheduler=kind(),
        steps=st.sampled_from([1, 2, 3, 4, 7, 14, 15, 16, 20, 31]),
        share=st.floats(0, 0.999),
    )
    def check(scheduler: Any, steps: int, share: float) -> None:
        nonlocal worst
        worst = max(worst, assert_same_schedule(scheduler, steps, int(steps * share)))

    check()
    print(f"{kind.__name__}: {worst:.1e} apart")


@pytest.mark.parametrize("steps", [100, 150])
@pytest.mark.parametrize("skipped", [0, 70])
@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_a_long_schedule_too(kind: Any, steps: int, skipped: int) -> None:
    assert_same_schedule(kind(**BETAS), steps, skipped)
    assert_same_schedule(kind(**BETAS, use_karras_sigmas=True), steps, skipped)


@pytest.mark.parametrize(
    "options",
    [
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        {"timestep_spacing": "leading", "rescale_betas_zero_snr": True},
    ],
)
@pytest.mark.parametrize(
    "kind", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler]
)
def test_zero_terminal_snr(kind: Any, options: dict[str, Any]) -> None:
    more = {"clip_sample": False} if kind is DDIMScheduler else {}
    scheduler = kind(**BETAS, prediction_type="v_prediction", **options, **more)
    for steps, skipped in ((4, 0), (4, 1), (20, 7)):
        assert_same_schedule(scheduler, steps, skipped)


COMPUTED: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "dpm": (DPMSolverMultistepScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1}),
    "euler ancestral": (EulerAncestralDiscreteScheduler, {}),
    "lcm": (LCMScheduler, {}),
}


@pytest.mark.parametrize("skipped", [0, 3])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", COMPUTED)
def test_every_step_says_what_the_clean_latents_will_be(
    name: str, prediction: str, skipped: int
) -> None:
    """A network that knows them predicts them, whatever each step remembers."""
    kind, options = COMPUTED[name]
    schedule = make_schedule(kind(**BETAS, prediction_type=prediction, **options), 8, skipped)
    kept = DDIMScheduler(**BETAS).alphas_cumprod.double().numpy()
    row = Denoising(
        CLEAN * schedule.image + NOISY * schedule.noise,
        schedule,
        positive=Condition(CLEAN),
        negative=None,
        guidance_scale=1.0,
    )
    assert row.clean is None
    generator = torch.Generator().manual_seed(7)
    row.noises = tuple(torch.randn(32, generator=generator) for _ in range(schedule.draws))
    for t in schedule.timesteps:
        assert schedule.factors is not None
        factors = schedule.factors[row.index]
        alpha = float(np.sqrt(np.interp(t, np.arange(1000), kept)))
        sigma = (1 - alpha**2) ** 0.5
        noise = (row.latents * factors[SCALE] - alpha * CLEAN) / sigma
        output = noise if prediction == "epsilon" else alpha * noise - sigma * CLEAN
        new = factors[REMEMBER_LATENTS] * row.latents + factors[REMEMBER_OUTPUT] * output
        after = factors[KEEP] * row.latents + factors[USE_NEW] * new
        for column in (*range(USE_FORMER, COLUMNS), NOISE):
            if factors[column]:
                after = after + factors[column] * row.beyond(column)
        row.advance(after, after, new)
        assert row.clean is not None
        # PLMS averages v of several levels; after skipped steps it takes latents for a level on.
        is_rough = name == "pndm" and (skipped or prediction == "v_prediction")
        near = 0.25 if is_rough else 0.02
        assert float((row.clean - CLEAN).abs().max()) < near


STEPPED_BY_STOCK: dict[str, tuple[Any, dict[str, Any]]] = {
    "clipped": (DDIMScheduler, {}),
    "thresholded": (DPMSolverMultistepScheduler, {"thresholding": True}),
    "third order": (DPMSolverMultistepScheduler, {"solver_order": 3}),
    "pndm whole": (PNDMScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "lms": (LMSDiscreteScheduler, {}),
    "kdpm2": (KDPM2DiscreteScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "deis": (DEISMultistepScheduler, {}),
}


@pytest.mark.parametrize("name", STEPPED_BY_STOCK)
@pytest.mark.parametrize("skipped", [0, 3])
def test_what_is_not_linear_starts_as_the_stock_scheduler_does(name: str, skipped: int) -> None:
    kind, options = STEPPED_BY_STOCK[name]
    scheduler = kind(**BETAS, **options)
    check_scheduler(scheduler)
    schedule = make_schedule(scheduler, 8, skipped)
    assert schedule.factors is None
    own = copy.deepcopy(scheduler)
    own.set_timesteps(8)
    first = skipped * own.order
    if hasattr(own, "set_begin_index"):
        own.set_begin_index(first)
    timesteps = own.timesteps[first:]
    assert (schedule.timesteps == timesteps.numpy()).all()
    assert schedule.steps == len(timesteps)
    start = own.add_noise(CLEAN, NOISY, timesteps[:1])
    assert (CLEAN * schedule.image + NOISY * schedule.noise - start).abs().max() <= 1e-5
    assert schedule.first_noise == pytest.approx(float(own.init_noise_sigma))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (KDPM2AncestralDiscreteScheduler, {}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        (DPMSolverSinglestepScheduler, {}),
        (DDPMScheduler, {}),
        (LCMScheduler, {"clip_sample": True}),
        (LCMScheduler, {"thresholding": True}),
    ],
)
def test_one_whose_noise_no_seed_fixes_is_refused(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=kind.__name__) as caught:
        check_scheduler(kind(**BETAS, **options))
    assert "DDIMScheduler" in caught.value.remedy


@pytest.mark.parametrize(
    "kind",
    [
        DDIMScheduler,
        EulerDiscreteScheduler,
        DPMSolverMultistepScheduler,
        PNDMScheduler,
        EulerAncestralDiscreteScheduler,
        LCMScheduler,
    ],
)
def test_any_other_is_taken(kind: Any) -> None:
    check_scheduler(kind(**BETAS))


def test_more_steps_than_a_consistency_model_was_distilled_from_are_the_clients_mistake() -> None:
    scheduler = LCMScheduler(**BETAS, original_inference_steps=20)
    assert make_schedule(scheduler, 20).steps == 20
    with pytest.raises(InvalidParameter, match="at most 20 steps") as caught:
        make_schedule(scheduler, 21)
    assert caught.value.value == "21"
