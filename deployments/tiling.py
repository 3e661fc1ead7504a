"""Large pictures in overlapping tiles: where they lie, and how their results become one picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deployments.buckets import choose_bucket
from deployments.errors import TooLarge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.contract import ImageRequest
    from deployments.images import Array
    from deployments.registry import ModelSpec

UNIT_PX: Final = 8
"""Tiles start at multiples of it: a whole number of latents of any autoencoder."""
_OVERLAP: Final = 8
"""Neighbours overlap by at least this part of a tile's side."""
_LEAST_AREA: Final = 0.5
"""A tile has at least this share of the largest bucket's area: smaller ones see too little."""
_NEAR: Final = 1.1
"""Of the buckets that take at most so many times the least work, the one nearest a square sees most
around each pixel."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The tiles of a picture, in reading order.

    Attributes:
        width_px, height_px: of the picture.
        tile: width and height of each tile, px.
        lefts, tops: where columns and rows of tiles start, px. The last ones may reach beyond the
            picture.
    """

    width_px: int
    height_px: int
    tile: tuple[int, int]
    lefts: tuple[int, ...]
    tops: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many tiles there are."""
        return len(self.lefts) * len(self.tops)

    @property
    def work_px(self) -> int:
        """Pixels of all tiles."""
        return self.count * math.prod(self.tile)

    @property
    def corners(self) -> list[tuple[int, int]]:
        """Left and top of each tile, px."""
        return [(left, top) for top in self.tops for left in self.lefts]

    def cut(self, pixels: Array, left: int, top: int) -> Array:
        """The pixels of a tile, or its part of a mask: a view, or reflections where it reaches
        beyond the picture.
        """
        width, height = self.tile
        part = pixels[top : top + height, left : left + width]
        below, right = height - part.shape[0], width - part.shape[1]
        if not below and not right:
            return part
        return np.pad(part, ((0, below), (0, right), (0, 0))[: part.ndim], mode="reflect")


class Blend:
    """One picture of the results of its tiles, which come in reading order.

    Neighbours fade into each other where they overlap. Their shares add up to 1, so that a band of
    one row of tiles is all that is kept in floating point.

    Args:
        grid: of the tiles.
        rgb: the picture as it was, `H x W x 3`.

    Attributes:
        canvas: the result; where no tile has come yet, the picture as it was.
    """

    def __init__(self, grid: Grid, rgb: Array) -> None:
        self.canvas = rgb.copy()
        self._grid = grid
        self._columns = _shares(grid.lefts, grid.tile[0])
        self._rows = _shares(grid.tops, grid.tile[1])
        # What tiles have beyond the picture is left out: of a thin one it is almost all.
        self._band = np.zeros((min(grid.tile[1], len(rgb)), rgb.shape[1], 3), np.float32)
        self._done = 0

    def add(self, pixels: Array) -> None:
        """Take in the next tile's result."""
        row, column = divmod(self._done, len(self._grid.lefts))
        left = self._grid.lefts[column]
        part = self._band[:, left : left + self._grid.tile[0]]
        height, width = part.shape[:2]
        down, across = self._rows[row][:height, None, None], self._columns[column][:width, None]
        part += pixels[:height, :width] * (down * across)
        self._done += 1
        if column == len(self._grid.lefts) - 1:
            self._write(row)

    def _write(self, row: int) -> None:
        """Bring to the canvas what no further row of tiles reaches."""
        top = self._grid.tops[row]
        end = (*self._grid.tops, top + len(self._band))[row + 1]
        part = self.canvas[top:end]
        part[:] = self._band[: len(part)].round()
        rest = len(self._band) - (end - top)
        self._band[:rest] = self._band[end - top :].copy()
        self._band[rest:] = 0


class _Layout(NamedTuple):
    """How many tiles of a size cover a picture."""

    tile: tuple[int, int]
    columns: int
    rows: int

    @property
    def tiles(self) -> int:
        return self.columns * self.rows

    @property
    def work_px(self) -> int:
        return self.tiles * math.prod(self.tile)


def tiles_of(
    request: ImageRequest, width_px: int, height_px: int, buckets: Sequence[tuple[int, int]]
) -> Grid | None:
    """The tiles in which a request has its picture worked on.

    Returns:
        None if the model works on the whole picture at once: the request asks for its working size,
        or the picture fits a bucket as it is.
    """
    layout = _layout(request, width_px, height_px, buckets)
    if layout is None:
        return None
    width, height = layout.tile
    lefts, tops = _starts(width_px, width), _starts(height_px, height)
    return Grid(width_px, height_px, layout.tile, lefts, tops)


def _layout(
    request: ImageRequest, width_px: int, height_px: int, buckets: Sequence[tuple[int, int]]
) -> _Layout | None:
    """As `tiles_of`, by arithmetic alone: a picture of 1 px height may have 100,000 tiles."""
    if getattr(request, "detail", "working") != "full" or not (buckets and width_px and height_px):
        return None
    bucket = choose_bucket(width_px, height_px, buckets)
    if width_px <= bucket[0] and height_px <= bucket[1]:
        return None
    largest = max(map(math.prod, buckets))
    wide = [one for one in buckets if math.prod(one) >= _LEAST_AREA * largest]
    layouts = [_Layout(one, _along(width_px, one[0]), _along(height_px, one[1])) for one in wide]
    least_px = min(one.work_px for one in layouts)
    near = [one for one in layouts if one.work_px <= _NEAR * least_px]
    return min(near, key=lambda one: abs(math.log(one.tile[0] / one.tile[1])))


def check_tiles(request: ImageRequest, width_px: int, height_px: int, spec: ModelSpec) -> None:
    """Whether a request that asks for full detail takes no more tiles than its model allows.

    Raises:
        TooLarge: it takes more; the error names a large picture of its aspect ratio that does not.
    """
    if "detail" not in request.model_fields_set:
        return
    layout = _layout(request, width_px, height_px, spec.buckets)
    if layout is None or layout.tiles <= spec.max_tiles:
        return
    width, height = _largest(request, width_px, height_px, spec)
    raise TooLarge(
        f"With detail=full the picture takes more than {spec.max_tiles} tiles.",
        value=f"{layout.tiles} tiles of {layout.tile[0]} x {layout.tile[1]} px",
        remedy=f"Send detail=working, or a picture of at most {width} x {height} px.",
    )


def _largest(
    request: ImageRequest, width_px: int, height_px: int, spec: ModelSpec
) -> tuple[int, int]:
    """Width and height of a picture that takes no more tiles than allowed, by bisection."""
    longest = max(width_px, height_px)
    low, above, fitting = 1, longest, (1, 1)
    while low + 1 < above:
        middle = (low + above) // 2
        size = max(width_px * middle // longest, 1), max(height_px * middle // longest, 1)
        layout = _layout(request, *size, spec.buckets)
        if layout is None or layout.tiles <= spec.max_tiles:
            low, fitting = middle, size
        else:
            above = middle
    return fitting


def _along(side_px: int, tile_px: int) -> int:
    """How many tiles a side takes: as few as possible."""
    return 1 + -(-_last(side_px, tile_px) // (tile_px - tile_px // _OVERLAP))


def _last(side_px: int, tile_px: int) -> int:
    """Where the last tile along a side starts, px."""
    return max(side_px + -side_px % UNIT_PX - tile_px, 0)


def _starts(side_px: int, tile_px: int) -> tuple[int, ...]:
    """Where the tiles along a side start: at about equal distances."""
    last, count = _last(side_px, tile_px), _along(side_px, tile_px)
    gaps = max(count - 1, 1)
    return tuple(i * last // gaps // UNIT_PX * UNIT_PX for i in range(count))


def _shares(starts: Sequence[int], tile_px: int) -> list[NDArray[np.float32]]:
    """Each tile's share of every px along its side; those of all tiles add up to 1.

    Two neighbours fade by a raised cosine in the middle of their overlap, over at most a quarter of
    a tile. So nothing is taken from beside a tile's edge, beyond which the model saw nothing.
    """
    shares = [np.ones(tile_px, np.float32) for _ in starts]
    for i, (first, second) in enumerate(pairwise(starts)):
        overlap = first + tile_px - second
        length = min(overlap // 2, tile_px // 4)
        begin = (overlap - length) // 2
        rising = np.zeros(overlap, np.float32)
        rising[begin + length :] = 1
        at = (np.arange(length) + 0.5) / length
        rising[begin : begin + length] = 0.5 - 0.5 * np.cos(np.pi * at)
        shares[i][tile_px - overlap :] *= 1 - rising
        shares[i + 1][:overlap] *= rising
    return shares
