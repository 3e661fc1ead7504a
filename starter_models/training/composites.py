"""Synthetic pictures with a known foreground: a shape cut from one picture, laid on another."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from starter_models.training.data import recolour

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from starter_models.training.data import Picture

    Alpha = NDArray[np.float32]


def composite(
    rng: np.random.Generator, foreground: Picture, background: Picture
) -> tuple[Picture, Alpha]:
    """Lay a random shape of `foreground` on `background`, both `S x S x 3` in [0, 1].

    The background is often out of focus and the foreground often casts a shadow, as in the
    photographs people want cut out.

    Returns:
        The picture `S x S x 3` and its true alpha `S x S`, both float32 in [0, 1].
    """
    size = foreground.shape[0]
    alpha = shape(rng, size)
    if rng.random() < 0.7:
        background = _filtered(background, ImageFilter.GaussianBlur(rng.uniform(0.5, size / 50)))
    if rng.random() < 0.3:
        background = background * (1 - rng.uniform(0.2, 0.6) * _shadow(rng, alpha))[..., None]
    if rng.random() < 0.5:
        foreground = np.clip(foreground * rng.uniform(0.7, 1.3), 0, 1)
    picture = alpha[..., None] * foreground + (1 - alpha[..., None]) * background
    picture = picture + rng.normal(0, rng.uniform(0, 0.02), picture.shape)
    return np.clip(picture, 0, 1).astype(np.float32), alpha


def shape(rng: np.random.Generator, size: int) -> Alpha:
    """A random soft-edged alpha `size x size`: a blob, several, a bust, or a bar-like thing."""
    scale = 2
    mask = Image.new("L", (size * scale, size * scale), 0)
    draw = ImageDraw.Draw(mask)
    full = size * scale
    kind = rng.random()
    if kind < 0.35:
        _blob(draw, rng, full * rng.uniform(0.35, 0.65, 2), full * rng.uniform(0.16, 0.36))
    elif kind < 0.6:
        centre = full * rng.uniform(0.38, 0.62, 2)
        radius = full * rng.uniform(0.14, 0.24)
        for _ in range(int(rng.integers(2, 5))):
            _blob(draw, rng, centre + rng.normal(0, radius * 0.8, 2), radius * rng.uniform(0.5, 1))
    elif kind < 0.8:
        _bust(draw, rng, full)
    else:
        _polygon(draw, rng, full)
    if rng.random() < 0.3:
        _strands(draw, rng, full)
    mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5) * scale))
    small = mask.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def _blob(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, centre: NDArray[np.float64], radius: float
) -> None:
    angles = np.linspace(0, math.tau, 120)
    ripple = np.ones_like(angles)
    for wave in range(2, 9):
        ripple += rng.normal(0, 0.28 / wave) * np.cos(wave * angles + rng.random() * math.tau)
    stretch, turn = rng.uniform(0.6, 1.0), rng.random() * math.tau
    x, y = radius * ripple * np.cos(angles), stretch * radius * ripple * np.sin(angles)
    points = [
        (centre[0] + a * math.cos(turn) - b * math.sin(turn),
         centre[1] + a * math.sin(turn) + b * math.cos(turn))
        for a, b in zip(x, y, strict=True)
    ]  # fmt: skip
    draw.polygon(points, fill=255)


def _bust(draw: ImageDraw.ImageDraw, rng: np.random.Generator, full: int) -> None:
    """Head, neck and shoulders that leave through the lower edge."""
    x, y = full * rng.uniform(0.35, 0.65), full * rng.uniform(0.25, 0.45)
    head = full * rng.uniform(0.1, 0.18)
    _blob(draw, rng, np.array([x, y]), head)
    draw.rectangle((x - head * 0.4, y, x + head * 0.4, y + head * 1.6), fill=255)
    width = head * rng.uniform(1.8, 2.8)
    top = y + head * rng.uniform(1.2, 1.5)
    draw.rounded_rectangle((x - width, top, x + width, full * 1.2), radius=head * 0.8, fill=255)


def _polygon(draw: ImageDraw.ImageDraw, rng: np.random.Generator, full: int) -> None:
    corners = np.sort(rng.random(int(rng.integers(4, 9)))) * math.tau
    radii = full * rng.uniform(0.2, 0.38, corners.size)
    x, y = full * rng.uniform(0.42, 0.58, 2)
    points = [
        (x + r * math.cos(a), y + r * math.sin(a)) for a, r in zip(corners, radii, strict=True)
    ]
    draw.polygon(points, fill=255)


def _strands(draw: ImageDraw.ImageDraw, rng: np.random.Generator, full: int) -> None:
    """Thin things that stick out of the middle: limbs, stems, handles."""
    for _ in range(int(rng.integers(2, 7))):
        angle, reach = rng.random() * math.tau, full * rng.uniform(0.25, 0.42)
        end = (full / 2 + reach * math.cos(angle), full / 2 + reach * math.sin(angle))
        draw.line((full / 2, full / 2, *end), fill=255, width=int(full * rng.uniform(0.012, 0.05)))


def _shadow(rng: np.random.Generator, alpha: Alpha) -> Alpha:
    size = alpha.shape[0]
    shift = tuple(int(s) for s in rng.uniform(-0.06, 0.06, 2) * size)
    moved = np.roll(alpha, shift, (0, 1))
    image = Image.fromarray((moved * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(size / 30)), np.float32) / 255


def _filtered(picture: Picture, kernel: ImageFilter.GaussianBlur) -> Picture:
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(kernel), np.float32) / 255


def square(rng: np.random.Generator, picture: Picture, size: int, *, recoloured: bool) -> Picture:
    """A random square of `picture`, resized to `size`."""
    height, width = picture.shape[:2]
    side = int(min(height, width) * rng.uniform(0.4, 1.0))
    y, x = rng.integers(height - side + 1), rng.integers(width - side + 1)
    crop = Image.fromarray((picture[y : y + side, x : x + side] * 255).astype(np.uint8))
    out = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
    out = out[:, ::-1] if rng.random() < 0.5 else out
    return recolour(out, rng) if recoloured and rng.random() < 0.5 else out
