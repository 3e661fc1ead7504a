"""Pictures with a known truth, by plain arithmetic."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
Pixels = NDArray[np.uint8]
Alpha = NDArray[np.uint8]

GREEN: Colour = (0, 160, 0)
MAGENTA: Colour = (255, 0, 255)
BLACK: Colour = (0, 0, 0)
WHITE: Colour = (255, 255, 255)


class Scene(NamedTuple):
    """What a camera saw, and the truth behind it.

    Attributes:
        seen: `H x W x 3`, the subject before the background.
        alpha: `H x W`, of the subject.
        subject: `H x W x 3`, its colours, also where it is transparent.
    """

    seen: Pixels
    alpha: Alpha
    subject: Pixels

    def edge_error(self, rgb: Pixels, alpha: Alpha | None = None) -> float:
        """Mean error of a cut-out's colours, in levels, where alpha is between 0.1 and 0.9.

        Args:
            rgb: the cut-out's colours.
            alpha: its own alpha, if that differs from the truth; the edge is where both are soft.

        Raises:
            ValueError: its alpha is nowhere soft.
        """
        edge = (self.alpha > 25) & (self.alpha < 230)
        if alpha is not None:
            edge &= (alpha > 25) & (alpha < 230)
        if not edge.any():
            raise ValueError("the cut-out has no soft edge")
        return float(np.abs(rgb[edge].astype(int) - self.subject[edge]).mean())


def scene(background: Colour, height_px: int = 96, width_px: int = 128) -> Scene:
    """A soft blob with hairs, of warm colours, before a background."""
    scale, rng = 4, np.random.default_rng(15)
    size = width_px * scale, height_px * scale
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    centre, radii = np.array(size) / 2, np.array(size) * 0.28
    draw.ellipse([*(centre - radii), *(centre + radii)], fill=255)
    for angle in rng.uniform(0, 2 * np.pi, 24):
        tip = centre + radii * 1.5 * [np.cos(angle), np.sin(angle)]
        draw.line([*centre, *tip], fill=255, width=scale)
    mask = mask.filter(ImageFilter.GaussianBlur(1.2 * scale))
    alpha = np.asarray(mask.resize((width_px, height_px), Image.Resampling.BOX))
    y, x = np.mgrid[:height_px, :width_px] / 20
    warm = np.stack([180 + 60 * np.sin(x), 120 + 60 * np.sin(y + 1), 90 + 50 * np.cos(x)], -1)
    subject = warm.round().astype(np.uint8)
    share = alpha[..., None] / 255
    seen = subject * share + np.array(background) * (1 - share)
    return Scene(seen.round().astype(np.uint8), alpha, subject)


def disc(side_px: int = 64) -> Alpha:
    """Alpha of a disc with an edge of four pixels."""
    y, x = np.mgrid[:side_px, :side_px]
    edge = (side_px * 3 / 8 - np.hypot(y - side_px / 2, x - side_px / 2)) / 4
    return (np.clip(edge, 0, 1) * 255).astype(np.uint8)


def square(side_px: int = 64) -> Alpha:
    """Alpha of a hard-edged square in the middle."""
    alpha = np.zeros((side_px, side_px), np.uint8)
    alpha[side_px // 4 : -(side_px // 4), side_px // 4 : -(side_px // 4)] = 255
    return alpha
