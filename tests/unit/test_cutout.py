"""What a client gets of a picture and the mask that a model found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.torture.scenes import MAGENTA, scene
from deployments.contract import BackgroundRequest
from deployments.cutout import cut_out, laid_on
from deployments.images import Picture
from deployments.notes import Code, note


def cut(picture: Picture, mask: np.ndarray, **fields: Any) -> Picture:
    return cut_out(picture, mask, BackgroundRequest(**fields))


def box(height_px: int, width_px: int, rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((height_px, width_px), np.uint8)
    mask[rows, columns] = 255
    return mask


def noise(height_px: int, width_px: int) -> Picture:
    rng = np.random.default_rng(0)
    return Picture(rng.integers(0, 256, (height_px, width_px, 3), np.uint8), None)


def test_by_default_the_old_background_is_gone_from_the_edge() -> None:
    truth = scene(MAGENTA)
    found = cut(Picture(truth.seen, None), truth.alpha)
    original = cut(Picture(truth.seen, None), truth.alpha, edges="original")
    assert (original.rgb == truth.seen).all()
    assert truth.edge_error(found.rgb) < truth.edge_error(original.rgb) / 2
    assert found.alpha is not None
    assert (found.alpha == truth.alpha).all()


def test_a_colour_lies_below_the_estimated_foreground() -> None:
    truth = scene(MAGENTA)
    found = cut(Picture(truth.seen, None), truth.alpha, output="color", color="#00ff00").rgb
    share = truth.alpha[..., None] / 255
    ideal = truth.subject * share + np.array([0, 255, 0]) * (1 - share)
    edge = (truth.alpha > 25) & (truth.alpha < 230)
    assert np.abs(found[edge] - ideal[edge]).mean() < 4


def test_a_picture_that_was_cut_out_before_is_not_cut_twice() -> None:
    """The model sees its soft edge on white, and finds the same edge again."""
    truth = scene((255, 255, 255))
    found = cut(Picture(truth.subject, truth.alpha), truth.alpha)
    assert found.alpha is not None
    assert (found.alpha == truth.alpha).all()


@pytest.mark.parametrize("output", ["rgba", "mask"])
def test_no_pixel_becomes_more_opaque_than_it_was(output: str) -> None:
    picture = Picture(noise(40, 50).rgb, np.full((40, 50), 77, np.uint8))
    found = cut(picture, np.full((8, 8), 255, np.uint8), output=output)
    alpha = found.rgb if output == "mask" else found.alpha
    assert (alpha == 77).all()


@pytest.mark.parametrize("output", ["rgba", "mask", "color"])
def test_a_crop_holds_the_subject_and_no_more(output: str) -> None:
    mask = box(60, 80, slice(10, 31), slice(25, 70))
    mask[9, 40] = 3  # too faint to count
    found = cut(noise(60, 80), mask, output=output, crop="subject")
    assert found.rgb.shape[:2] == (21, 45)
    assert found.alpha is None or found.alpha.shape == (21, 45)
    assert not found.notes


def test_a_shadow_falls_below_the_subject_and_does_not_touch_it() -> None:
    mask, picture = box(200, 300, slice(60, 120), slice(100, 200)), noise(200, 300)
    plain = cut(picture, mask)
    found = cut(picture, mask, shadow="soft")
    assert plain.alpha is not None
    assert found.alpha is not None
    assert (found.rgb[mask > 0] == plain.rgb[mask > 0]).all()
    assert (found.alpha[mask > 0] == 255).all()
    around = np.where(mask, 0, found.alpha)
    assert (found.rgb[around > 0] == 0).all()
    assert 40 < around[120:124, 150].max() < 128
    assert around[120:130].sum() > 2 * around[50:60].sum()
    assert not around[:30].any()


def test_nothing_casts_no_shadow() -> None:
    nothing = np.zeros((20, 20), np.uint8)
    found = cut(noise(40, 50), nothing, shadow="soft", background="#ffffff")
    assert (found.rgb == 255).all()
    mask = box(40, 50, slice(10, 20), slice(10, 20))
    assert (cut(noise(40, 50), mask, shadow="soft", output="mask").rgb == mask).all()


@pytest.mark.parametrize("level", [0, 255, 128])
def test_in_a_plain_picture_there_is_nothing_to_find(level: int) -> None:
    """Whatever the model imagines there."""
    picture = Picture(np.full((50, 60, 3), level, np.uint8), None)
    imagined = box(50, 60, slice(10, 40), slice(10, 40))
    found = cut(picture, imagined, output="mask", crop="subject")
    assert found.rgb.shape == (50, 60)
    assert not found.rgb.any()
    assert [note.code for note in found.notes] == ["no_foreground"]


def test_one_odd_pixel_makes_a_picture_that_is_not_plain() -> None:
    rgb = np.full((500, 500, 3), 255, np.uint8)
    rgb[251, 333] = 0
    mask = box(500, 500, slice(250, 253), slice(332, 335))
    assert cut(Picture(rgb, None), mask, output="mask").rgb.max() == 255


def test_a_model_that_finds_nothing_is_reported() -> None:
    found = cut(noise(20, 20), np.full((4, 4), 40, np.uint8))
    assert [note.code for note in found.notes] == ["no_foreground"]


def test_a_background_colour_is_what_output_color_gives() -> None:
    truth = scene(MAGENTA)
    picture = Picture(truth.seen, None)
    found = cut(picture, truth.alpha, background="#00ff00")
    other = cut(picture, truth.alpha, output="color", color="#00ff00")
    assert found.alpha is None
    assert (found.rgb == other.rgb).all()


@pytest.mark.parametrize(("height_px", "width_px"), [(40, 40), (20, 80), (80, 20)])
def test_a_background_picture_covers_the_result_from_its_middle(
    height_px: int, width_px: int
) -> None:
    """Left half red, right half blue, whatever its size."""
    below = np.zeros((height_px, width_px, 3), np.uint8)
    below[:, : width_px // 2], below[:, width_px // 2 :] = (255, 0, 0), (0, 0, 255)
    alpha = box(30, 30, slice(10, 20), slice(10, 20))
    subject = Picture(np.full((30, 30, 3), (0, 99, 0), np.uint8), alpha)
    found = laid_on(subject, Picture(below, None))
    assert (found.alpha, found.rgb.shape) == (None, (30, 30, 3))
    assert (found.rgb[10:20, 10:20] == (0, 99, 0)).all()
    assert (found.rgb[:8, :4] == (255, 0, 0)).all()
    assert (found.rgb[:8, -4:] == (0, 0, 255)).all()


def test_what_a_background_loses_is_said_and_its_gaps_are_white() -> None:
    lost = note(Code.FRAMES_DROPPED, "The first of 2 frames was used.")
    clear = Picture(np.zeros((5, 5, 3), np.uint8), np.zeros((5, 5), np.uint8), (lost,))
    found = laid_on(Picture(np.zeros((5, 5, 3), np.uint8), np.zeros((5, 5), np.uint8)), clear)
    assert (found.rgb == 255).all()
    assert dict(found.notes) == {
        "frames_dropped": "Of the background: The first of 2 frames was used."
    }


def test_a_background_of_any_size_covers_the_result() -> None:
    """Rounding must not reach over its edge."""
    rng = np.random.default_rng(1)
    for width, height, below_width, below_height in (
        (361, 52, 246, 312),
        *rng.integers(1, 400, (60, 4)).tolist(),
    ):
        subject = Picture(np.zeros((height, width, 3), np.uint8), None)
        below = Picture(np.zeros((below_height, below_width, 3), np.uint8), None)
        assert laid_on(subject, below).rgb.shape == (height, width, 3)
