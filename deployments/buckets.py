"""Pictures to the sizes a model was made for, and back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from deployments.transparency import scaled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from deployments.images import Array

_ASPECT_TOLERANCE: Final = 0.05


def choose_bucket(
    width_px: int, height_px: int, buckets: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """The bucket (width, height) for a picture.

    Of the buckets of about the picture's aspect ratio, it is the smallest that holds the picture
    without shrinking it, else the largest.
    """

    def misfit(bucket: tuple[int, int]) -> float:
        return abs(math.log(width_px / height_px * bucket[1] / bucket[0]))

    best = min(map(misfit, buckets))
    near = [bucket for bucket in buckets if misfit(bucket) <= best + _ASPECT_TOLERANCE]
    roomy = [bucket for bucket in near if bucket[0] >= width_px and bucket[1] >= height_px]
    return min(roomy, key=math.prod) if roomy else max(near, key=math.prod)


def content_box(width_px: int, height_px: int, bucket: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a picture in a bucket: as large as fits, with its aspect ratio."""
    scale = min(bucket[0] / width_px, bucket[1] / height_px)
    return max(1, round(width_px * scale)), max(1, round(height_px * scale))


def fit_to_bucket(rgb: Array, bucket: tuple[int, int]) -> Array:
    """`rgb` scaled to the bucket's `content_box`, with reflections to its right and below it."""
    return _padded(resize(rgb, *content_box(rgb.shape[1], rgb.shape[0], bucket)), bucket)


def fit_mask_to_bucket(mask: Array, bucket: tuple[int, int]) -> Array:
    """A mask, `H x W`, as `fit_to_bucket` fits its picture; no value swings over at an edge."""
    return _padded(scaled(mask, *content_box(mask.shape[1], mask.shape[0], bucket)), bucket)


def _padded(pixels: Array, bucket: tuple[int, int]) -> Array:
    """The pixels, with reflections to their right and below them."""
    height, width = pixels.shape[:2]
    columns = np.pad(np.arange(width), (0, bucket[0] - width), mode="reflect")
    rows = np.pad(np.arange(height), (0, bucket[1] - height), mode="reflect")
    return pixels[rows][:, columns]


def restore_from_bucket(pixels: Array, width_px: int, height_px: int, *, working: bool) -> Array:
    """Undo `fit_to_bucket`.

    Args:
        pixels: of the bucket's size; colour or grey.
        width_px, height_px: of the picture that was fitted.
        working: keep the size that the model worked at instead of the picture's.
    """
    width, height = content_box(width_px, height_px, (pixels.shape[1], pixels.shape[0]))
    content = pixels[:height, :width]
    return content.copy() if working else resize(content, width_px, height_px)


def sample_bilinear(rgb: Array, width_px: int, height_px: int) -> Array:
    """`rgb`, `H x W x 3`, read at `height_px x width_px` places between its pixels.

    Each place is weighted from its four neighbours alone, so that shrinking skips pixels. This is
    torch's `interpolate(mode="bilinear", align_corners=False)`, rounded to whole levels.
    """
    above, below, down = _neighbours(rgb.shape[0], height_px)
    left, right, across = _neighbours(rgb.shape[1], width_px)
    across = across[:, None]
    lines = [
        rgb[np.ix_(rows, left)] * (1 - across) + rgb[np.ix_(rows, right)] * across
        for rows in (above, below)
    ]
    down = down[:, None, None]
    return (lines[0] * (1 - down) + lines[1] * down).round().astype(np.uint8)


def _neighbours(
    side_px: int, wanted_px: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The pixels before and after each place along a side, and the share of the second."""
    places = ((np.arange(wanted_px) + 0.5) * side_px / wanted_px - 0.5).clip(0, side_px - 1)
    before = places.astype(np.int64)
    return before, np.minimum(before + 1, side_px - 1), (places - before).astype(np.float32)


def resize(pixels: Array, width_px: int, height_px: int) -> Array:
    """A copy of `pixels`, `H x W x 3` or `H x W`, scaled by Lanczos."""
    return _scaled(pixels, width_px, height_px, Image.Resampling.LANCZOS)


def shrink_bilinear(pixels: Array, width_px: int, height_px: int) -> Array:
    """As `resize`, but bilinear: each place is the mean of all pixels below a triangle."""
    return _scaled(pixels, width_px, height_px, Image.Resampling.BILINEAR)


def _scaled(pixels: Array, width_px: int, height_px: int, by: Image.Resampling) -> Array:
    if pixels.shape[:2] == (height_px, width_px):
        return pixels.copy()
    return np.array(Image.fromarray(pixels).resize((width_px, height_px), by))
