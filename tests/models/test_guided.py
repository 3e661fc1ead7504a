"""The guided filter: a coarse mask gets the edges of its picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from deployments.buckets import resize
from deployments.pipelines import guided
from deployments.pipelines.guided import refined

GROUND, SUBJECT = (40, 90, 160), (230, 150, 60)


def blob(height_px: int, width_px: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture of an ellipse with a notch, and its true mask."""
    y, x = np.mgrid[:height_px, :width_px]
    inside = np.hypot(y / height_px - 0.5, x / width_px - 0.5) < 0.3
    inside &= abs(x / width_px - 0.5) > 0.03
    rng = np.random.default_rng(0)
    picture = np.where(inside[..., None], SUBJECT, GROUND) + rng.normal(0, 6, (*inside.shape, 3))
    return picture.clip(0, 255).astype(np.uint8), (inside * 255).astype(np.uint8)


def coarse(mask: np.ndarray, side_px: int = 160) -> np.ndarray:
    """As a network of few pixels gives it: small, soft and a little beside the edge."""
    small = Image.fromarray(mask).resize((side_px, side_px)).filter(ImageFilter.GaussianBlur(3))
    return np.roll(np.asarray(small), 2, axis=1)


def error(mask: np.ndarray, truth: np.ndarray) -> float:
    return float(abs(mask.astype(int) - truth).mean())


def test_a_coarse_mask_finds_the_edges_of_its_picture() -> None:
    picture, truth = blob(400, 600)
    mask = coarse(truth)
    found = refined(mask, resize(picture, 160, 160), picture)
    assert error(found, truth) < error(resize(mask, 600, 400), truth) / 2
    assert ((found > 127) != (truth > 127)).mean() < 0.01


@pytest.mark.parametrize("level", [0, 255])
def test_a_mask_of_one_value_stays_as_it_is(level: int) -> None:
    picture, _ = blob(90, 130)
    mask = np.full((64, 64), level, np.uint8)
    assert (refined(mask, resize(picture, 64, 64), picture) == level).all()


def test_a_picture_without_edges_gives_the_mask_none() -> None:
    _, truth = blob(160, 160)
    mask, plain = coarse(truth), np.full((160, 160, 3), 90, np.uint8)
    steps = np.abs(np.diff(refined(mask, plain, plain).astype(int), axis=1))
    assert steps.max() <= np.abs(np.diff(mask.astype(int), axis=1)).max() * 1.25


def test_strips_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    picture, truth = blob(500, 300)
    mask, guide = coarse(truth), resize(picture, 160, 160)
    in_strips = refined(mask, guide, picture).astype(int)
    monkeypatch.setattr(guided, "_STRIP_ROWS", 500)
    assert abs(refined(mask, guide, picture) - in_strips).max() <= 1


@pytest.mark.parametrize(("height_px", "width_px"), [(1, 1), (1, 700), (33, 2)])
def test_pictures_of_any_size(height_px: int, width_px: int) -> None:
    picture = np.full((height_px, width_px, 3), 200, np.uint8)
    mask = np.full((32, 32), 128, np.uint8)
    found = refined(mask, resize(picture, 32, 32), picture)
    assert found.shape == (height_px, width_px)
    assert abs(found.astype(int) - 128).max() <= 1
