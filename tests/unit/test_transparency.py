"""Transparent pictures keep their edges: no colour from below them, no halo around them."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.torture.scenes import disc
from deployments.transparency import WHITE, extended, laid_over, scaled


def halves(height_px: int, width_px: int) -> np.ndarray:
    """Green to the left, blue to the right."""
    rgb = np.zeros((height_px, width_px, 3), np.uint8)
    rgb[:, : width_px // 2, 1] = 160
    rgb[:, width_px // 2 :, 2] = 160
    return rgb


@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 255, 255), (255, 0, 255)])
def test_hidden_colours_have_no_effect(hidden: tuple[int, int, int]) -> None:
    alpha, rgb = disc(), np.full((64, 64, 3), (0, 160, 0), np.uint8)
    rgb[alpha == 0] = hidden
    assert (extended(rgb, alpha) == (0, 160, 0)).all()


def test_colours_go_on_beyond_the_edge_they_are_next_to() -> None:
    alpha, rgb = disc(), halves(64, 64)
    found = extended(rgb, alpha)
    assert (found[alpha >= 16] == rgb[alpha >= 16]).all()
    assert found[32, 2].tolist() == pytest.approx([0, 160, 0], abs=30)
    assert found[32, -3].tolist() == pytest.approx([0, 0, 160], abs=30)


def test_what_is_nearly_clear_counts_for_little() -> None:
    """Programs that premultiply keep such colours with few bits."""
    alpha, rgb = np.full((32, 32), 1, np.uint8), np.full((32, 32, 3), (255, 0, 255), np.uint8)
    alpha[:, :16], rgb[:, :16] = 255, (0, 160, 0)
    found = extended(rgb, alpha)[:, 16:20].astype(int)
    assert np.abs(found - (0, 160, 0)).max() < 50


def test_an_invisible_picture_is_white() -> None:
    rgb = np.full((5, 9, 3), (1, 2, 3), np.uint8)
    assert (extended(rgb, np.zeros((5, 9), np.uint8)) == 255).all()


@pytest.mark.parametrize(("height_px", "width_px"), [(1, 1), (1, 700), (513, 3), (300, 301)])
def test_one_visible_pixel_gives_its_colour_to_all(height_px: int, width_px: int) -> None:
    rgb, alpha = np.zeros((height_px, width_px, 3), np.uint8), np.zeros((height_px, width_px))
    rgb[-1, -1], alpha[-1, -1] = (9, 99, 199), 255
    assert (extended(rgb, alpha.astype(np.uint8)) == (9, 99, 199)).all()


def test_laid_over_is_what_a_screen_shows() -> None:
    rgb, alpha = np.full((1, 3, 3), (200, 100, 0), np.uint8), np.array([[255, 51, 0]], np.uint8)
    expected = [[200, 100, 0], [244, 224, 204], [255, 255, 255]]
    assert laid_over(rgb, alpha, WHITE)[0].tolist() == expected
    below = np.full((1, 3, 3), 255, np.uint8)
    assert laid_over(rgb, alpha, below)[0].tolist() == expected


@pytest.mark.parametrize("factor", [0.3, 0.5, 1, 2, 4, 3.7])
def test_a_hard_alpha_is_scaled_without_a_ring(factor: float) -> None:
    alpha = np.zeros((40, 40), np.uint8)
    alpha[10:30, 10:30] = 255
    side = round(40 * factor)
    found = scaled(alpha, side, side)
    centres = (np.arange(side) + 0.5) / factor
    inside, outside = (centres > 12) & (centres < 28), (centres < 8) | (centres > 32)
    reach = max(1, 1 / factor)
    inside &= np.abs(centres - 20) < 10 - 2 * reach
    outside &= np.abs(centres - 20) > 10 + 2 * reach
    assert (found[np.ix_(inside, inside)] == 255).all()
    assert (found[outside] == 0).all()


def test_an_enlarged_alpha_keeps_its_area_and_its_levels() -> None:
    alpha = disc()
    found = scaled(alpha, 256, 256)
    assert found.mean() == pytest.approx(alpha.mean(), rel=0.01)
    assert np.abs(found[2::4, 2::4].astype(int) - alpha).mean() < 3
