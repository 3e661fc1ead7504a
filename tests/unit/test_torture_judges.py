"""The torture set tells the common mistakes with transparent pictures from right results."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from benchmarks.torture.cases import CASES, Case
from benchmarks.torture.judge import judged
from deployments.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Callable

BY_NAME = {case.name: case for case in CASES}
SOFT = [case for case in CASES if "soft edge" in case.name and case.task == Task.ENHANCE]


def pillow(case: Case) -> Image.Image:
    """The case's file, as Pillow reads it."""
    return Image.open(io.BytesIO(case.file)).convert("RGBA")


def fault(case: Case, image: Image.Image) -> str:
    return judged(case, np.asarray(image.convert("RGBA")))


def on_white_with_alpha(image: Image.Image) -> Image.Image:
    laid = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    laid.putalpha(image.getchannel("A"))
    return laid


def enlarged_by_lanczos(image: Image.Image) -> Image.Image:
    return image.resize((image.width * 4, image.height * 4), Image.Resampling.LANCZOS)


@pytest.mark.parametrize("case", SOFT, ids=lambda case: case.name)
def test_an_untouched_picture_is_right_and_a_fringe_is_not(case: Case) -> None:
    image = pillow(case)
    fringed = on_white_with_alpha(image)
    if case.fields.get("output_format") == "jpeg":
        image, fringed = fringed.convert("RGB"), image.convert("RGB")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), pillow(case))
    assert fault(case, image) == ""
    assert fault(case, fringed) != ""


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("upscale, hard edge", enlarged_by_lanczos),
        ("upscale, 2 times", lambda image: image),
        ("enhance, alpha is the picture's", lambda image: image.convert("RGB")),
        ("enhance, turned by EXIF", lambda image: image),
        ("enhance, erased stripes", lambda image: image),
        ("enhance, invisible", lambda image: image.convert("RGB")),
        ("background, edge before magenta", lambda image: image),
        ("background, mask", lambda image: image),
        ("background, crop", lambda image: image),
    ],
)
def test_common_mistakes_are_found(name: str, spoil: Callable[[Image.Image], Image.Image]) -> None:
    case = BY_NAME[name]
    assert fault(case, spoil(pillow(case))) != ""
