"""Training and kept-out pictures: what scikit-image and scikit-learn ship, and generated ones.

Every picture is `H x W x 3`, float32, sRGB in [0, 1]. `KEPT_OUT` photos are never seen in training,
nor is anything that `kept_out.txt` names; `make quality` measures on those alone.
"""

from __future__ import annotations

import math
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

if TYPE_CHECKING:
    from collections.abc import Sequence

Picture = NDArray[np.float32]

TRAINING = (
    "skimage:astronaut.png",
    "skimage:rocket.jpg",
    "skimage:motorcycle_left.png",
    "skimage:retina.jpg",
    "skimage:hubble_deep_field.jpg",
    "skimage:ihc.png",
    "sklearn:flower.jpg",
    "skimage:camera.png",
    "skimage:brick.png",
    "skimage:grass.png",
    "skimage:gravel.png",
    "skimage:moon.png",
    "skimage:coins.png",
    "skimage:page.png",
)
KEPT_OUT = ("skimage:chelsea.png", "skimage:coffee.png", "sklearn:china.jpg")

_FOLDERS = {
    "skimage": ("skimage", "data"),
    "sklearn": ("sklearn.datasets", "images"),
    "judging": ("starter_models", "judging/photos"),
}


def photo_bytes(name: str) -> bytes:
    """The file of a shipped photo, as `skimage:coffee.png` or `sklearn:china.jpg`."""
    package, file = name.split(":")
    module, folder = _FOLDERS[package]
    return (resources.files(module) / folder / file).read_bytes()


def photo(name: str) -> Picture:
    """A shipped photo, or one kept out, as `judging:Path.jpg`: `H x W x 3` float32 in [0, 1]."""
    module, folder = _FOLDERS[name.split(":")[0]]
    with resources.as_file(resources.files(module) / folder / name.split(":")[1]) as path:
        image = Image.open(path).convert("RGB")
    return np.asarray(image, np.float32) / 255


def dead_leaves(rng: np.random.Generator, size: int = 256, leaves: int = 600) -> Picture:
    """Occluding shapes with power-law sizes (Lee, Mumford, Huang 2001): the edges, corners and
    scale statistics of photographs, in colours no photo set of ours covers.
    """
    image = Image.new("RGB", (size, size), _colour(rng))
    draw = ImageDraw.Draw(image)
    smallest, largest = 2.0, size * 0.6
    for _ in range(leaves):
        # 1) Inverse-transform sample of p(r) ~ r^-3 between the two radii.
        u = rng.random()
        radius = 1 / math.sqrt(u / largest**2 + (1 - u) / smallest**2)
        x, y = rng.random(2) * size
        _leaf(draw, rng, x, y, radius)
    picture = np.asarray(image, np.float32) / 255
    # 2) Shading and fine texture, so that flat areas are not all there is.
    picture = picture * _shading(rng, size)[..., None]
    picture = picture + rng.normal(0, rng.choice([0, 0, 0.01, 0.03]), picture.shape)
    if rng.random() < 0.3:
        picture = _blur(picture, rng.uniform(0.5, 1.5))
    return np.clip(picture, 0, 1).astype(np.float32)


def _leaf(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, x: float, y: float, r: float
) -> None:
    kind = rng.integers(4)
    if kind == 0:
        draw.ellipse((x - r, y - r * rng.uniform(0.3, 1), x + r, y + r), fill=_colour(rng))
    elif kind == 1:
        angle = rng.random() * math.tau
        dx, dy = 2 * r * math.cos(angle), 2 * r * math.sin(angle)
        draw.line((x - dx, y - dy, x + dx, y + dy), fill=_colour(rng), width=int(1 + r / 6))
    else:
        corners = np.sort(rng.random(int(rng.integers(3, 7)))) * math.tau
        points = [(x + r * math.cos(a), y + r * math.sin(a)) for a in corners]
        draw.polygon(points, fill=_colour(rng))


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    grey = rng.random()
    spread = rng.choice([0.1, 0.3, 1.0])
    red, green, blue = np.clip(grey + spread * (rng.random(3) - 0.5), 0, 1) * 255
    return int(red), int(green), int(blue)


def _shading(rng: np.random.Generator, size: int) -> Picture:
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    slope = rng.uniform(-0.4, 0.4, 2)
    return (1 + slope[0] * x + slope[1] * y).astype(np.float32)


def _blur(picture: Picture, radius: float) -> Picture:
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def stack(pictures: Sequence[Picture]) -> Picture:
    """Pictures of one size as `(B, 3, H, W)`."""
    return np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2))


def recolour(picture: Picture, rng: np.random.Generator) -> Picture:
    """The picture through a random colour matrix, gamma and offset, clipped to [0, 1]."""
    matrix = np.eye(3) + rng.normal(0, 0.25, (3, 3))
    gamma = math.exp(rng.normal(0, 0.3))
    out = (np.power(picture, gamma) @ matrix.T) + rng.normal(0, 0.08, 3)
    return np.clip(out, 0, 1).astype(np.float32)
