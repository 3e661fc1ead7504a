"""Clean patches of photographs and of composed scenes, on the device and by the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from starter_models.training.bank import cut_outs, squares
from starter_models.training.damage import adjusted, recoloured
from starter_models.training.scenes import Odds, Scenes

if TYPE_CHECKING:
    from pathlib import Path

_SCENES = Odds(
    empty=0,
    close=0,
    tiny=0,
    textured=0.05,
    drawn=0.3,
    plain=0.05,
    shadow=0.3,
    floor=0.2,
    receding=0,
    clouds=0,
    blades=0,
)


class CleanPatches:
    """An endless source of sharp pictures, three quarters of them photographs.

    Args:
        collections: as `starter_models.training.collections` writes it.
        device: where the pictures lie.
    """

    def __init__(self, collections: Path, device: str) -> None:
        self.photos = squares(collections, "photos", device, size=1024)
        self.scenes = Scenes(
            cut_outs(collections, "stamps", device),
            cut_outs(collections, "drawings", device),
            self.photos,
            odds=_SCENES,
        )
        self.device = device

    @torch.no_grad()
    def batch(self, count: int, size: int) -> Tensor:
        """`(count, 3, size, size)` in [0, 1]."""
        composed = count // 4
        return torch.cat([self._scenes(composed, size), self.photographs(count - composed, size)])

    @torch.no_grad()
    def photographs(self, count: int, size: int) -> Tensor:
        """`(count, 3, size, size)`, without composed scenes."""
        largest = min(self.photos.shape[-1] // size, 4)
        shares = (count - 2 * (count // 3), count // 3, count // 3)
        parts = [self._photos(n, size, min(k + 2, largest)) for k, n in enumerate(shares) if n]
        return torch.cat(parts)

    def _scenes(self, count: int, size: int) -> Tensor:
        """Composed at twice the size: enlarged cut-outs and photographs are sharp only then."""
        picture, _ = self.scenes.batch(count, 2 * size, damaged=False)
        return F.avg_pool2d(picture, 2)

    def _photos(self, count: int, size: int, shrink: int) -> Tensor:
        """Windows shrunk, because at full size few photographs are sharp."""
        side = size * shrink
        index = torch.randint(len(self.photos), (count,)).tolist()
        free = self.photos.shape[-1] - side + 1
        corner = torch.randint(free, (count, 2)).tolist()
        turn = int(torch.randint(4, (1,)))
        windows = torch.stack([
            self.photos[i, :, y : y + side, x : x + side]
            for i, (y, x) in zip(index, corner, strict=True)
        ]).float() / 255  # fmt: skip
        windows = torch.rot90(windows, turn, (2, 3))
        windows = F.interpolate(
            windows, size=(size, size), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
        if torch.rand(()).item() < 0.5:
            windows = windows.flip(3)
        changed = (torch.rand(count, 1, 1, 1, device=self.device) < 0.4).float()
        return torch.lerp(windows, adjusted(windows, 0.8), changed)


class PatchBank:
    """An endless source of patches that are composed once, and then turned and recoloured.

    Composing a batch takes a CPU longer than the step of a small network that is trained on it.

    Args:
        patches: where they come from.
        count, size: how many, `size x size` pixels each.
    """

    def __init__(self, patches: CleanPatches, count: int, size: int) -> None:
        parts = [patches.batch(48, size) for _ in range(-(-count // 48))]
        self.pixels = torch.cat([(part * 255).round().to(torch.uint8) for part in parts])

    @torch.no_grad()
    def batch(self, count: int) -> Tensor:
        """`(count, 3, size, size)` in [0, 1]."""
        index = torch.randint(len(self.pixels), (count,)).to(self.pixels.device)
        picture = torch.rot90(self.pixels[index], int(torch.randint(4, (1,))), (2, 3))
        if torch.rand(()).item() < 0.5:
            picture = picture.flip(3)
        return recoloured(picture.float() / 255)
