"""Scenes of kept-out cut-outs on kept-out photographs, whose right mask is known; photographs
without a subject, whose right mask is black; and photographs whose subject is outlined by hand.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torch import Tensor

from starter_models.training.data import Picture, photo

JUDGING = Path("starter_models/judging")
EMPTY = ("nature-Dune", "BytheWater", "Path")
JUDGED_PHOTOS = (
    "skimage:chelsea.png", "skimage:coffee.png", "sklearn:china.jpg",
    *(f"judging:{name}.jpg" for name in (
        *EMPTY, "Kite",
        "nature-Garden", "nature-LadyBird", "nature-TwoWings", "nature-YellowFlower",
    )),
)  # fmt: skip
"""Names for `starter_models.training.data.photo`."""


def outlined_photos(folder: Path = JUDGING) -> dict[str, tuple[Picture, NDArray[np.bool_]]]:
    """Photographs that have a subject, by name, and which pixels `(H, W)` are the subject's.

    `outlines.json` has polygons for each, as x, y, x, y in pixels; a pixel within two is a hole.
    """
    found: dict[str, tuple[Picture, NDArray[np.bool_]]] = {}
    for name, outlines in json.loads((folder / "outlines.json").read_text()).items():
        picture = photo(name)
        mask = Image.new("1", (picture.shape[1], picture.shape[0]))
        for outline in outlines:
            part = Image.new("1", mask.size)
            ImageDraw.Draw(part).polygon(outline, fill=1)
            mask = ImageChops.logical_xor(mask, part)
        found[name] = (picture, np.asarray(mask))
    return found


def judged_scenes(folder: Path = JUDGING, size: int = 512) -> tuple[Tensor, Tensor]:
    """One scene a cut-out, then the empty ones: whole, and two halves each.

    Returns:
        Pictures `(N, 3, size, size)` and alphas `(N, 1, size, size)`, in [0, 1].
    """
    rng = np.random.default_rng(0)
    empties = [Image.open(folder / "photos" / f"{name}.jpg").convert("RGB") for name in EMPTY]
    scenes: list[tuple[Image.Image, Image.Image]] = []
    for i, path in enumerate(sorted((folder / "stamps").glob("*.webp"))):
        scenes.append(_laid(rng, Image.open(path).convert("RGBA"), empties[i % 3], size))
    black = Image.new("L", (size, size), 0)
    for empty in empties:
        width, height = empty.size
        side = min(width, height)
        boxes = ((0, 0, width, height), (0, 0, side, side), (width - side, 0, width, height))
        for box in boxes:
            scenes.append((empty.crop(box).resize((size, size), Image.Resampling.BICUBIC), black))
    x = np.stack([np.asarray(picture, np.float32) for picture, _ in scenes]) / 255
    alpha = np.stack([np.asarray(mask, np.float32) for _, mask in scenes]) / 255
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(alpha)[:, None]


def _laid(
    rng: np.random.Generator, stamp: Image.Image, scene: Image.Image, size: int
) -> tuple[Image.Image, Image.Image]:
    """A cut-out of half to four fifths of the scene's side, near its middle, with a shadow."""
    side = min(scene.size)
    left = int(rng.integers(scene.width - side + 1))
    top = int(rng.integers(scene.height - side + 1))
    back = scene.crop((left, top, left + side, top + side)).resize((size, size))
    back = back.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, size / 170))))
    factor = size * rng.uniform(0.5, 0.8) / max(stamp.size)
    shape = (max(round(stamp.width * factor), 1), max(round(stamp.height * factor), 1))
    stamp = stamp.resize(shape, Image.Resampling.BICUBIC)
    free = (size - stamp.width, size - stamp.height)
    place = (round(free[0] * rng.uniform(0.25, 0.75)), round(free[1] * rng.uniform(0.3, 0.9)))
    mask = Image.new("L", (size, size), 0)
    mask.paste(stamp.getchannel("A"), place)
    shadow = Image.new("L", (size, size), 0)
    shadow.paste(mask, (0, round(size * 0.02)))
    shadow = shadow.filter(ImageFilter.GaussianBlur(size / 40)).point(lambda v: v * 0.4)
    back.paste((0, 0, 0), (0, 0), shadow)
    back.paste(stamp.convert("RGB"), place, stamp.getchannel("A"))
    return back, mask
