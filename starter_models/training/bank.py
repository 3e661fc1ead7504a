"""The training pictures of `starter_models.training.collections` as tensors on the device."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from starter_models.training.kept_out import refuse_kept_out

COLLECTIONS = Path("starter_models/build/collections")
LEVELS = 5


@dataclass(frozen=True)
class CutOuts:
    """Cut-outs, at full size and halved again and again, so that a small copy is not jagged.

    Attributes:
        levels: `(N, 4, S, S)` uint8, S halved from one to the next, centred, colour times alpha.
        longest: (N,) pixels of the longer side, at the first level.
    """

    levels: tuple[Tensor, ...]
    longest: Tensor

    def __len__(self) -> int:
        return len(self.longest)


def cut_outs(folder: Path, kind: str, device: str, size: int = 448) -> CutOuts:
    """All of `folder / kind`; raises ValueError if one is kept out of training."""
    paths = _allowed(folder, kind)
    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(lambda p: _centred(p, size), paths))
    stack = torch.from_numpy(np.stack([p for p, _ in pictures])).to(device)
    levels = [stack.permute(0, 3, 1, 2).contiguous()]
    for _ in range(LEVELS - 1):
        halves = [F.avg_pool2d(part.float(), 2) for part in levels[-1].split(64)]
        levels.append(torch.cat([half.round().to(torch.uint8) for half in halves]))
    return CutOuts(tuple(levels), torch.tensor([s for _, s in pictures], device=device))


def _centred(path: Path, size: int) -> tuple[np.ndarray, float]:
    picture = Image.open(path).convert("RGBA")
    longest = max(picture.size)
    pixels = np.asarray(picture, np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    canvas = np.zeros((size, size, 4), np.uint8)
    height, width = pixels.shape[:2]
    top, left = (size - height) // 2, (size - width) // 2
    canvas[top : top + height, left : left + width] = pixels.round()
    return canvas, float(longest)


def squares(folder: Path, kind: str, device: str, size: int = 640) -> Tensor:
    """Squares `(N, 3, size, size)` uint8 that cover every picture of `folder / kind`."""
    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(lambda p: _cover(p, size), _allowed(folder, kind)))
    stack = np.stack([square for part in parts for square in part])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous().to(device)


def _cover(path: Path, size: int) -> list[np.ndarray]:
    picture = Image.open(path).convert("RGB")
    if min(picture.size) < size:
        scale = size / min(picture.size)
        larger = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(larger, Image.Resampling.BICUBIC)
    side = min(picture.size)
    count = max(round(max(picture.size) / side), 1) + (max(picture.size) > 1.2 * side)
    squares: list[np.ndarray] = []
    for i in range(count):
        start = round((max(picture.size) - side) * (i / max(count - 1, 1)))
        left, top = (start, 0) if picture.width > picture.height else (0, start)
        crop = picture.crop((left, top, left + side, top + side))
        squares.append(np.asarray(ImageOps.fit(crop, (size, size), Image.Resampling.LANCZOS)))
    return squares


def _allowed(folder: Path, kind: str) -> list[Path]:
    names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
    paths = sorted(p for p in (folder / kind).iterdir() if not p.name.startswith("."))
    refuse_kept_out([names[f"{kind}/{p.name}"] for p in paths])
    return paths
