"""Colours of a cut-out without those of the background it stood before."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.images import Array

    Floats = NDArray[np.float32]

_TILE_PX: Final = 96
_SMALL_PX: Final = 32
_SMALL_ROUNDS, _LARGE_ROUNDS = 10, 8
_UNSEEN: Final = 3
"""Shares of F or B, of 255, that a tile may have unseen: networks seldom say quite 0 or 255."""
_SAMPLES: Final = 128
"""Along each side, for a mean."""
_REGULARISATION: Final = 1e-5
_WHOLE: Final = (slice(None), slice(None))


class _Tile(NamedTuple):
    """A piece of a level, and the piece with its surroundings that it is computed from."""

    rows: slice
    columns: slice
    around: tuple[slice, slice]

    @property
    def inner(self) -> tuple[slice, slice, slice]:
        """Where the tile lies in the piece around it; all channels."""
        pairs = zip((self.rows, self.columns), self.around, strict=True)
        rows, columns = (slice(a.start - b.start, a.stop - b.start) for a, b in pairs)
        return slice(None), rows, columns


def estimate_foreground(rgb: Array, alpha: Array) -> Array:
    """The foreground's colours F, where a pixel shows `alpha * F + (1 - alpha) * B`.

    Both F and the background's colours B are unknown. They are assumed to change little where
    alpha does not: from one pixel up to the full size, each level starts from the one before it
    (Germer et al. 2020, "Fast Multi-Level Foreground Estimation", arXiv:2006.14970, with its
    parameters). Two things differ, and make it faster. Pixels change at once rather than one after
    the other, as in the paper's version for GPUs; they need more rounds for the same result. And
    the last level, three quarters of all pixels, only fits F and B to the picture.

    Tiles without an edge cost nothing, and levels are kept in 8 bits: 12 MP take 80 MB with the
    result.

    Args:
        rgb: what the camera saw, `H x W x 3`.
        alpha: `H x W`, 255 is all foreground.

    Returns:
        `H x W x 3`: equal to `rgb` where alpha is 255; smooth where it is 0.
    """
    height, width = alpha.shape
    levels = max(math.ceil(math.log2(max(height, width))), 1)
    colours = _mean_colours(rgb, alpha)
    for i in range(levels):
        size = round(height ** (i / levels)), round(width ** (i / levels))
        former, colours = colours, np.empty((6, *size), np.uint8)
        _level(former, rgb, alpha, colours)
    foreground = np.empty_like(rgb)
    _level(colours, rgb, alpha, foreground.transpose(2, 0, 1))
    return foreground


def _mean_colours(rgb: Array, alpha: Array) -> Array:
    """Of what is surely foreground and surely background: `6 x 1 x 1`, black where nothing is."""
    colours = np.zeros((6, 1, 1), np.uint8)
    step = max(*alpha.shape, _SAMPLES) // _SAMPLES
    rgb, alpha = rgb[::step, ::step], alpha[::step, ::step]
    for i, sure in enumerate((alpha > 0.9 * 255, alpha < 0.1 * 255)):
        if sure.any():
            colours[3 * i : 3 * i + 3, 0, 0] = rgb[sure].mean(0).round()
    return colours


def _level(former: Array, rgb: Array, alpha: Array, colours: Array) -> None:
    """F and B of one size from those of the level before it, both `6 x h x w`.

    They are written into `colours`. At full size it has room for F alone.
    """
    channels, height, width = colours.shape
    size = height, width
    rounds = _rounds(size) if channels == 6 else 0
    picture, cover = _nearest(rgb.transpose(2, 0, 1), size), _nearest(alpha, size)
    for tile in _tiles(height, width, rounds):
        around = (slice(None), *tile.around)
        start = _nearest(former, size, tile.around)
        found = _solved(start, picture[around], cover[tile.around], rounds)
        colours[:, tile.rows, tile.columns] = found[:channels][tile.inner]


def _rounds(size: tuple[int, int]) -> int:
    return _SMALL_ROUNDS if max(size) <= _SMALL_PX else _LARGE_ROUNDS


def _nearest(values: Array, size: tuple[int, int], part: tuple[slice, slice] = _WHOLE) -> Array:
    """A part of `values`, `... x H x W`, brought to `size` by the nearest value."""
    if values.shape[-2:] == size:
        return values[(..., *part)]
    for axis, length, piece in zip((-2, -1), size, part, strict=True):
        at = np.arange(length)[piece] * values.shape[axis] // length
        values = values.take(at, axis=axis)
    return values


def _tiles(height: int, width: int, margin: int) -> Iterator[_Tile]:
    # Of a thin picture the tiles are long, so that their number follows from its area.
    high = max(_TILE_PX, _TILE_PX**2 // min(width, _TILE_PX))
    wide = max(_TILE_PX, _TILE_PX**2 // min(height, _TILE_PX))
    for top, left in product(range(0, height, high), range(0, width, wide)):
        rows = slice(top, min(top + high, height))
        columns = slice(left, min(left + wide, width))
        around = (
            slice(max(top - margin, 0), min(rows.stop + margin, height)),
            slice(max(left - margin, 0), min(columns.stop + margin, width)),
        )
        yield _Tile(rows, columns, around)


def _solved(start: Array, picture: Array, alpha: Array, rounds: int) -> Array:
    """F and B of a tile, `6 x h x w`. An error at its cuts moves inwards by a pixel each round.

    Without a round, F alone, as the last level wants it.
    """
    opaque, clear = alpha.min() >= 255 - _UNSEEN, alpha.max() <= _UNSEEN
    if opaque or clear:  # F or B is what the picture shows; the other is free.
        start[slice(0, 3) if opaque else slice(3, 6)] = picture
        return start
    share = (alpha / 255).astype(np.float32)
    colours = start.astype(np.float32)
    return _relaxed(colours, picture, share, rounds) if rounds else _fitted(colours, picture, share)


def _relaxed(start: Floats, picture: Array, alpha: Floats, rounds: int) -> Array:
    """Jacobi rounds of the paper's equation 4.

    A pixel's F and B are the means F', B' of its neighbours', weighted by the change of alpha,
    plus their shares of what `alpha * F' + (1 - alpha) * B'` lacks of the picture's colour. That
    solves the 2 x 2 system of the paper (Sherman and Morrison).
    """
    height, width = alpha.shape
    padded = np.empty((6, height + 2, width + 2), np.float32)
    padded[:, 1:-1, 1:-1] = start
    edge = np.pad(alpha, 1, mode="edge")
    weights = [_REGULARISATION + np.abs(alpha - near) for near in _neighbours(edge)]
    total = sum(weights[1:], weights[0])
    weights = [weight / total for weight in weights]
    covers = np.stack([alpha, 1 - alpha])[:, None]
    shares = covers / (total + alpha**2 + (1 - alpha) ** 2)
    picture = np.ascontiguousarray(picture)
    near, mean, terms = _neighbours(padded), *np.empty((2, 6, height, width), np.float32)
    mean_of_each, terms_of_each = (a.reshape(2, 3, height, width) for a in (mean, terms))
    for _ in range(rounds):
        _repeat_edges(padded)
        np.multiply(near[0], weights[0], out=mean)
        for one, weight in zip(near[1:], weights[1:], strict=True):
            mean += np.multiply(one, weight, out=terms)
        np.multiply(mean_of_each, covers, out=terms_of_each)
        lacking = picture - terms[:3] - terms[3:]
        mean_of_each += np.multiply(lacking, shares, out=terms_of_each)
        np.clip(mean, 0, 255, out=padded[:, 1:-1, 1:-1])
    return padded[:, 1:-1, 1:-1].round().astype(np.uint8)


def _fitted(start: Floats, picture: Array, alpha: Floats) -> Array:
    """F of a tile, `3 x h x w`: with its B, it gives just what the picture shows.

    It is the limit of a round whose neighbours have no weight, and costs a tenth of four rounds.
    """
    lacking = picture - alpha * start[:3] - (1 - alpha) * start[3:]
    foreground = start[:3] + lacking * (alpha / (alpha**2 + (1 - alpha) ** 2))
    return foreground.clip(0, 255).round().astype(np.uint8)


def _neighbours(padded: Floats) -> list[Floats]:
    """Views of the values to the left, right, above and below."""
    return [
        padded[..., 1:-1, :-2],
        padded[..., 1:-1, 2:],
        padded[..., :-2, 1:-1],
        padded[..., 2:, 1:-1],
    ]


def _repeat_edges(padded: Floats) -> None:
    padded[:, 0], padded[:, -1] = padded[:, 1], padded[:, -2]
    padded[:, :, 0], padded[:, :, -1] = padded[:, :, 1], padded[:, :, -2]
