"""The starter cut-out network: a small residual U-Net with global attention at its deepest level.

Residual blocks after He et al., 2015; skip connections after Ronneberger et al., 2015; attention
over all places of the deepest level after Vaswani et al., 2017, its places marked by a depthwise
convolution (Chu et al., 2021), so that any input size will do. The last layers see the picture's
own pixels beside the features, which places the edge more finely than the features alone could;
they work at half its size, on four pixels a place (Shi et al., 2016), for speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class CutoutWidths:
    """Sizes of the network.

    Attributes:
        channels: at 1/2, 1/4, 1/8, 1/16 and 1/32 of the input's size.
        blocks: residual blocks of the encoder at 1/4, 1/8, 1/16 and 1/32.
        attention: attention layers at 1/32.
    """

    channels: Sequence[int] = (16, 24, 48, 112, 208)
    blocks: Sequence[int] = (1, 2, 3, 2)
    attention: int = 2


class Unit(nn.Module):
    """3x3 convolution, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class Residual(nn.Module):
    """Two 3x3 convolutions whose output is added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = Unit(channels, channels)
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv(self.first(x)))


class Attention(nn.Module):
    """One transformer layer over all places: each may draw on every other."""

    HEADS = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.place = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels)
        self.norm_in = nn.LayerNorm(channels)
        self.mix_in = nn.Linear(channels, 3 * channels)
        self.mix_out = nn.Linear(channels, channels)
        self.norm_out = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, 2 * channels)
        self.narrow = nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.place(x)
        rows, channels, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        shape = (rows, height * width, 3, self.HEADS, channels // self.HEADS)
        q, k, v = self.mix_in(self.norm_in(tokens)).view(shape).permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self.mix_out(mixed)
        tokens = tokens + self.narrow(F.gelu(self.widen(self.norm_out(tokens))))
        return tokens.transpose(1, 2).reshape(rows, channels, height, width)


class CutoutNet(nn.Module):
    """RGB to foreground logits.

    Args:
        widths: sizes.
    """

    STRIDE = 32
    input_px = 320
    """Height and width it was trained for."""

    def __init__(self, widths: CutoutWidths | None = None) -> None:
        super().__init__()
        w = widths or CutoutWidths()
        c = list(w.channels)
        self.stem = Unit(3, c[0], stride=2)
        self.down = nn.ModuleList(
            nn.Sequential(
                Unit(c[i], c[i + 1], stride=2),
                *(Residual(c[i + 1]) for _ in range(w.blocks[i])),
            )
            for i in range(4)
        )
        self.context = nn.Sequential(*(Attention(c[4]) for _ in range(w.attention)))
        self.lift = nn.ModuleList(nn.Conv2d(c[i + 1], c[i], 1) for i in (3, 2, 1, 0))
        self.up = nn.ModuleList(Residual(c[i]) for i in (3, 2, 1))
        self.coarse = nn.Conv2d(c[2], 1, 1)
        self.edge = Unit(c[0] + 12, c[0])
        self.answer = nn.Conv2d(c[0], 4, 3, 1, 1)

    @staticmethod
    def normalised(pixels: Tensor) -> Tensor:
        """Pixels from 0 to 255, `(B, 3, H, W)`, as the network takes them."""
        return pixels / 255 - 0.5

    def forward(self, x: Tensor, sides: int = 2) -> list[Tensor]:
        """Logits of the side outputs, finest first.

        Args:
            x: `(B, 3, H, W)` float, RGB minus 0.5; sides are multiples of STRIDE.
            sides: 1, or 2 for the coarse answer that training needs too.

        Returns:
            `(B, 1, H, W)`, and for two sides `(B, 1, H / 8, W / 8)`.
        """
        skips = [self.stem(x)]
        for stage in self.down:
            skips.append(stage(skips[-1]))
        hidden, coarse = self.context(skips[4]), list[Tensor]()
        for level, up in enumerate(self.up):
            # Narrow before the enlargement: the same result at a quarter of the work.
            hidden = up(skips[3 - level] + _twice(self.lift[level](hidden)))
            if level == 1 and sides > 1:
                coarse.append(self.coarse(hidden))
        hidden = skips[0] + _twice(self.lift[3](hidden))
        fine = self.edge(torch.cat((hidden, F.pixel_unshuffle(x, 2)), 1))
        return [F.pixel_shuffle(self.answer(fine), 2), *coarse]


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
