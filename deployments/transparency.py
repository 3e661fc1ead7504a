"""Straight colours of transparent pictures: extended below what is clear, laid over, and scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

if TYPE_CHECKING:
    from collections.abc import Iterator

Array = NDArray[np.uint8]
Floats = NDArray[np.float32]
Colour = tuple[int, int, int]
WHITE: Final[Colour] = (255, 255, 255)
BLACK: Final[Colour] = (0, 0, 0)
_TRUSTED: Final = 16
"""A pixel of less alpha, of 255, takes part of its colour from its surroundings: most programs keep
such colours with few bits, or none. Its own weight falls with the variance of that rounding."""
_STRIP_ROWS: Final = 256
"""Rows that are worked on at a time, so that a picture of 12 MP needs few MB beside itself."""


def extended(rgb: Array, alpha: Array) -> Array:
    """`rgb` with the colours of its opaque parts extended over its clear ones.

    Whatever colours a file keeps where nobody sees them, no filter and no model can then mix them
    into an edge. Colours are pulled up a pyramid, weighted by alpha, and pushed down into the gaps
    (Gortler et al. 1996, "The Lumigraph", section 3.4).

    Args:
        rgb: straight (un-premultiplied) colours, `H x W x 3`.
        alpha: `H x W`, 255 is opaque.

    Returns:
        Colours of the same size: unchanged where alpha is at least 16, smooth elsewhere, and white
        if nothing is visible at all.
    """
    levels = [(rgb, alpha.astype(np.float32))]
    while max(levels[-1][1].shape) > 1 and levels[-1][1].min() < _TRUSTED:
        levels.append(_halved(*levels[-1]))
    top, coverage = levels.pop()
    filled = np.where(coverage[..., None] > 0, top, 255).astype(np.uint8)
    for colours, coverage in reversed(levels):
        filled = _pushed(filled, colours, coverage)
    return filled


def laid_over(rgb: Array, alpha: Array, background: Colour | Array) -> Array:
    """Straight colours `rgb`, `H x W x 3`, over a background, as a screen shows them.

    Args:
        rgb: straight colours.
        alpha: `H x W`, 255 is opaque.
        background: one colour, or a picture of the same size.
    """
    below = np.broadcast_to(np.asarray(background, np.uint8), rgb.shape)
    mixed = np.empty_like(rgb)
    for rows in strips(len(rgb)):
        share = alpha[rows, :, None].astype(np.float32) / 255
        part = rgb[rows] * share + below[rows] * (1 - share)
        mixed[rows] = part.round()
    return mixed


def scaled(alpha: Array, width_px: int, height_px: int) -> Array:
    """A copy of `alpha`, `H x W`, scaled without a halo.

    Lanczos alone would swing over at an edge: a faint ring outside, a see-through one inside. So
    an enlarged value stays within the range of its source pixel's neighbours, and shrinking uses a
    filter without negative lobes.
    """
    image = Image.fromarray(alpha)
    size = width_px, height_px
    if size == image.size:
        return alpha.copy()
    if width_px < image.width or height_px < image.height:
        return np.array(image.resize(size, Image.Resampling.HAMMING))
    wide = np.pad(alpha, 1, mode="edge")  # Pillow's rank filters leave a border as it is.
    near = (1, 1, image.width + 1, image.height + 1)
    low, high = (
        np.asarray(Image.fromarray(wide).filter(rank).crop(near).resize(size, Image.Resampling.BOX))
        for rank in (ImageFilter.MinFilter(3), ImageFilter.MaxFilter(3))
    )
    return np.clip(np.asarray(image.resize(size, Image.Resampling.LANCZOS)), low, high)


def _halved(rgb: Array, alpha: Floats) -> tuple[Array, Floats]:
    """Half the size, rounded up: mean colours weighted by alpha, and the mean alpha."""
    height, width = ((side + 1) // 2 for side in alpha.shape)
    colours = np.empty((height, width, 3), np.uint8)
    coverage = np.empty((height, width), np.float32)
    for rows in strips(height):
        source = slice(rows.start * 2, rows.stop * 2)
        weights = _even(alpha[source, :, None])
        total = _sum_of_four(weights)
        weighted = _sum_of_four(weights * _even(rgb[source]))
        colours[rows] = (weighted / np.maximum(total, 1e-9)).round()
        coverage[rows] = total[..., 0] / 4
    return colours, coverage


def _pushed(coarse: Array, rgb: Array, alpha: Floats) -> Array:
    """`rgb` with its gaps filled from the level above, which is `coarse`."""
    height, width = alpha.shape
    twice = coarse.shape[1] * 2, coarse.shape[0] * 2
    filled = np.array(Image.fromarray(coarse).resize(twice, Image.Resampling.BILINEAR))
    filled = filled[:height, :width]
    for rows in strips(height):
        share = np.minimum((alpha[rows, :, None] / _TRUSTED) ** 2, 1)
        filled[rows] = (rgb[rows] * share + filled[rows] * (1 - share)).round()
    return np.ascontiguousarray(filled)


def _even(values: Array | Floats) -> Floats:
    """`H x W x C` with even sides. What is added has no weight, because its alpha is 0."""
    height, width, channels = values.shape
    even: Floats = np.zeros((height + height % 2, width + width % 2, channels), np.float32)
    even[:height, :width] = values
    return even


def _sum_of_four(values: Floats) -> Floats:
    rows = np.add(values[0::2], values[1::2])
    return np.add(rows[:, 0::2], rows[:, 1::2])


def strips(height: int) -> Iterator[slice]:
    """Rows of a picture, in parts that bound the memory of arithmetic on them."""
    for start in range(0, height, _STRIP_ROWS):
        yield slice(start, min(start + _STRIP_ROWS, height))
