"""Noise is a row's own, and means the same in every dtype unless stock's is wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
import torch
from stock import as_row, scheduler_like, with_scheduler

from deployments.contract import ComicRequest, UpscaleRequest
from deployments.pipelines.noise import Noise

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from deployments.engine.pipeline import AnyPipeline
    from deployments.pipelines.denoiser import Denoising

# diffusers calls NumPy in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

HALVES = [torch.float16, torch.bfloat16]
SHAPE = (1, 4, 8, 8)


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def returned(pieces: Generator[None, None, Any]) -> Any:
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def begun(pipeline: AnyPipeline, request: Any) -> Denoising:
    """The state of a row before its first step."""
    side_px = 16 if isinstance(request, UpscaleRequest) else 64
    row = as_row(pipeline, request, tiny.picture(2, side_px, side_px))
    return returned(pipeline.begin(row.input))


def psnr_db(image: np.ndarray, expected: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((image.astype(float) - expected) ** 2) / 255**2 + 1e-12))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_noise_is_drawn_in_float32_and_rounded(dtype: torch.dtype) -> None:
    whole = generator()
    expected = [torch.randn(SHAPE, generator=whole) for _ in range(4)]
    noise = Noise(5)
    first = noise.draw(SHAPE, dtype, "cpu")
    others = returned(noise.draw_steps(3, first, dtype))
    for drawn, one in zip((first, *others), expected, strict=True):
        assert drawn.dtype == dtype
        assert (drawn == one.to(dtype)).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_noise_of_the_models_precision_is_stocks(dtype: torch.dtype) -> None:
    # torch draws other values in half precision, here only where their number is no multiple of 16.
    shape = (1, 1, 1, 17)
    drawn = Noise(5, "model").draw(shape, dtype, "cpu")
    assert (drawn == torch.randn(shape, generator=generator(), dtype=dtype)).all()
    same = bool((drawn == Noise(5).draw(shape, dtype, "cpu")).all())
    assert same == (dtype == torch.float32)


@pytest.mark.parametrize("precision", ["float32", "model"])
def test_a_model_draws_as_its_registry_entry_says(
    precision: str,
    tiny_pipeline: Callable[..., AnyPipeline],
    stock: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The autoencoder's noise, the start's, that of the x4 upscaler's picture, and the steps'."""
    dtypes: list[torch.dtype] = []
    whole = torch.randn

    def randn(*shape: Any, **options: Any) -> torch.Tensor:
        dtypes.append(options["dtype"])
        return whole(*shape, **options)

    monkeypatch.setattr(torch, "randn", randn)
    for name, kind in (("sd_ddim", ComicRequest), ("x4", UpscaleRequest)):
        pipeline = tiny_pipeline(name, dtype="bfloat16", noise=precision)
        pipeline = with_scheduler(pipeline, scheduler_like(stock(name), "lcm"))
        begun(pipeline, kind(prompt="red", steps=4, seed=3))
    assert len(dtypes) == (2 + 1) + (2 + 3)
    assert set(dtypes) == {torch.float32 if precision == "float32" else torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["sd_ddim", "refiner", "x4"])
def test_a_row_of_a_half_precision_model_starts_as_that_of_float32_does(
    name: str,
    dtype: str,
    tiny_pipeline: Callable[..., AnyPipeline],
    stock: Callable[[str], Any],
) -> None:
    course = scheduler_like(stock(name), "euler_a")
    whole, rounded = (
        with_scheduler(tiny_pipeline(name, **spec), course) for spec in ({}, {"dtype": dtype})
    )
    kind = UpscaleRequest if name == "x4" else ComicRequest
    request = kind(prompt="red", steps=4, seed=3)
    expected, ours = (begun(pipeline, request) for pipeline in (whole, rounded))
    assert len(expected.noises) == expected.schedule.draws > 0
    for one, other in zip(ours.noises, expected.noises, strict=True):
        assert (one == other.to(one.dtype)).all()
    size = float(expected.latents.abs().max())
    assert float((ours.latents - expected.latents).abs().max()) < 0.01 * size
    if expected.picture is not None and ours.picture is not None:
        assert float((ours.picture - expected.picture).abs().max()) < 0.02


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler_a", "lcm"])
def test_a_seed_gives_the_same_picture_in_half_precision(
    scheduler: str,
    tiny_pipeline: Callable[..., AnyPipeline],
    stock: Callable[[str], Any],
    run_together: Callable[..., Any],
) -> None:
    course = scheduler_like(stock("sd_ddim"), scheduler)
    request, picture = ComicRequest(prompt="red", steps=4, strength=1.0, seed=8), tiny.picture(3)

    def run(request: ComicRequest, **spec: Any) -> np.ndarray:
        pipeline: Any = with_scheduler(tiny_pipeline("sd_ddim", **spec), course)
        row = as_row(pipeline, request, picture)
        run_together(pipeline, [row])
        return row.future.result()

    expected, rounded = run(request), run(request, dtype="bfloat16")
    other = run(request.model_copy(update={"seed": 9}))
    print(f"{scheduler}: {psnr_db(rounded, expected):.0f} dB, {psnr_db(other, expected):.0f} dB")
    assert psnr_db(rounded, expected) > 38
    assert psnr_db(other, expected) < 30
