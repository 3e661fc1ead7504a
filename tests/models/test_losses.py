"""What the models lose of a request, or choose for it, is said in the result."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
from test_model import Deployment, TextToImage

from deployments import images
from deployments.contract import (
    BackgroundRequest,
    ComicRequest,
    EnhanceRequest,
    ImageJob,
    UpscaleRequest,
)
from deployments.credentials import Signing, check
from deployments.engine.row import RowInput
from deployments.images import Picture
from deployments.notes import Code, note
from deployments.settings import C2paSettings
from tests.certificates import make_certificates

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from deployments.engine.pipeline import AnyPipeline
    from deployments.engine.row import Pixels

FAST = ComicRequest(steps=2, strength=1.0, guidance_scale=1.0)
GREY = Picture(np.full((24, 24, 3), 90, np.uint8), None)


def lost(pipeline: AnyPipeline, request: Any, seed: int = 1) -> dict[str, str]:
    """What `begin` says: sentences by code."""
    picture = Picture(np.full((64, 64, 3), 90, np.uint8), None)
    row = RowInput(request, pipeline.fit(picture, request), seed, time.monotonic() + 60)
    next(pipeline.begin(row))
    return dict(row.notes)


@pytest.mark.parametrize("name", ["sd_ddim", "refiner"])
def test_a_prompt_that_is_cut_says_by_how_much(
    name: str, tiny_pipeline: Callable[..., AnyPipeline]
) -> None:
    pipeline: Any = tiny_pipeline(name)
    tokenizer = pipeline._tokenizers[-1]
    words = 1
    while len(tokenizer("cat " * words, add_special_tokens=False).input_ids) < 75:
        words += 1
    tokens = len(tokenizer("cat " * (words + 9), add_special_tokens=False).input_ids)
    assert lost(pipeline, FAST.model_copy(update={"prompt": "a cat"})) == {}
    told = lost(pipeline, FAST.model_copy(update={"prompt": "cat " * (words + 9)}))
    assert told == {
        "prompt_cut": f"The model reads 75 tokens of prompt: the last {tokens - 75} of {tokens} "
        "were cut. long_prompt=chunk reads up to 600."
    }
    chunked = FAST.model_copy(update={"prompt": "cat " * (words + 9), "long_prompt": "chunk"})
    assert lost(pipeline, chunked) == {}
    endless = chunked.model_copy(update={"prompt": "cat " * 8 * (words + 9)})
    tokens = len(tokenizer(endless.prompt, add_special_tokens=False).input_ids)
    assert lost(pipeline, endless) == {
        "prompt_cut": f"The model reads 600 tokens of prompt: the last {tokens - 600} of {tokens} "
        "were cut."
    }


def test_brackets_that_are_weights_are_no_tokens(
    tiny_pipeline: Callable[..., AnyPipeline],
) -> None:
    weighted = FAST.model_copy(update={"prompt": "((cat)) " * 30, "prompt_weights": True})
    assert lost(tiny_pipeline("sd_ddim"), weighted) == {}
    plain = weighted.model_copy(update={"prompt_weights": False})
    assert "prompt_cut" in lost(tiny_pipeline("sd_ddim"), plain)


def test_a_negative_prompt_is_said_to_have_no_effect_without_guidance(
    tiny_pipeline: Callable[..., AnyPipeline],
) -> None:
    request = FAST.model_copy(update={"negative_prompt": "blur"})
    assert list(lost(tiny_pipeline("sd_ddim"), request)) == ["negative_prompt_unused"]
    guided = request.model_copy(update={"guidance_scale": 3.0})
    assert lost(tiny_pipeline("sd_ddim"), guided) == {}
    long = guided.model_copy(update={"negative_prompt": "blur " * 300})
    told = lost(tiny_pipeline("sd_ddim"), long)
    assert "of negative_prompt" in told["prompt_cut"]
    distilled = lost(tiny_pipeline("sd_lcm"), long)
    assert "distilled" in distilled["negative_prompt_unused"]
    assert "prompt_cut" not in distilled


def test_a_seed_beyond_the_generator_is_said_to_equal_a_shorter_one(
    tiny_pipeline: Callable[..., AnyPipeline], process: Callable[..., Picture]
) -> None:
    pipeline = tiny_pipeline("sd_ddim")
    assert lost(pipeline, FAST, 2**32 - 1) == {}
    assert "7 is the same" in lost(pipeline, FAST, 2**40 + 7)["seed_shortened"]
    picture = tiny.picture(1, 64, 64)
    one, other = (
        process(pipeline, picture, FAST.model_copy(update={"seed": seed})).rgb
        for seed in (7, 2**40 + 7)
    )
    assert (one == other).all()


def test_a_working_size_is_said(
    tiny_pipeline: Callable[..., AnyPipeline], process: Callable[..., Picture]
) -> None:
    pipeline = tiny_pipeline("sd_ddim", buckets=((64, 64), (128, 64)))
    large = process(pipeline, tiny.picture(1, 200, 400), FAST)
    assert dict(large.notes) == {
        "working_size": "The model worked at 128 x 64 px, 10 % of the picture's 400 x 200 px."
    }
    small = process(pipeline, tiny.picture(1, 30, 30), FAST)
    assert "455 % of the picture's 30 x 30 px" in dict(small.notes)["working_size"]
    assert process(pipeline, tiny.picture(1, 64, 128), FAST).notes == ()


@pytest.mark.parametrize(
    ("name", "request_", "stays"),
    [
        ("srvgg", UpscaleRequest(), True),
        ("x4", UpscaleRequest(steps=1, guidance_scale=1.0), True),
        ("sd_ddim", EnhanceRequest(steps=2, strength=1.0, guidance_scale=1.0), True),
        ("sd_ddim", FAST, False),
    ],
)
def test_a_grey_picture_stays_grey_where_no_colour_was_asked_for(
    name: str,
    request_: Any,
    stays: bool,
    tiny_pipeline: Callable[..., AnyPipeline],
    process: Callable[..., Picture],
) -> None:
    result = process(tiny_pipeline(name), GREY, request_)
    assert result.is_grey == stays
    assert ("grey_kept" in dict(result.notes)) == stays
    coloured = Picture(np.full((24, 24, 3), (90, 60, 30), np.uint8), None)
    assert "grey_kept" not in dict(process(tiny_pipeline(name), coloured, request_).notes)


class Talkative(TextToImage):
    """Says something when a row begins, and when its result is restored."""

    def begin(self, row: RowInput[ComicRequest]) -> Generator[None, None, Pixels]:
        row.notes.extend([note(Code.PROMPT_CUT, "The end was cut.")] * 2)
        return (yield from super().begin(row))

    def restore(self, output: Pixels, picture: Picture | None, request: ComicRequest) -> Picture:
        alpha = np.full(output.shape[:2], 99, np.uint8)
        return Picture(output, alpha, (note(Code.WORKING_SIZE, "It worked at 8 x 8 px."),))


async def test_a_result_has_all_notes_once_and_repeats_them_in_its_metadata() -> None:
    deployment = Deployment(Talkative())
    before = note(Code.FRAMES_DROPPED, "The first of 2 frames was used.")
    request = ComicRequest(output_size="working", steps=2, strength=1.0)
    try:
        result = await deployment(ImageJob(request, None, "jpeg", 60, notes=(before,)))
    finally:
        deployment._host.close()
    codes = [one.code for one in result.notes]
    wanted = ["frames_dropped", "parameter_unused", "seed_drawn", "prompt_cut", "working_size"]
    assert codes == [*wanted, "alpha_dropped"]
    assert "output_size" in result.notes[1].text
    found: Any = images.read_metadata(result.image)["notes"]
    assert found == [{"code": one.code, "text": one.text} for one in result.notes]


@pytest.mark.parametrize("fields", [{"seed": 5}, {"seed": -1}, {}])
async def test_a_seed_is_said_to_be_drawn_where_none_was_sent(fields: dict[str, int]) -> None:
    deployment = Deployment(TextToImage())
    request = ComicRequest(steps=2, strength=1.0, **fields)
    try:
        result = await deployment(ImageJob(request, None, "png", 60))
    finally:
        deployment._host.close()
    assert [one.code for one in result.notes] == ([] if fields.get("seed") == 5 else ["seed_drawn"])
    assert result.seed is not None
    assert (result.seed == 5) == (fields.get("seed") == 5)


def test_a_cut_out_says_what_the_decoder_lost(
    tiny_pipeline: Callable[..., AnyPipeline], process: Callable[..., Picture]
) -> None:
    picture = Picture(GREY.rgb, None, (note(Code.HDR_TONE_MAPPED, "It was HDR."),))
    for output in ("rgba", "mask", "color"):
        result = process(tiny_pipeline("isnet"), picture, BackgroundRequest(output=output))
        assert picture.notes[0] in result.notes


async def test_a_result_is_signed_where_the_operator_has_a_certificate(tmp_path: Path) -> None:
    made = make_certificates(tmp_path)
    deployment = Deployment(TextToImage())
    deployment._signing = Signing(C2paSettings(certificates=made.chain, key=made.key))
    request = ComicRequest(steps=2, strength=1.0, seed=1)
    try:
        result = await deployment(ImageJob(request, None, "webp", 60))
    finally:
        deployment._host.close()
    verdict = check(result.image, made.root.read_bytes())
    assert verdict is not None
    assert verdict.state == "valid"
    model = {"name": "text-to-image", "version": "d" * 16}
    assert verdict.actions[0]["softwareAgent"] == model
    assert images.read_metadata(result.image)["model"] == result.model
