"""Colours of a cut-out without those of the background it stood before."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

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
    return _last_level(colours, rgb, alpha)


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

    They are written into `colours`.
    """
    _, height, width = colours.shape
    size = height, width
    rounds = _SMALL_ROUNDS if max(size) <= _SMALL_PX else _LARGE_ROUNDS
    picture = _nearest(rgb, size, first_axis=0).transpose(2, 0, 1)
    cover = _nearest(alpha, size)
    for tile in _tiles(height, width, rounds):
        around = (slice(None), *tile.around)
        start = _nearest(former, size, tile.around)
        seen, share = picture[around], cover[tile.around]
        match _sure(share):
            case "foreground":  # F or B is what the picture shows; the other is free.
                start[:3] = seen
            case "background":
                start[3:] = seen
            case None:
                start = _relaxed(start, seen, share, rounds)
        colours[:, tile.rows, tile.columns] = start[tile.inner]


def _last_level(former: Array, rgb: Array, alpha: Array) -> Array:
    """F at full size, `H x W x 3`, from F and B of the level before it."""
    foreground = np.empty_like(rgb)
    for tile in _tiles(*alpha.shape, margin=0):
        seen, share, found = (values[tile.around] for values in (rgb, alpha, foreground))
        sure = _sure(share)
        if sure == "foreground":
            found[:] = seen
            continue
        wanted = former[:3] if sure == "background" else former
        start = _nearest(wanted, alpha.shape, tile.around)
        planes = start if sure else _fitted(start, seen.transpose(2, 0, 1), share)
        found[:] = planes.transpose(1, 2, 0)
    return foreground


def _nearest(
    values: Array,
    size: tuple[int, int],
    part: tuple[slice, slice] = _WHOLE,
    first_axis: int = -2,
) -> Array:
    """A part of `values` brought to `size` by the nearest value.

    Height and width are the axis `first_axis` and the next one.
    """
    axes = first_axis, first_axis + 1
    if tuple(values.shape[axis] for axis in axes) == size:
        return values[(..., *part)] if part != _WHOLE else values
    for axis, length, piece in zip(axes, size, part, strict=True):
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


def _sure(alpha: Array) -> Literal["foreground", "background"] | None:
    """What a whole tile shows, if it is only one."""
    if alpha.min() >= 255 - _UNSEEN:
        return "foreground"
    return "background" if alpha.max() <= _UNSEEN else None


def _relaxed(start: Array, picture: Array, cover: Array, rounds: int) -> Array:
    """F and B of a tile, `6 x h x w`: Jacobi rounds of the paper's equation 4.

    A pixel's F and B are the means F', B' of its neighbours', weighted by the change of alpha,
    plus their shares of what `alpha * F' + (1 - alpha) * B'` lacks of the picture's colour. That
    solves the 2 x 2 system of the paper (Sherman and Morrison). An error at the tile's cuts moves
    inwards by a pixel each round.
    """
    stride = cover.shape[1] + 2
    padded, edge, seen = _padded(start), _padded(cover[None]), _padded(picture)
    edge /= 255
    _repeat_edges(edge)
    near, inner = _neighbours(padded, stride), _rows_inside(padded, stride)
    alpha, seen = _rows_inside(edge, stride), _rows_inside(seen, stride)
    weights = [_REGULARISATION + np.abs(alpha - one) for one in _neighbours(edge, stride)]
    total = sum(weights[1:], weights[0])
    weights = [weight / total for weight in weights]
    covers = np.stack([alpha, 1 - alpha])
    shares = covers / (total + alpha**2 + (1 - alpha) ** 2)
    mean, terms = np.empty_like(inner), np.empty_like(inner)
    mean_of_each, terms_of_each = (values.reshape(2, 3, -1) for values in (mean, terms))
    for _ in range(rounds):
        _repeat_edges(padded)
        np.multiply(near[0], weights[0], out=mean)
        for one, weight in zip(near[1:], weights[1:], strict=True):
            mean += np.multiply(one, weight, out=terms)
        np.multiply(mean_of_each, covers, out=terms_of_each)
        lacking = seen - terms[:3]
        lacking -= terms[3:]
        mean_of_each += np.multiply(lacking, shares, out=terms_of_each)
        np.clip(mean, 0, 255, out=inner)
    return padded[:, 1:-1, 1:-1].round().astype(np.uint8)


def _fitted(colours: Array, picture: Array, cover: Array) -> Array:
    """F of a tile, `3 x h x w`: with its B, it gives just what the picture shows.

    It is the limit of a round whose neighbours have no weight, and costs a tenth of four rounds.
    """
    alpha, start = cover.astype(np.float32) / 255, colours.astype(np.float32)
    lacking = np.ascontiguousarray(picture, np.float32)
    lacking -= alpha * start[:3]
    lacking -= (1 - alpha) * start[3:]
    lacking *= alpha / (alpha**2 + (1 - alpha) ** 2)
    lacking += start[:3]
    return np.clip(lacking, 0, 255, out=lacking).round(out=lacking).astype(np.uint8)


def _padded(values: Array) -> Floats:
    """`C x h x w` with a pixel more on each side, which is 0."""
    channels, height, width = values.shape
    padded = np.zeros((channels, height + 2, width + 2), np.float32)
    padded[:, 1:-1, 1:-1] = values
    return padded


def _rows_inside(padded: Floats, stride: int, shift: int = 0) -> Floats:
    """A view of the rows but the first and the last, as `C x (h * stride)`.

    Their two padded columns come along: a line without gaps is worked on twice as fast as many
    short ones. What is computed for them is not used.
    """
    flat = padded.reshape(len(padded), -1)
    return flat[:, stride + shift : flat.shape[1] - stride + shift]


def _neighbours(padded: Floats, stride: int) -> list[Floats]:
    """Views of the values to the left, right, above and below of `_rows_inside`."""
    return [_rows_inside(padded, stride, shift) for shift in (-1, 1, -stride, stride)]


def _repeat_edges(padded: Floats) -> None:
    padded[:, 0], padded[:, -1] = padded[:, 1], padded[:, -2]
    padded[:, :, 0], padded[:, :, -1] = padded[:, :, 1], padded[:, :, -2]
