"""Large pictures in tiles: what they cover, how they become one picture, and how many may be."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.contract import ComicRequest, EnhanceRequest
from deployments.detail import settled
from deployments.engine.row import RowInput
from deployments.errors import TooLarge
from deployments.estimate import Size
from deployments.making import Making
from deployments.tiling import Blend, Grid, check_tiles, tiles_of

BUCKETS = ((512, 512), (576, 448), (448, 576), (704, 384), (384, 704), (256, 256), (320, 128))
SPEC: Any = SimpleNamespace(buckets=BUCKETS, max_tiles=20)
FULL = EnhanceRequest(detail="full")


def grid_of(width: int, height: int) -> Grid:
    grid = tiles_of(FULL, width, height, BUCKETS)
    assert grid is not None
    return grid


@given(st.integers(1, 6000), st.integers(1, 6000))
def test_tiles_cover_the_picture_and_overlap(width: int, height: int) -> None:
    grid = tiles_of(FULL, width, height, BUCKETS)
    if grid is None:
        assert any(width <= bucket[0] and height <= bucket[1] for bucket in BUCKETS)
        return
    for starts, tile_px, side_px in (
        (grid.lefts, grid.tile[0], width),
        (grid.tops, grid.tile[1], height),
    ):
        assert starts[0] == 0
        assert starts[-1] + tile_px >= side_px
        assert starts[-1] < side_px
        assert all(start % 8 == 0 for start in starts)
        assert all(0 < b - a <= tile_px - tile_px // 8 for a, b in pairwise(starts))


@pytest.mark.parametrize(
    ("size", "count"), [((4000, 3000), 63), ((640, 480), 2), ((513, 512), 2), ((6000, 4000), 126)]
)
def test_as_few_tiles_as_possible(size: tuple[int, int], count: int) -> None:
    assert grid_of(*size).count == count


def test_small_tiles_are_not_taken_for_large_pictures() -> None:
    assert all(np.prod(grid_of(n, 300).tile) >= 512 * 512 / 2 for n in range(800, 3000, 100))


def test_a_picture_that_fits_a_bucket_has_no_tiles() -> None:
    for width, height in ((512, 512), (64, 64), (576, 448), (1, 1)):
        assert tiles_of(FULL, width, height, BUCKETS) is None
    assert tiles_of(EnhanceRequest(detail="working"), 4000, 3000, BUCKETS) is None
    assert tiles_of(ComicRequest(), 4000, 3000, BUCKETS) is None


@settings(deadline=None, max_examples=30)
@given(st.integers(20, 1500), st.integers(20, 1500))
def test_unchanged_tiles_give_back_the_picture(width: int, height: int) -> None:
    grid = Grid(width, height, (64, 64), *(starts(side) for side in (width, height)))
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    blend = Blend(grid, np.zeros_like(picture))
    for corner in grid.corners:
        blend.add(grid.cut(picture, *corner))
    assert np.abs(blend.canvas.astype(int) - picture).max() <= 1


def starts(side_px: int) -> tuple[int, ...]:
    grid = tiles_of(FULL, max(side_px, 65), 65, ((64, 64),))
    assert grid is not None
    return tuple(left for left in grid.lefts if left == 0 or left < side_px)


def test_tiles_of_other_tones_fade_into_each_other() -> None:
    grid = grid_of(900, 500)
    assert grid.count > 1
    blend = Blend(grid, np.zeros((500, 900, 3), np.uint8))
    for i in range(grid.count):
        blend.add(np.full((*reversed(grid.tile), 3), 100 + 8 * (i % 2), np.uint8))
    assert set(np.unique(blend.canvas)) <= set(range(100, 109))
    assert np.abs(np.diff(blend.canvas.astype(int), axis=1)).max() <= 1
    assert np.abs(np.diff(blend.canvas.astype(int), axis=0)).max() <= 1


def test_a_row_of_tiles_is_all_that_a_blend_keeps_beside_its_result() -> None:
    grid = grid_of(1200, 5000)
    blend = Blend(grid, np.zeros((5000, 1200, 3), np.uint8))
    held = sum(value.nbytes for value in vars(blend).values() if isinstance(value, np.ndarray))
    assert held <= blend.canvas.nbytes + grid.tile[1] * (1200 + grid.tile[0]) * 3 * 4


def test_a_thin_picture_takes_the_memory_of_its_own_pixels() -> None:
    width, height = 8000, 10
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    grid = grid_of(width, height)
    assert grid.tile[1] > 10 * height
    blend = Blend(grid, np.zeros_like(picture))
    held = sum(value.nbytes for value in vars(blend).values() if isinstance(value, np.ndarray))
    assert held == picture.nbytes * (1 + 4)
    making = Making(RowInput(FULL, picture, 0, 0.0), grid)
    assert all(np.shares_memory(row.input.pixels, picture) for row in making.rows)
    for corner in grid.corners:
        blend.add(grid.cut(picture, *corner))
    assert np.abs(blend.canvas.astype(int) - picture).max() <= 1


# --- how many ---


def test_more_tiles_than_allowed_are_refused_with_the_largest_picture_that_fits() -> None:
    with pytest.raises(TooLarge) as caught:
        check_tiles(FULL, 4000, 3000, SPEC)
    assert caught.value.value == "63 tiles of 512 x 512 px"
    assert caught.value.remedy.startswith("Send detail=working, or a picture of at most ")
    width, height = (int(one) for one in caught.value.remedy.split()[-4:-1] if one != "x")
    check_tiles(FULL, width, height, SPEC)
    assert grid_of(width, height).count > 12
    for request in (EnhanceRequest(), EnhanceRequest(detail="working"), ComicRequest()):
        check_tiles(request, 4000, 3000, SPEC)


@pytest.mark.parametrize("size", [(50_000_000, 1), (1, 50_000_000), (65_500, 700)])
def test_a_thin_picture_is_refused_by_arithmetic_with_a_size_that_fits(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Starts of 100,000 tiles for each trial size would hold up the ingress for seconds.
    monkeypatch.setattr("deployments.tiling._starts", None)
    with pytest.raises(TooLarge) as caught:
        check_tiles(FULL, *size, SPEC)
    width, height = (int(one) for one in caught.value.remedy.rstrip(" px.").split()[-3::2])
    check_tiles(FULL, width, height, SPEC)
    assert max(width, height) > 5000


def why_late(request: EnhanceRequest) -> str:
    return "about 80 s of work; a request may take 60 s"


@pytest.mark.parametrize(
    ("size", "why"),
    [
        (Size(4000, 3000), "63 tiles: more than the 20 allowed."),
        (Size(900, 500), "2 tiles: about 80 s of work; a request may take 60 s."),
    ],
)
def test_who_asks_for_nothing_gets_the_working_size_where_full_detail_does_not_fit(
    size: Size, why: str
) -> None:
    request, notes = settled(EnhanceRequest(), size, SPEC, why_late)
    assert request.detail == "working"
    assert [one.code for one in notes] == ["detail_reduced"]
    assert why in notes[0].text
    assert settled(EnhanceRequest(), Size(500, 500), SPEC, why_late)[1] == ()
    assert (
        settled(
            EnhanceRequest(), size, SPEC.__class__(**vars(SPEC) | {"max_tiles": 99}), lambda _: ""
        )[0].detail
        == "full"
    )
