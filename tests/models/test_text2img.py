"""Pictures from texts: their sizes, their previews, and what the negative prompt of SDXL is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
from stock import as_row

from deployments.contract import GenerateRequest
from deployments.engine.pipeline import result_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.pipelines.text2img import Text2Img

BUCKETS = ((64, 64), (128, 64))


@pytest.fixture
def pipeline(tiny_pipeline: Callable[..., Any]) -> Any:
    return tiny_pipeline("txt_sd", buckets=BUCKETS)


@pytest.mark.parametrize(
    ("asked", "worked", "size"),
    [
        ({}, (64, 64), (64, 64)),
        ({"width": 128, "height": 64}, (128, 64), (128, 64)),
        ({"width": 100, "height": 50}, (128, 64), (100, 50)),
        ({"height": 40}, (64, 64), (40, 40)),
        ({"width": 300, "height": 200}, (128, 64), (300, 200)),
    ],
)
def test_a_result_has_the_size_that_was_asked_for(
    asked: dict[str, int],
    worked: tuple[int, int],
    size: tuple[int, int],
    pipeline: Text2Img,
    run_together: Callable[..., Any],
) -> None:
    request = GenerateRequest(prompt="a red ball", steps=1, guidance_scale=1.0, **asked)
    row = as_row(pipeline, request, None)
    run_together(pipeline, [row], 4)
    output = row.future.result()
    assert output.shape == (worked[1], worked[0], 3)
    result = pipeline.restore(output, None, request)
    assert (result.width_px, result.height_px) == size
    assert [note.code for note in result.notes] == ([] if worked == size else ["working_size"])


def test_what_is_cut_off_is_the_same_on_both_sides(pipeline: Text2Img) -> None:
    output = np.zeros((64, 128, 3), np.uint8)
    output[:, 32:96] = 255
    request = GenerateRequest(width=64, height=64)
    assert (pipeline.restore(output, None, request).rgb == 255).all()


def test_requests_of_other_steps_guidance_and_seeds_share_passes(
    pipeline: Text2Img, run_together: Callable[..., Any]
) -> None:
    requests = [
        GenerateRequest(prompt="a red ball", steps=2 + k, guidance_scale=1.0 + k, seed=k)
        for k in range(3)
    ]
    groups = run_together(pipeline, [as_row(pipeline, one, None) for one in requests], 4)
    assert max(len(group) for group in groups) == 3


def test_a_preview_is_a_small_picture_of_the_scene(
    pipeline: Text2Img, run_together: Callable[..., Any]
) -> None:
    row = as_row(pipeline, GenerateRequest(prompt="a red ball", steps=3, guidance_scale=1.0), None)
    assert (
        pipeline.preview(row.input, result_of(pipeline.begin(row.input))) is None
    )  # before the first step
    run_together(pipeline, [row], 4)
    preview = pipeline.preview(row.input, row.state)
    assert preview is not None
    # All noise is gone after the last step: the preview shows what the result shows.
    difference = np.abs(preview.astype(int) - row.future.result())
    assert difference.mean() < 8


def test_an_empty_negative_prompt_of_sdxl_stands_for_zeros(
    tiny_pipeline: Callable[..., Any],
) -> None:
    """As it was trained; a text of its own is encoded."""
    pipeline = tiny_pipeline("txt_xl")
    pixels = pipeline.fit(None, GenerateRequest())
    assert not pipeline._condition("", pixels, is_negative=True).text.any()
    assert pipeline._condition("", pixels, is_negative=False).text.any()
    assert pipeline._condition("blurry", pixels, is_negative=True).text.any()


def test_a_model_without_buckets_is_refused(tiny_folder: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="need at least one"):
        tiny.spec("txt_sd", tiny_folder("txt_sd"), buckets=())
