"""Cut-outs keep the colours of their subject, and none of what it stood before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.torture.scenes import BLACK, MAGENTA, scene
from deployments import foreground
from deployments.foreground import estimate_foreground

REFERENCE = Path(__file__).with_name("pymatting.npz")
"""`scene(MAGENTA, 60, 80)`, and its foreground by pymatting 1.1.16, `estimate_foreground_ml`."""


@pytest.mark.parametrize("background", [MAGENTA, BLACK, (255, 255, 255)])
def test_the_edge_loses_at_least_nine_tenths_of_the_old_background(
    background: tuple[int, int, int],
) -> None:
    seen = scene(background)
    found = estimate_foreground(seen.seen, seen.alpha)
    assert seen.edge_error(found) < seen.edge_error(seen.seen) / 10


def weighted(found: np.ndarray, expected: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Differences in levels where colours are mixed, as far as alpha lets them be seen."""
    soft = (alpha > 0) & (alpha < 255)
    apart = np.abs(found.astype(float) - expected) * alpha[..., None] / 255
    return apart[soft]


def test_parity_with_pymatting_as_it_was_recorded() -> None:
    reference = np.load(REFERENCE)
    found = estimate_foreground(reference["seen"], reference["alpha"])
    apart = weighted(found, reference["foreground"], reference["alpha"])
    assert apart.mean() < 0.3
    assert apart.max() < 3


def test_parity_with_pymatting_as_it_is_installed() -> None:
    pymatting = pytest.importorskip("pymatting", reason="heavy; the record above stands for it")
    for background in (MAGENTA, BLACK):
        seen = scene(background, 300, 260)
        theirs = pymatting.estimate_foreground_ml(seen.seen / 255, seen.alpha / 255) * 255
        apart = weighted(estimate_foreground(seen.seen, seen.alpha), theirs, seen.alpha)
        assert apart.mean() < 0.6


def test_opaque_pixels_are_the_pictures_own() -> None:
    seen = scene(MAGENTA)
    found = estimate_foreground(seen.seen, seen.alpha)
    opaque = seen.alpha == 255
    assert opaque.any()
    assert (found[opaque] == seen.seen[opaque]).all()


def test_nothing_of_the_background_lies_hidden_below_clear_pixels() -> None:
    seen = scene(MAGENTA)
    found = estimate_foreground(seen.seen, seen.alpha)
    clear = found[seen.alpha == 0].astype(int)
    assert np.abs(clear - MAGENTA).max(axis=1).min() > 60


def test_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = scene(BLACK, 230, 310)
    in_tiles = estimate_foreground(seen.seen, seen.alpha)
    monkeypatch.setattr(foreground, "_TILE_PX", 1000)
    monkeypatch.setattr(foreground, "_UNSEEN", -1)
    whole = estimate_foreground(seen.seen, seen.alpha)
    assert weighted(in_tiles, whole, seen.alpha).max() <= 2


@pytest.mark.parametrize(("height_px", "width_px"), [(1, 1), (1, 500), (33, 2), (97, 96)])
@pytest.mark.parametrize("share", [0, 1, 128, 255])
def test_pictures_of_any_size_and_opacity(height_px: int, width_px: int, share: int) -> None:
    rgb = np.full((height_px, width_px, 3), (10, 200, 90), np.uint8)
    alpha = np.full((height_px, width_px), share, np.uint8)
    found = estimate_foreground(rgb, alpha)
    assert found.shape == rgb.shape
    if share == 255:
        assert (found == rgb).all()


def test_a_thin_picture_has_no_more_tiles_than_a_square_one_of_its_area() -> None:
    for size in ((1, 1_000_000), (1_000_000, 1), (1000, 1000), (3, 300_000)):
        tiles = list(foreground._tiles(*size, margin=2))
        assert len(tiles) <= 150
        covered = sum(
            (t.rows.stop - t.rows.start) * (t.columns.stop - t.columns.start) for t in tiles
        )
        assert covered == size[0] * size[1]
