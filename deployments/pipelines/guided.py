"""The guided filter: moves the edges of a coarse mask to those of the picture.

Around each pixel the mask is explained as a linear function of the picture's colours. Its
coefficients are found at the mask's size, and used on the picture's own pixels: K. He, J. Sun,
"Fast Guided Filter", arXiv:1505.00996; colours as in K. He, J. Sun, X. Tang, "Guided Image
Filtering", TPAMI 2013, equations 14 and 15.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import avg_pool2d

if TYPE_CHECKING:
    from deployments.images import Array

_REDUCED: Final = 2
"""Times that the mask is shrunk before the coefficients are found, for a quarter of the time."""
_RADIUS_PX: Final = 5
_SIDE_PX: Final = 2 * _RADIUS_PX + 1
"""Of the windows, at the shrunk mask's size."""
_EPSILON: Final = 1e-4
"""Variance of colours, of 1, below which a window counts as even."""
_CONTRAST: Final = 1.25
"""By which the result is steeper: a window's mean leaves a haze around the subject."""
_STRIP_ROWS: Final = 256

Planes = NDArray[np.float32]


def refined(mask: Array, guide: Array, picture: Array) -> Array:
    """A mask at the picture's size, with the picture's edges.

    Args:
        mask: `h x w`, uint8.
        guide: the picture at the mask's size, `h x w x 3`, uint8.
        picture: `H x W x 3`, uint8.

    Returns:
        `H x W`, uint8.
    """
    planes = _coefficients(_reduced(mask)[None], _reduced(guide).permute(2, 0, 1)).numpy()
    (height_px, width_px), rows = picture.shape[:2], planes.shape[1]
    result = np.empty((height_px, width_px), np.uint8)
    for first in range(0, height_px, _STRIP_ROWS):
        end = min(first + _STRIP_ROWS, height_px)
        part = first / height_px * rows, end / height_px * rows
        *slopes, share = (_enlarged(plane, part, width_px, end - first) for plane in planes)
        for channel, slope in enumerate(slopes):
            share += slope * picture[first:end, :, channel]
        share = (share - 127.5) * _CONTRAST + 127.5
        result[first:end] = share.clip(0, 255).round()
    return result


def _reduced(pixels: Array) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.fromarray(pixels).reduce(_REDUCED))).float() / 255


def _coefficients(mask: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
    """For each pixel three slopes and an offset, of 255: `4 x h x w`.

    Args:
        mask: `1 x h x w`, in [0, 1].
        guide: `3 x h x w`, in [0, 1].
    """
    pairs = (guide[:, None] * guide).flatten(0, 1)
    mean, mean_mask = _means(guide), _means(mask)
    spread = _means(pairs).unflatten(0, (3, 3)) - mean[:, None] * mean
    joint = _means(guide * mask) - mean * mean_mask
    even = _EPSILON * torch.eye(3)
    slopes = torch.linalg.solve(spread.permute(2, 3, 0, 1) + even, joint.permute(1, 2, 0))
    slopes = slopes.permute(2, 0, 1)
    offset = mean_mask - (slopes * mean).sum(0, keepdim=True)
    return _means(torch.cat([slopes, offset * 255]))


def _means(planes: torch.Tensor) -> torch.Tensor:
    """Means over the windows, which end at the picture's edge; `N x h x w`."""
    for side, margin in (((_SIDE_PX, 1), (_RADIUS_PX, 0)), ((1, _SIDE_PX), (0, _RADIUS_PX))):
        planes = avg_pool2d(planes, side, 1, margin, count_include_pad=False)
    return planes


def _enlarged(plane: Planes, rows: tuple[float, float], width_px: int, height_px: int) -> Planes:
    """Some of the rows of a plane, from fractions of a row on, at another size."""
    box = (0, rows[0], plane.shape[1], rows[1])
    size, bilinear = (width_px, height_px), Image.Resampling.BILINEAR
    return np.array(Image.fromarray(plane).resize(size, bilinear, box=box))
