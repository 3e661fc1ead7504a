"""Sizes, alpha, colours and early ends of each family, from a decoded picture to the result."""

from __future__ import annotations

import io
import itertools
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from stock import as_row
from torch import nn

from deployments import images
from deployments.buckets import resize
from deployments.contract import (
    BackgroundRequest,
    ComicRequest,
    EnhanceRequest,
    UpscaleRequest,
)
from deployments.errors import ModelCorrupt, ModelFailed
from deployments.images import Picture
from deployments.notes import Code, note
from deployments.pipelines import upscale_gan
from deployments.pipelines.upscale_diffusion import UpscaleDiffusion
from deployments.settings import LimitSettings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deployments.engine.pipeline import AnyPipeline
    from deployments.engine.row import Row

FAST = ComicRequest(steps=2, strength=0.5, guidance_scale=1.0, seed=1)
EXTREMES = [(1, 1), (1, 10_000), (10_000, 1), (1, 2), (63, 65)]
PHOTOS = [(3000, 4000), (4000, 3000), (300, 533), (2, 3)]


def begun(pipeline: AnyPipeline, row: Row) -> Any:
    """The row's state before its first step."""
    pieces = pipeline.begin(row.input)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def size(picture: Picture) -> tuple[int, int]:
    return picture.height_px, picture.width_px


def count_calls(monkeypatch: pytest.MonkeyPatch, net: nn.Module, after: Callable[[], None]) -> list:
    """Each forward pass appends to the list, then does `after`."""
    calls: list[None] = []
    forward = net.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        calls.append(None)
        after()
        return result

    monkeypatch.setattr(net, "forward", counting)
    return calls


# --- image to image ---


@pytest.mark.parametrize("name", ["sd_ddim", "sd_pndm", "sd_lcm", "refiner"])
def test_a_preview_shows_each_step(name: str, tiny_pipeline: Callable[..., AnyPipeline]) -> None:
    pipeline = tiny_pipeline(name)
    row = as_row(pipeline, ComicRequest(prompt="red", steps=6, seed=1), tiny.picture(1))
    state = begun(pipeline, row)
    assert pipeline.preview(row.input, state) is None
    shown = []
    for _ in range(pipeline.steps(state)):
        pipeline.step([state])
        shown.append(pipeline.preview(row.input, state))
        assert shown[-1].shape == (8, 8, 3)
    assert all((a != b).any() for a, b in itertools.pairwise(shown))


def test_a_model_that_was_distilled_with_guidance_takes_one_place_in_a_pass(
    tiny_pipeline: Callable[..., AnyPipeline], process: Callable[..., Picture]
) -> None:
    places: list[tuple[int, ...]] = []
    for name in ("sd_lcm", "sd_ddim"):
        pipeline: Any = tiny_pipeline(name)
        unet = pipeline.denoiser.unet
        hook = unet.register_forward_hook(lambda _, inputs, __: places.append(inputs[0].shape))
        request = ComicRequest(prompt="red", steps=2, strength=0.5, guidance_scale=5.0, seed=1)
        process(pipeline, tiny.picture(1), request)
        hook.remove()
    assert [shape[0] for shape in places] == [1, 2]
    costs = [
        tiny_pipeline(name).cost_px(as_row(tiny_pipeline(name), request, tiny.picture(1)).input)
        for name in ("sd_lcm", "sd_ddim")
    ]
    assert costs == [64 * 64, 2 * 64 * 64]
    works = [tiny_pipeline(name).work(64, 64, request) for name in ("sd_lcm", "sd_ddim")]
    assert works[1].step_px == 2 * works[0].step_px


@pytest.mark.parametrize(("height_px", "width_px"), [*PHOTOS, *EXTREMES])
@pytest.mark.parametrize("name", ["sd_ddim", "refiner"])
def test_img2img_gives_back_the_pictures_size(
    name: str,
    height_px: int,
    width_px: int,
    tiny_pipeline: Callable[..., AnyPipeline],
    process: Callable[..., Picture],
) -> None:
    pipeline = tiny_pipeline(name, buckets=((64, 64), (128, 64), (64, 128)))
    picture = Picture(np.full((height_px, width_px, 3), 90, np.uint8), None)
    result = process(pipeline, picture, FAST)
    assert size(result) == (height_px, width_px)
    assert result.rgb.dtype == np.uint8
    assert result.alpha is None


@pytest.mark.parametrize(("height_px", "width_px"), [(48, 96), (200, 30), (1, 1)])
def test_img2img_keeps_alpha_and_notes(
    height_px: int,
    width_px: int,
    tiny_pipeline: Callable[..., AnyPipeline],
    process: Callable[..., Picture],
) -> None:
    seen = tiny.picture(1, height_px, width_px, with_alpha=True)
    picture = Picture(seen.rgb, seen.alpha, (note(Code.FRAMES_DROPPED, "One of 12."),))
    pipeline = tiny_pipeline("sd_ddim")
    result = process(pipeline, picture, FAST)
    assert (result.alpha == picture.alpha).all()
    assert [one.code for one in result.notes] == ["frames_dropped", "working_size"]

    working = process(pipeline, picture, FAST.model_copy(update={"output_size": "working"}))
    assert max(size(working)) == 64
    assert working.alpha.shape == working.rgb.shape[:2]


def test_the_working_size_is_the_buckets_content(
    tiny_pipeline: Callable[..., AnyPipeline], process: Callable[..., Picture]
) -> None:
    pipeline = tiny_pipeline("sd_ddim", buckets=((64, 64), (128, 64)))
    request = FAST.model_copy(update={"output_size": "working"})
    assert size(process(pipeline, tiny.picture(1, 300, 400), request)) == (48, 64)
    assert size(process(pipeline, tiny.picture(1, 100, 200), request)) == (64, 128)
    assert size(process(pipeline, tiny.picture(1, 3, 6), request)) == (64, 128)


@pytest.mark.parametrize("name", ["sd_ddim", "refiner", "x4"])
def test_only_the_working_size_keeps_rows_from_sharing_a_step(
    name: str, tiny_pipeline: Callable[..., AnyPipeline]
) -> None:
    buckets = () if name == "x4" else ((64, 64), (128, 64))
    pipeline = tiny_pipeline(name, buckets=buckets)
    request: Any = UpscaleRequest(steps=2, seed=1) if name == "x4" else FAST

    def key(picture: Picture, **changes: Any) -> object:
        changed = request.model_copy(update=changes)
        return pipeline.key(begun(pipeline, as_row(pipeline, changed, picture)))

    square, wide = tiny.picture(1, 64, 64), tiny.picture(1, 64, 128)
    own = {"noise_level": 99} if name == "x4" else {"strength": 0.9}
    changes = [{"prompt": "red", "negative_prompt": "blue", "seed": 9}, {"steps": 4}, own]
    changes += [{"guidance_scale": 2.0}, {"guidance_scale": 1.0}]
    assert {key(square, **change) for change in changes} == {key(square)}
    assert key(tiny.picture(2, 64, 64)) == key(square)
    assert key(wide) != key(square)


@pytest.mark.parametrize(
    ("name", "request_", "height_px", "width_px", "cost_px"),
    [
        ("sd_ddim", ComicRequest(guidance_scale=1.0), 640, 640, 64 * 64),
        ("sd_ddim", ComicRequest(guidance_scale=1.1), 640, 640, 2 * 64 * 64),
        ("refiner", ComicRequest(guidance_scale=5.0), 8, 8, 2 * 64 * 64),
        ("x4", UpscaleRequest(guidance_scale=1.0), 33, 16, 40 * 16),
        ("x4", UpscaleRequest(guidance_scale=9.0), 33, 16, 2 * 40 * 16),
        ("srvgg", UpscaleRequest(), 20, 40, 32 * 64),
        ("srvgg", UpscaleRequest(), 2000, 30, (64 + 2 * 5) * 32),
        ("isnet", BackgroundRequest(), 2000, 30, tiny.ISNET_PX**2),
    ],
)
def test_the_network_pixels_of_a_step(
    name: str,
    request_: Any,
    height_px: int,
    width_px: int,
    cost_px: int,
    tiny_pipeline: Callable[..., AnyPipeline],
) -> None:
    pipeline = tiny_pipeline(name)
    row = as_row(pipeline, request_, tiny.picture(1, height_px, width_px))
    assert pipeline.cost_px(row.input) == cost_px


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("sd_ddim", ComicRequest(steps=10, strength=0.5, guidance_scale=5.0)),
        ("sd_v", ComicRequest(steps=7, strength=1.0, guidance_scale=1.0)),
        ("refiner", EnhanceRequest(steps=10, strength=0.3, detail="working")),
        ("x4", UpscaleRequest(steps=3, guidance_scale=9.0)),
        ("srvgg", UpscaleRequest()),
        ("isnet", BackgroundRequest()),
    ],
)
def test_what_a_request_is_estimated_to_take_is_what_it_takes(
    name: str, request_: Any, tiny_pipeline: Callable[..., AnyPipeline]
) -> None:
    pipeline = tiny_pipeline(name)
    for height_px, width_px in ((64, 64), (33, 70)):
        work = pipeline.work(width_px, height_px, request_)
        row = as_row(pipeline, request_, tiny.picture(1, height_px, width_px))
        assert work.steps == pipeline.steps(begun(pipeline, row))
        # Tiles at the edges are smaller than what one costs at most.
        assert work.step_px == pytest.approx(pipeline.cost_px(row.input), rel=0.2)


# --- upscaling by diffusion ---


@pytest.mark.parametrize(("height_px", "width_px"), [(31, 33), (8, 8), (1, 1), (1, 40), (7, 64)])
def test_diffusion_upscales_exactly_four_times(
    height_px: int,
    width_px: int,
    tiny_pipeline: Callable[..., AnyPipeline],
    process: Callable[..., Picture],
) -> None:
    picture = tiny.picture(1, height_px, width_px, with_alpha=True)
    request = UpscaleRequest(steps=1, guidance_scale=1.0, seed=0)
    result = process(tiny_pipeline("x4"), picture, request)
    assert size(result) == (4 * height_px, 4 * width_px)
    assert result.alpha.shape == result.rgb.shape[:2]


# --- upscaling by GAN ---


@pytest.mark.parametrize(("height_px", "width_px"), [(1, 1), (300, 257), (64, 64), (65, 1)])
def test_a_gan_upscales_exactly_four_times(
    height_px: int,
    width_px: int,
    tiny_pipeline: Callable[..., AnyPipeline],
    process: Callable[..., Picture],
) -> None:
    picture = tiny.picture(1, height_px, width_px, with_alpha=True)
    result = process(tiny_pipeline("srvgg", tile_px=64), picture, UpscaleRequest())
    assert size(result) == (4 * height_px, 4 * width_px)
    assert result.alpha.shape == result.rgb.shape[:2]


@pytest.mark.parametrize(("scale", "network"), [(2, "rrdb"), (2, "srvgg"), (3, "srvgg")])
def test_a_network_of_another_scale_enlarges_by_it(
    scale: int, network: str, tmp_path: Path, process: Callable[..., Picture]
) -> None:
    """Sizes that are no multiple of what the network folds, and asked for less or more."""
    config = {"architecture": network, "num_feat": 8, "scale": scale}
    config |= {"num_block": 1, "num_grow_ch": 4} if network == "rrdb" else {"num_conv": 2}
    net = upscale_gan.build_net(config)
    assert net is not None
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    pipeline = tiny.pipeline(tiny.spec(network, tmp_path, times=scale, tile_px=32))
    for height_px, width_px in ((1, 1), (31, 140)):
        picture = tiny.picture(1, height_px, width_px, with_alpha=True)
        result = process(pipeline, picture, UpscaleRequest())
        assert size(result) == (height_px * scale, width_px * scale)
        assert size(process(pipeline, picture, UpscaleRequest(scale=2))) == (
            height_px * 2,
            width_px * 2,
        )


def test_a_network_of_another_scale_than_its_entry_is_refused(
    tiny_folder: Callable[[str], Path],
) -> None:
    with pytest.raises(ModelCorrupt, match="times: 4"):
        tiny.pipeline(tiny.spec("srvgg", tiny_folder("srvgg"), times=2))


@pytest.mark.parametrize("name", ["srvgg", "x4"])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"scale": 2}, (62, 80)), ({"scale": 3}, (93, 120)), ({"width": 100}, (78, 100))],
)
def test_less_than_four_times_is_the_models_result_shrunk(
    name: str,
    fields: dict[str, int],
    expected: tuple[int, int],
    tiny_pipeline: Callable[..., AnyPipeline],
    process: Callable[..., Picture],
) -> None:
    picture = tiny.picture(1, 31, 40, with_alpha=True)
    whole, less = (
        process(
            tiny_pipeline(name), picture, UpscaleRequest(steps=1, guidance_scale=1.0, seed=0, **f)
        )
        for f in ({}, fields)
    )
    assert size(less) == expected
    assert less.alpha.shape == expected
    assert np.abs(less.rgb.mean((0, 1)) - whole.rgb.mean((0, 1))).max() < 1


@pytest.mark.parametrize(
    ("tile_px", "overlap_px"), [(32, 5), (64, 32), (64, 64), (256, 10), (512, 34)]
)
def test_windows_keep_each_pixel_once_and_see_around_it(tile_px: int, overlap_px: int) -> None:
    for side_px in (*range(1, 3 * tile_px), 5000):
        windows = upscale_gan.side_windows(side_px, tile_px, overlap_px)
        ends = [window.start + window.length for window in windows]
        assert [window.first for window in windows] == [0, *(w.end for w in windows[:-1])]
        assert windows[-1].end == side_px
        assert max(ends) <= side_px or len(windows) == 1
        for window, end in zip(windows, ends, strict=True):
            assert window.start == 0 or window.first - window.start >= overlap_px
            assert end >= side_px or end - window.end >= overlap_px
            assert window.first < window.end


@pytest.mark.parametrize(
    ("side_px", "lengths"),
    [(1, [32]), (33, [64]), (65, [74]), (75, [64, 32]), (138, [74, 74]), (290, [74, *[64] * 4])],
)
def test_windows_are_about_alike_without_a_narrow_rest(side_px: int, lengths: list[int]) -> None:
    """So that their costs are, from which the engine learns."""
    assert [w.length for w in upscale_gan.side_windows(side_px, 64, 5)] == lengths


def test_a_tile_of_nan_fails_the_picture(
    tiny_pipeline: Callable[..., AnyPipeline],
    process: Callable[..., Picture],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline: Any = tiny_pipeline("srvgg", tile_px=32)
    whole, seen = pipeline._net.forward, []

    def spoilt(x: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(x)
        return whole(x, **options) * (float("nan") if len(seen) == 2 else 1)

    monkeypatch.setattr(pipeline._net, "forward", spoilt)
    with pytest.raises(ModelFailed, match="NaN"):
        process(pipeline, tiny.picture(1, 64, 64), UpscaleRequest())
    assert len(seen) == 4


# --- few shapes ---


@pytest.mark.parametrize("overlap_px", [5, 32])
def test_windows_of_any_picture_have_few_lengths(overlap_px: int) -> None:
    """Nine for each side, so that tiles have 81 shapes at most."""
    sides = range(1, 3000)
    windows = [w for side in sides for w in upscale_gan.side_windows(side, 256, overlap_px)]
    assert len({window.length for window in windows}) == 9


@pytest.mark.parametrize(("name", "most"), [("srvgg", 81), ("rrdb", 81), ("isnet", 1)])
def test_pictures_of_many_sizes_reach_the_network_in_few_shapes(
    name: str,
    most: int,
    tiny_pipeline: Callable[..., AnyPipeline],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch prepares something for each shape and keeps it, and malloc loses what lies between."""
    pipeline: Any = tiny_pipeline(name, tile_px=256)
    seen: list[tuple[int, ...]] = []

    def quick(x: torch.Tensor, **_: Any) -> Any:
        height, width = x.shape[2:]
        seen.append((height, width))
        if name == "isnet":
            return [x[:, :1]]
        return x.new_zeros(len(x), 3, 4 * height, 4 * width)

    monkeypatch.setattr(pipeline._net, "forward", quick)
    request: Any = BackgroundRequest() if name == "isnet" else UpscaleRequest()
    sides = np.random.default_rng(0).integers(1, 500, (80, 2))
    for height_px, width_px in sides.tolist():
        picture = Picture(np.zeros((height_px, width_px, 3), np.uint8), None)
        state = begun(pipeline, as_row(pipeline, request, picture))
        for _ in range(pipeline.steps(state)):
            pipeline.step([state])
    assert len(seen) >= 80
    assert len(set(seen)) <= most


# --- matting ---


@pytest.mark.parametrize(("height_px", "width_px"), [(64, 64), (90, 37), (1, 1), (1, 500)])
def test_matting_gives_the_pictures_size_in_every_form(
    height_px: int,
    width_px: int,
    tiny_pipeline: Callable[..., AnyPipeline],
    process: Callable[..., Picture],
) -> None:
    pipeline, picture = tiny_pipeline("isnet"), tiny.picture(1, height_px, width_px)
    rgba = process(pipeline, picture, BackgroundRequest(edges="original"))
    assert (rgba.rgb == picture.rgb).all()
    assert rgba.alpha.shape == (height_px, width_px)

    mask = process(pipeline, picture, BackgroundRequest(output="mask"))
    assert mask.alpha is None
    assert (mask.rgb == rgba.alpha).all()

    request = BackgroundRequest(output="color", color="#ff8000", edges="original")
    colour = process(pipeline, picture, request)
    assert colour.alpha is None
    share = rgba.alpha[..., None] / 255
    expected = picture.rgb * share + np.array([255, 128, 0]) * (1 - share)
    assert np.abs(colour.rgb - expected).max() <= 0.51


@pytest.mark.parametrize(
    ("config", "bilinear"),
    [({}, True), ({"stretch": False}, False), ({"resize": "lanczos"}, False)],
)
def test_matting_reads_a_picture_as_its_network_was_trained(
    config: dict[str, Any], bilinear: bool, own_folder: Callable[[str], Path]
) -> None:
    folder = own_folder("isnet")
    whole = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(whole))
    picture = tiny.picture(3, 150, 97)
    seen = tiny.pipeline(tiny.spec("isnet", folder)).fit(picture, BackgroundRequest())
    side = tiny.ISNET_PX
    x = torch.from_numpy(picture.rgb).permute(2, 0, 1)[None].float()
    theirs = nn.functional.interpolate(x, (side, side), mode="bilinear")[0].permute(1, 2, 0).numpy()
    if bilinear:
        assert np.abs(seen - theirs).max() < 0.51
    else:
        assert (seen == resize(picture.rgb, side, side)).all()


@pytest.mark.parametrize("name", ["sd_ddim", "srvgg", "x4"])
def test_models_never_see_what_lies_below_clear_pixels(
    name: str, tiny_pipeline: Callable[..., AnyPipeline]
) -> None:
    pipeline, seen = tiny_pipeline(name), tiny.picture(1, 64, 64)
    request: Any = FAST if name == "sd_ddim" else UpscaleRequest(steps=1)
    alpha = np.zeros((64, 64), np.uint8)
    alpha[20:44, 20:44] = 255
    shown = []
    for hidden in (0, 255):
        rgb = np.where(alpha[..., None] == 0, np.uint8(hidden), seen.rgb)
        file = io.BytesIO()
        Image.fromarray(np.dstack([rgb, alpha])).save(file, "PNG")
        picture = images.decode(file.getvalue(), LimitSettings())
        shown.append(pipeline.fit(picture, request))
    assert (shown[0] == shown[1]).all()


def test_matting_sees_a_transparent_picture_on_white(
    tiny_pipeline: Callable[..., AnyPipeline],
) -> None:
    rgb = np.full((90, 90, 3), (0, 160, 0), np.uint8)
    alpha = np.zeros((90, 90), np.uint8)
    alpha[30:60, 30:60] = 255
    shown = tiny_pipeline("isnet").fit(Picture(rgb, alpha), BackgroundRequest())
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert shown[len(shown) // 2, len(shown) // 2].tolist() == [0, 160, 0]


@pytest.mark.parametrize("share", [0, 255])
def test_the_colour_shows_where_the_foreground_does_not(
    share: int, tiny_pipeline: Callable[..., AnyPipeline]
) -> None:
    picture = tiny.picture(1, 9, 7)
    mask = np.full((tiny.ISNET_PX, tiny.ISNET_PX), share, np.uint8)
    request = BackgroundRequest(output="color", color="#010203", edges="original")
    result = tiny_pipeline("isnet").restore(mask, picture, request)
    assert (result.rgb == (picture.rgb if share else np.array([1, 2, 3]))).all()


def test_a_mask_of_nan_fails_its_row_alone(
    tiny_pipeline: Callable[..., AnyPipeline],
    run_together: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline: Any = tiny_pipeline("isnet")
    whole = pipeline._net.forward

    def spoilt(x: torch.Tensor, sides: int) -> list[torch.Tensor]:
        logits = whole(x, sides)
        logits[0][2, 0, 5, 5] = float("nan")
        return logits

    monkeypatch.setattr(pipeline._net, "forward", spoilt)
    request = BackgroundRequest()
    rows = [as_row(pipeline, request, tiny.picture(i)) for i in range(4)]
    run_together(pipeline, rows)
    assert [type(row.future.exception()) for row in rows].count(ModelFailed) == 1
    assert isinstance(rows[2].future.exception(), ModelFailed)


# --- abandoned rows ---


@pytest.mark.parametrize("name", ["sd_ddim", "sd_pndm", "refiner", "x4"])
@pytest.mark.parametrize("leaving", [1, 2])
def test_rows_leave_at_the_next_step(
    name: str,
    leaving: int,
    tiny_pipeline: Callable[..., AnyPipeline],
    run_together: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipeline: Any = tiny_pipeline(name)
    if name == "x4":
        request: Any = UpscaleRequest(steps=6, seed=0)
    else:
        request = ComicRequest(steps=6, strength=1.0, seed=0)
    picture = tiny.picture(1, 32, 32)
    rows = [as_row(pipeline, request, picture) for _ in range(2)]

    def leave() -> None:
        if len(calls) == 3:
            for row in rows[:leaving]:
                row.cancel()

    calls = count_calls(monkeypatch, pipeline.denoiser.unet, leave)
    groups = run_together(pipeline, rows)
    assert not caplog.records
    assert [len(group) for group in groups[:3]] == [2] * 3
    if leaving == 2:
        assert len(calls) == 3
    else:
        assert groups[3:] == [[rows[1]]] * (len(calls) - 3)
        assert len(calls) in (6, 7)  # PNDM makes one more
        assert rows[1].future.result().ndim == 3
    # The pipeline is none the worse for it.
    again = as_row(pipeline, request, picture)
    run_together(pipeline, [again])
    assert again.future.result().ndim == 3


def test_a_gan_stops_at_the_next_tile(
    tiny_pipeline: Callable[..., AnyPipeline],
    run_together: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline: Any = tiny_pipeline("srvgg", tile_px=32)
    request = UpscaleRequest()
    row = as_row(pipeline, request, tiny.picture(1, 128, 128))
    calls = count_calls(monkeypatch, pipeline._net, lambda: len(calls) == 2 and row.cancel())
    run_together(pipeline, [row])
    assert len(calls) == 2


def test_a_broken_prompt_fails_alone(
    tiny_pipeline: Callable[..., AnyPipeline],
    run_together: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline: Any = tiny_pipeline("sd_ddim")
    pipeline._texts.clear()
    encoder, tokenizer = pipeline._stock.text_encoder, pipeline._stock.tokenizer
    whole = encoder.forward
    bad = tokenizer("poison", padding="max_length", return_tensors="pt").input_ids

    def picky(ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if (ids == bad).all(dim=1).any():
            raise RuntimeError("shape mismatch")
        return whole(ids, *args, **kwargs)

    monkeypatch.setattr(encoder, "forward", picky)
    prompts = ["a", "b", "poison", "c"]
    requests = [FAST.model_copy(update={"prompt": prompt}) for prompt in prompts]
    rows = [as_row(pipeline, request, tiny.picture(1)) for request in requests]
    groups = run_together(pipeline, rows)
    failed = [isinstance(row.future.exception(), ModelFailed) for row in rows]
    assert failed == [False, False, True, False]
    assert set(groups[0]) == {rows[0], rows[1], rows[3]}


@pytest.mark.parametrize("stage", ["latents", "picture"])
@pytest.mark.parametrize("name", ["sd_ddim", "x4"])
def test_a_picture_of_nan_fails_its_row_alone(
    name: str,
    stage: str,
    tiny_pipeline: Callable[..., AnyPipeline],
    run_together: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever the NaN comes from, it is found where the host waits for the picture anyway."""
    pipeline: Any = tiny_pipeline(name)
    request: Any = UpscaleRequest(steps=2, seed=0) if name == "x4" else FAST
    rows = [as_row(pipeline, request, tiny.picture(i, 32, 32)) for i in range(3)]
    unet, decoder = pipeline.denoiser.unet, pipeline.autoencoder.vae.decoder
    if stage == "latents":
        whole = unet.forward

        def spoilt(*args: Any, **kwargs: Any) -> Any:
            output = whole(*args, **kwargs)
            if output[0].shape[0] >= 3:
                output[0][1, 0, 0, 0] = float("nan")
            return output

        monkeypatch.setattr(unet, "forward", spoilt)
    else:
        calls: list[None] = []
        end = decoder.conv_out.forward

        def blotted(x: torch.Tensor) -> torch.Tensor:
            calls.append(None)
            return end(x) * (float("inf") if len(calls) == 2 else 1)

        monkeypatch.setattr(decoder.conv_out, "forward", blotted)
    run_together(pipeline, rows)
    errors = [row.future.exception() for row in rows]
    assert [type(error) for error in errors].count(ModelFailed) == 1
    assert errors.count(None) == 2


# --- prompts ---


@pytest.fixture(params=["sd_ddim", "refiner", "x4"])
def encoded(
    request: pytest.FixtureRequest,
    tiny_pipeline: Callable[..., AnyPipeline],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Any, list[str]]:
    """A pipeline, and the texts it has encoded from now on."""
    pipeline: Any = tiny_pipeline(request.param)
    pipeline._texts.clear()
    texts: list[str] = []
    whole = pipeline._stock.encode_prompt

    def counting(text: str, **options: Any) -> Any:
        texts.append(text)
        return whole(text, **options)

    monkeypatch.setattr(pipeline._stock, "encode_prompt", counting)
    return pipeline, texts


def ask(pipeline: Any, prompt: str, negative_prompt: str, guidance_scale: float = 5.0) -> Row:
    kind = UpscaleRequest if isinstance(pipeline, UpscaleDiffusion) else ComicRequest
    asked = kind(
        prompt=prompt,
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        steps=2,
        seed=0,
    )
    return as_row(pipeline, asked, tiny.picture(1, 16, 16))


def test_each_text_is_encoded_once(
    encoded: tuple[Any, list[str]], run_together: Callable[..., Any]
) -> None:
    pipeline, texts = encoded
    rows = [ask(pipeline, p, n) for p, n in [("a", "b"), ("a", "c"), ("b", "a"), ("a", "b")]]
    run_together(pipeline, rows)
    assert sorted(texts) == ["a", "b", "c"]
    run_together(pipeline, [ask(pipeline, "a", "unread", 1.0), ask(pipeline, "c", "c")])
    assert sorted(texts) == ["a", "b", "c"], "and what has no effect is not encoded at all"


def test_the_texts_known_are_few_and_go_with_the_weights(encoded: tuple[Any, list[str]]) -> None:
    pipeline, texts = encoded
    pipeline.to("cpu")
    for i in range(100):
        for row in (ask(pipeline, "often", "", 1.0), ask(pipeline, f"once {i}", "", 1.0)):
            for _ in pipeline.begin(row.input):
                break  # The text comes first.
    assert texts.count("often") == 1
    assert len(texts) == 101
    assert len(pipeline._texts._known) == 64
    pipeline.to("cpu")
    assert not pipeline._texts._known
    next(pipeline.begin(ask(pipeline, "often", "", 1.0).input))
    assert texts.count("often") == 2
