"""A subject of known colours and alpha before a background of one colour."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Colour = tuple[int, int, int]
    Pixels = NDArray[np.uint8]

MAGENTA, BLACK = (255, 0, 255), (0, 0, 0)


class Scene(NamedTuple):
    """What a camera saw, and the truth behind it.

    Attributes:
        seen: `H x W x 3`, the subject before the background.
        alpha: `H x W`, of the subject.
        subject: `H x W x 3`, its colours, also where it is transparent.
    """

    seen: Pixels
    alpha: Pixels
    subject: Pixels

    def edge_error(self, rgb: Pixels) -> float:
        """Mean error of a cut-out's colours, in levels, where alpha is between 0.1 and 0.9."""
        edge = (self.alpha > 25) & (self.alpha < 230)
        return float(np.abs(rgb[edge].astype(int) - self.subject[edge]).mean())


def scene(background: Colour, height_px: int = 96, width_px: int = 128) -> Scene:
    """A soft blob with hairs, of warm and cold colours, before a background."""
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
