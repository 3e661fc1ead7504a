"""Masks in the engine: stock inpainting's pictures, passes shared with rows that have none."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFilter
from stock import SCHEDULERS, apart, as_row, call_stock, scheduler_like, with_scheduler
from test_mixes import MIXES, draw_request
from test_tiles import FULL, Run, job_of
from test_tiles import comic as comic  # a fixture
from test_tiles import deployment as deployment

from deployments import images
from deployments.contract import ComicRequest, ImageJob
from deployments.errors import DamagedImage, InvalidParameter
from deployments.images import Picture
from deployments.making import Making
from deployments.pipelines.blending import latent_mask, starts_from_noise
from deployments.settings import LimitSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.engine.pipeline import AnyPipeline
    from deployments.engine.row import Pixels, Row

# diffusers calls NumPy in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

TOLERANCE = 1e-4
SIDE_PX = 64
COURSES = [
    *(("sd_ddim", scheduler) for scheduler in SCHEDULERS),
    ("sd_v", "pndm"),
    ("refiner", "ddim"),
    ("refiner", "euler"),
    ("sd_lcm", "lcm"),
]


@dataclass(frozen=True)
class Case:
    """A request with a mask or without, and what the stock pipeline makes of it."""

    request: Any
    picture: Picture
    mask: Pixels | None
    expected: np.ndarray

    def row(self, pipeline: AnyPipeline) -> Row:
        row = as_row(pipeline, self.request, self.picture)
        row.input = replace(row.input, mask=self.mask)
        return row


def inpainting(stock: Any) -> Any:
    """The stock pipeline for masks, of the same model."""
    parts = {name: stock.components.get(name) for name in ("vae", "unet", "scheduler")}
    parts |= {name: stock.components.get(name) for name in ("text_encoder", "tokenizer")}
    if "text_encoder_2" in stock.components:
        more = {name: stock.components[name] for name in ("text_encoder_2", "tokenizer_2")}
        config = ("requires_aesthetics_score", "force_zeros_for_empty_prompt")
        options = {name: stock.config[name] for name in config} | {"add_watermarker": False}
        made: Any = StableDiffusionXLInpaintPipeline(**parts, **more, **options)
    else:
        made = StableDiffusionInpaintPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    made.set_progress_bar_config(disable=True)
    return made


def call_inpainting(stock: Any, request: Any, picture: Picture, mask: Pixels) -> np.ndarray:
    return inpainting(stock)(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or None,
        image=Image.fromarray(picture.rgb),
        mask_image=Image.fromarray(mask),
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        strength=request.strength,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
    ).images[0]


def draw_mask(rng: random.Random) -> Pixels:
    """A hard mask of one to three shapes anywhere, none thinner than a latent."""
    image = Image.new("L", (SIDE_PX, SIDE_PX))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 3)):
        left, top = rng.randint(-9, 50), rng.randint(-9, 50)
        box = (left, top, left + rng.randint(16, 40), top + rng.randint(16, 40))
        rng.choice([draw.rectangle, draw.ellipse])(box, fill=255)
    return np.array(image)


def draw_case(name: str, stock: Any, rng: random.Random, steps: int, *, with_mask: bool) -> Case:
    request = draw_request(name, rng, steps)
    picture = tiny.picture(rng.randrange(9), SIDE_PX, SIDE_PX)
    if not with_mask:
        return Case(request, picture, None, call_stock(stock, request, picture))
    mask = draw_mask(rng)
    return Case(request, picture, mask, call_inpainting(stock, request, picture, mask))


@pytest.mark.parametrize(("name", "scheduler"), COURSES)
def test_masked_rows_equal_stock_inpainting_beside_rows_without_masks(
    name: str,
    scheduler: str,
    tiny_pipeline: Callable[..., AnyPipeline],
    stock: Callable[[str], Any],
    run_together: Callable[..., Any],
) -> None:
    course = scheduler_like(stock(name), scheduler)
    ours, theirs = (with_scheduler(p(name), course) for p in (tiny_pipeline, stock))
    rng = random.Random(f"{name} {scheduler}")
    pool = [draw_case(name, theirs, rng, 1 + i % 4, with_mask=i % 3 < 2) for i in range(9)]
    found, mixed = [], 0
    for _ in range(MIXES):
        cases = rng.sample(pool, rng.randint(3, 6))
        rows = [case.row(ours) for case in cases]
        arrivals = [0, *(rng.choice([0, 0, 1, 2]) for _ in cases[1:])]
        groups = run_together(ours, rows, 8, arrivals=arrivals)
        found.append(apart(ours, rows, [case.expected for case in cases]))
        mixed += sum(len({row.input.mask is None for row in group}) == 2 for group in groups)
    print(f"parity of masks, {name}, {scheduler}: {max(found):.1e}; {mixed} mixed passes")
    assert max(found) <= TOLERANCE
    assert mixed >= MIXES


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("ddim", {"clip_sample": True}),
        ("dpm", {"solver_order": 3}),
        ("euler_a", {"timestep_spacing": "trailing"}),
        ("euler", {"use_karras_sigmas": True}),
    ],
)
def test_masks_work_with_every_kind_of_schedule(
    scheduler: str,
    options: dict[str, Any],
    tiny_pipeline: Callable[..., AnyPipeline],
    stock: Callable[[str], Any],
    run_together: Callable[..., Any],
) -> None:
    """Also where each row is stepped by a scheduler of its own."""
    course = scheduler_like(stock("sd_ddim"), scheduler, **options)
    ours, theirs = (with_scheduler(p("sd_ddim"), course) for p in (tiny_pipeline, stock))
    rng = random.Random(scheduler)
    cases = [draw_case("sd_ddim", theirs, rng, steps, with_mask=True) for steps in (4, 5, 16)]
    rows = [case.row(ours) for case in cases]
    run_together(ours, rows, 8, arrivals=[0, 1, 0])
    assert apart(ours, rows, [case.expected for case in cases]) <= TOLERANCE


def test_soft_masks_equal_stock_inpainting_that_keeps_them_soft(
    tiny_pipeline: Callable[..., AnyPipeline],
    stock: Callable[[str], Any],
    run_together: Callable[..., Any],
) -> None:
    ours, theirs = tiny_pipeline("sd_ddim"), inpainting(stock("sd_ddim"))
    theirs.mask_processor = VaeImageProcessor(
        vae_scale_factor=8, do_normalize=False, do_binarize=False, do_convert_grayscale=True
    )
    hard = Image.fromarray(draw_mask(random.Random(1)))
    mask = np.array(hard.filter(ImageFilter.GaussianBlur(9)))
    assert len(np.unique(latent_mask(mask, 8))) > 9
    request = ComicRequest(prompt="red", steps=5, strength=0.8, seed=3)
    picture = tiny.picture(6)
    made = theirs(
        prompt=request.prompt,
        image=Image.fromarray(picture.rgb),
        mask_image=Image.fromarray(mask),
        num_inference_steps=5,
        guidance_scale=request.guidance_scale,
        strength=0.8,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images[0]
    row = Case(request, picture, mask, made).row(ours)
    run_together(ours, [row])
    assert apart(ours, [row], [made]) <= TOLERANCE


def test_no_stroke_is_too_thin_to_be_seen() -> None:
    for top, thick in ((3, 2), (5, 1), (0, 3)):
        mask = np.zeros((64, 64), np.uint8)
        mask[top : top + thick, 10:50] = 255
        assert latent_mask(mask, 8)[0, 0, 0, 2:7].min() == 1
        assert not latent_mask(mask, 8)[0, 0, 1:].any()


def test_a_model_that_only_changes_pictures_starts_from_the_picture(
    tiny_pipeline: Callable[..., AnyPipeline],
) -> None:
    """Noise alone would be nothing that it knows."""
    scheduler: Any = tiny_pipeline("sd_ddim")._stock.scheduler  # type: ignore[attr-defined]
    assert starts_from_noise(scheduler)
    betas = np.linspace(1e-6, 8e-5, 1000)
    assert not starts_from_noise(type(scheduler)(trained_betas=betas))


# --- through a replica ---


def mask_file(mask: Pixels) -> bytes:
    return images.encode(Picture(mask, None), "png", None)


def square(width: int, height: int, box: tuple[int, int, int, int]) -> Pixels:
    mask = np.zeros((height, width), np.uint8)
    left, top, right, below = box
    mask[top:below, left:right] = 255
    return mask


@pytest.mark.parametrize("detail", ["full", "working"])
async def test_what_the_mask_leaves_out_stays_to_the_bit(detail: str, deployment: Any) -> None:
    request = FULL.model_copy(update={"detail": detail, "mask": "picture"})
    mask = square(260, 200, (30, 40, 110, 90))
    job = job_of(260, 200, request, mask=mask_file(mask), n=2)
    *_, results = [one async for one in deployment.stream(job)]
    before = tiny.picture(1, 200, 260).rgb
    for result in results:
        after = images.decode(result.image, LimitSettings()).rgb
        assert (after[mask == 0] == before[mask == 0]).all()
        assert (after[mask == 255] != before[mask == 255]).mean() > 0.9
    notes = dict(results[0].notes)
    assert notes["masked"] == "The mask marks 8 % of the picture; the rest stays as it was."
    if detail == "full":
        assert notes["tiled"] == (
            "The model worked on every pixel, in the 9 of 20 tiles of 64 x 64 px that the mask "
            "reaches."
        )


async def test_tiles_without_a_mark_take_no_step(deployment: Any) -> None:
    request = FULL.model_copy(update={"mask": "picture"})
    mask = mask_file(square(260, 200, (250, 190, 256, 196)))
    job = job_of(260, 200, request, mask=mask, preview=True)
    told = [one async for one in deployment.stream(job)]
    assert max(one.steps for one in told[:-1]) <= 2
    assert dict(told[-1][0].notes)["tiled"].startswith("The model worked on every pixel, in the 1 ")


def test_a_mask_that_is_white_everywhere_changes_nothing(comic: AnyPipeline) -> None:
    request = FULL.model_copy(update={"strength": 0.5, "steps": 4})
    plain, white = (Run(comic) for _ in range(2))
    picture = tiny.picture(1, 64, 200)
    expected = plain.results([picture], [request])[0]
    making = white.making(picture, request)
    one = replace(making.input, mask=np.full((64, 200), 255, np.uint8))
    output = asyncio.run(white.outputs([Making(one, making._grid, 2)]))[0]
    white.engine.close()
    assert np.abs(output.astype(int) - expected).max() <= 1  # as in other company


async def test_the_pictures_own_alpha_is_a_mask_and_is_filled(deployment: Any) -> None:
    clear = square(120, 90, (20, 20, 60, 70))
    picture = Picture(tiny.picture(1, 90, 120).rgb, 255 - clear)
    request = ComicRequest(steps=2, strength=1.0, seed=7, mask="alpha")
    image = images.encode(picture, "png", None)
    result = await deployment(ImageJob(request, image, "png", 60, width_px=120, height_px=90))
    made = images.decode(result.image, LimitSettings())
    assert made.alpha is None
    assert (made.rgb[clear == 0] == picture.rgb[clear == 0]).all()


@pytest.mark.parametrize(
    ("changes", "mask", "told"),
    [
        ({}, Picture(np.zeros((90, 120), np.uint8), None), "marks nothing"),
        ({}, Picture(np.zeros((90, 100), np.uint8), None), "another size"),
        ({}, tiny.picture(2, 90, 120, with_alpha=True), "both colours and transparency"),
        ({"mask_changes": "transparent"}, tiny.picture(2, 90, 120), "no transparent part"),
        ({"mask": "alpha"}, tiny.picture(2, 90, 120), "no transparent part"),
    ],
)
async def test_a_mask_that_marks_nothing_clearly_is_refused_before_any_step(
    changes: dict[str, Any],
    mask: Picture,
    told: str,
    deployment: Any,
) -> None:
    request = FULL.model_copy(update={"mask": "picture", **changes})
    with pytest.raises(InvalidParameter, match=told):
        await deployment(job_of(120, 90, request, mask=images.encode(mask, "png", None)))


async def test_a_damaged_mask_is_named_before_any_step(deployment: Any) -> None:
    request = FULL.model_copy(update={"mask": "picture"})
    half = images.encode(tiny.picture(2, 90, 120), "png", None)[:4000]
    with pytest.raises(DamagedImage, match=r"^Of the mask: "):
        await deployment(job_of(120, 90, request, mask=half))


async def test_a_result_of_the_working_size_keeps_what_the_mask_leaves_out(deployment: Any) -> None:
    changes = {"detail": "working", "output_size": "working", "mask": "picture"}
    mask = mask_file(square(260, 200, (0, 0, 60, 60)))
    job = job_of(260, 200, FULL.model_copy(update=changes), mask=mask)
    result = await deployment(job)
    assert result.width_px < 260
    after = images.decode(result.image, LimitSettings()).rgb.astype(int)
    before = Image.fromarray(tiny.picture(1, 200, 260).rgb)
    smaller = before.resize((result.width_px, result.height_px), Image.Resampling.LANCZOS)
    assert (after[40:] == np.asarray(smaller)[40:]).all()
