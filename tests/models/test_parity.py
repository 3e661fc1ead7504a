"""Our pipelines in the engine give what a call of the stock diffusers pipeline gives."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from stock import apart, as_row, call_stock

from deployments.contract import BackgroundRequest, ComicRequest, UpscaleRequest
from deployments.pipelines.matting import Matting
from deployments.pipelines.nets.isnet import ISNet, ISNetWidths

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deployments.contract import DiffusionRequest
    from deployments.engine.pipeline import AnyPipeline
    from deployments.engine.row import Row

TOLERANCE = 2e-5  # 1e-4 is the promise; sums are added in another order than the stock layout
IMG2IMG = ["sd_ddim", "sd_pndm", "sd_v", "sd_lcm", "refiner"]
SIZES = [(1, 1), (9, 31), (40, 40), (41, 100), (130, 12), (200, 205)]
PROMPTS = [
    ("comic book drawing", "blurry"),
    ("", ""),
    ("old photograph of a cat", "colour"),
    ("red", "blue"),
]


def requests(name: str, guidance_scale: float) -> list[DiffusionRequest]:
    """Four requests that may share a batch and differ in all that a row may choose."""
    kind = UpscaleRequest if name == "x4" else ComicRequest
    extra = {} if name == "x4" else {"strength": 0.5}
    return [
        kind(
            prompt=prompt,
            negative_prompt=negative,
            guidance_scale=guidance_scale,
            steps=6,
            seed=seed,
            **extra,
        )
        for seed, (prompt, negative) in enumerate(PROMPTS)
    ]


def assert_alike(
    pipeline: AnyPipeline, rows: list[Row], expected: list[np.ndarray], what: str
) -> None:
    found = apart(pipeline, rows, expected)
    print(f"parity of {what}: {found:.1e}")
    assert found <= TOLERANCE


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("name", [*IMG2IMG, "x4"])
def test_equals_the_stock_pipeline_alone_and_in_company(
    name: str,
    guidance_scale: float,
    tiny_pipeline: Callable[..., AnyPipeline],
    stock: Callable[[str], Any],
    run_together: Callable[..., None],
) -> None:
    ours = tiny_pipeline(name)
    side_px = 32 if name == "x4" else 64
    pictures = [tiny.picture(i, side_px, side_px) for i in range(4)]
    wanted = requests(name, guidance_scale)
    expected = [call_stock(stock(name), r, p) for r, p in zip(wanted, pictures, strict=True)]

    for i in range(4):
        row = as_row(ours, wanted[i], pictures[i])
        run_together(ours, [row])
        assert row.progress.batch_size == 1
        assert_alike(ours, [row], [expected[i]], f"{name}, guidance {guidance_scale}, alone")

    rows = [as_row(ours, r, p) for r, p in zip(wanted, pictures, strict=True)]
    run_together(ours, rows)
    assert [row.progress.batch_size for row in rows] == [4] * 4
    assert_alike(ours, rows, expected, f"{name}, guidance {guidance_scale}, four together")


@pytest.mark.parametrize("name", [*IMG2IMG, "x4"])
def test_the_tiny_models_heed_prompt_seed_and_picture(
    name: str, stock: Callable[[str], Any]
) -> None:
    """Else parity would hold for rows that were mixed up."""
    side_px = 32 if name == "x4" else 64
    first, *others = requests(name, 5.0)
    here, there = tiny.picture(0, side_px, side_px), tiny.picture(1, side_px, side_px)
    base = call_stock(stock(name), first, here)
    # A model that was distilled with guidance knows no negative prompt, but the scale.
    other = {"guidance_scale": 9.0} if name == "sd_lcm" else {"negative_prompt": "colour"}
    changed = [
        call_stock(stock(name), first.model_copy(update={"prompt": others[1].prompt}), here),
        call_stock(stock(name), first.model_copy(update=other), here),
        call_stock(stock(name), first.model_copy(update={"seed": 9}), here),
        call_stock(stock(name), first, there),
    ]
    assert min(float(np.abs(image - base).max()) for image in changed) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["sd_pndm", "refiner"])
def test_a_picture_of_its_buckets_size_comes_back_as_the_stock_pipelines(
    name: str,
    tiny_pipeline: Callable[..., AnyPipeline],
    stock: Callable[[str], Any],
    run_together: Callable[..., None],
) -> None:
    ours = tiny_pipeline(name, buckets=((64, 64), (128, 64), (64, 128)))
    picture = tiny.picture(5, height_px=64, width_px=128)
    request = requests(name, 5.0)[0]
    row = as_row(ours, request, picture)
    assert (row.input.pixels == picture.rgb).all()
    run_together(ours, [row])
    expected = call_stock(stock(name), request, picture)
    assert_alike(ours, [row], [expected], f"{name}, 128x64 bucket")
    rounded = (expected * 255).round().astype(int)
    result = ours.restore(row.future.result(), picture, request)
    assert np.abs(result.rgb - rounded).max() <= 1


@pytest.mark.parametrize("strength", [0.25, 0.99, 1.0])
def test_every_strength_equals_the_stock_pipeline(
    strength: float,
    tiny_pipeline: Callable[..., AnyPipeline],
    stock: Callable[[str], Any],
    run_together: Callable[..., None],
) -> None:
    for name in IMG2IMG:
        request = ComicRequest(prompt="red", steps=5, strength=strength, seed=3)
        picture = tiny.picture(6)
        row = as_row(tiny_pipeline(name), request, picture)
        run_together(tiny_pipeline(name), [row])
        expected = call_stock(stock(name), request, picture)
        assert_alike(tiny_pipeline(name), [row], [expected], f"{name}, strength {strength}")


def test_the_upscaler_decodes_in_the_stock_tiles(
    tiny_pipeline: Callable[..., AnyPipeline],
    tiny_folder: Callable[[str], Path],
    run_together: Callable[..., None],
) -> None:
    stock = tiny.STOCK["x4"].from_pretrained(tiny_folder("x4"))
    stock.set_progress_bar_config(disable=True)
    picture = tiny.picture(7, height_px=64, width_px=96)
    request = UpscaleRequest(steps=2, seed=1, noise_level=350)
    ours = tiny_pipeline("x4", tile_px=256)
    row = as_row(ours, request, picture)
    run_together(ours, [row])
    whole = call_stock(stock, request, picture)
    stock.vae.enable_tiling()
    tiled = call_stock(stock, request, picture)
    assert np.abs(whole - tiled).max() > TOLERANCE
    assert_alike(ours, [row], [tiled], "x4 in tiles")


@pytest.mark.parametrize("name", ["srvgg", "rrdb"])
def test_a_tiled_upscale_equals_the_whole(
    name: str, tiny_pipeline: Callable[..., AnyPipeline], run_together: Callable[..., None]
) -> None:
    tiled, whole = tiny_pipeline(name, tile_px=40), tiny_pipeline(name, tile_px=256)
    picture = tiny.picture(8, height_px=87, width_px=110)
    request = UpscaleRequest()
    ours, expected = as_row(tiled, request, picture), as_row(whole, request, picture)
    run_together(tiled, [ours])
    run_together(whole, [expected])
    # Equal but for the order of sums, which may tip a value at a half.
    apart = np.abs(ours.future.result().astype(int) - expected.future.result())
    print(f"parity of {name} in tiles: {apart.max()} of 255, in {(apart > 0).mean():.1e} of values")
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-3


@pytest.mark.parametrize(
    ("name", "height_px", "width_px"),
    [
        *(("srvgg", *size) for size in SIZES),
        *(("rrdb", *size) for size in SIZES if max(size) < 200),
        ("rrdb", 110, 105),
        pytest.param("rrdb", 200, 205, marks=pytest.mark.slow),
    ],
)
def test_an_upscale_of_any_size_equals_the_plain_network(
    name: str,
    height_px: int,
    width_px: int,
    tiny_pipeline: Callable[..., AnyPipeline],
    run_together: Callable[..., None],
) -> None:
    """Whether the picture is larger than a window or smaller, alone or beside one of another."""
    pipeline: Any = tiny_pipeline(name, tile_px=40)
    request = UpscaleRequest()
    picture = tiny.picture(9, height_px, width_px)
    rows = [as_row(pipeline, request, p) for p in (picture, tiny.picture(10, 36, 35))]
    run_together(pipeline, rows)
    x = torch.from_numpy(picture.rgb)[None].permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        plain = pipeline._net(x)[0].clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy()
    apart = np.abs(rows[0].future.result() - plain)
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-3


def test_tiles_of_rows_of_different_sizes_share_a_step(
    tiny_pipeline: Callable[..., AnyPipeline], run_together: Callable[..., None]
) -> None:
    pipeline = tiny_pipeline("srvgg", tile_px=32)
    request = UpscaleRequest()
    sizes = [(96, 96), (128, 96), (96, 128), (128, 128)]
    pictures = [tiny.picture(i, *size) for i, size in enumerate(sizes)]
    alone = [as_row(pipeline, request, p) for p in pictures]
    for row in alone:
        run_together(pipeline, [row])
    together = [as_row(pipeline, request, p) for p in pictures]
    run_together(pipeline, together)
    assert max(row.progress.batch_size for row in together) > 1
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one.future.result().astype(int) - other.future.result()).max() <= 1


@pytest.mark.parametrize("stretch", [True, False])
def test_matting_equals_the_plain_network(
    stretch: bool,
    tiny_folder: Callable[[str], Path],
    own_folder: Callable[[str], Path],
    run_together: Callable[..., None],
) -> None:
    folder = own_folder("isnet")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"stretch": stretch}))
    pipeline = Matting(tiny.spec("isnet", folder), folder)
    net = ISNet(ISNetWidths(**config["widths"]))
    net.load_state_dict(load_file(tiny_folder("isnet") / "model.safetensors"))
    net.eval()
    pictures = [tiny.picture(i, tiny.ISNET_PX, tiny.ISNET_PX) for i in range(4)]
    rows = [as_row(pipeline, BackgroundRequest(), p) for p in pictures]
    run_together(pipeline, rows)
    for row, picture in zip(rows, pictures, strict=True):
        x = torch.from_numpy(picture.rgb.astype(np.float32) / 255 - 0.5).permute(2, 0, 1)[None]
        with torch.no_grad():
            expected = net(x)[0][0, 0].sigmoid()
        if stretch:
            expected = (expected - expected.min()) / (expected.max() - expected.min())
        assert row.progress.batch_size == 4
        assert_alike(pipeline, [row], [expected.numpy()], f"isnet, stretch {stretch}")


def test_no_generator_is_shared_between_rows_of_one_seed(
    tiny_pipeline: Callable[..., AnyPipeline], run_together: Callable[..., None]
) -> None:
    request = ComicRequest(prompt="red", steps=4, seed=7)
    rows = [as_row(tiny_pipeline("sd_ddim"), request, tiny.picture(1)) for _ in range(4)]
    run_together(tiny_pipeline("sd_ddim"), rows)
    first = rows[0].future.result().astype(int)
    assert all(np.abs(row.future.result() - first).max() <= 1 for row in rows)
