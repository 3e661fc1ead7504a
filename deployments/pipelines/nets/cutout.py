"""The starter cut-out network: a U-Net on EfficientNet-Lite, with global attention at its deepest
level.

Encoder after Tan and Le, 2019 (EfficientNet; Lite is the variant without squeeze-and-excitation
and with ReLU6), so that published ImageNet weights can start it; skip connections after Ronneberger
et al., 2015, into residual blocks after He et al., 2015; attention over all places of the deepest
level after Vaswani et al., 2017, its places marked by a depthwise convolution (Chu et al., 2021),
so that any input size will do. The last layers see the picture's own pixels beside the features,
which places the edge more finely than the features alone could; they work at half its size, on four
pixels a place (Shi et al., 2016), for speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class CutoutWidths:
    """Sizes of the network.

    Attributes:
        channels: of the decoder at 1/2, 1/4, 1/8, 1/16 and 1/32 of the input's size.
        attention: attention layers at 1/32.
    """

    channels: Sequence[int] = (16, 32, 64, 96, 192)
    attention: int = 2


class Stage(NamedTuple):
    """A run of the encoder's blocks, the first of which has the stride."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


LITE0 = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class Unit(nn.Module):
    """3x3 convolution, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, 1, 1)

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


class Bottleneck(nn.Module):
    """Inverted residual (Sandler et al., 2018): widen, depthwise convolution, narrow.

    Batch norms are folded into the convolutions.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = nn.Conv2d(inputs, hidden, 1) if expansion > 1 else None
        self.depthwise = nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden)
        self.project = nn.Conv2d(hidden, outputs, 1)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu6(self.expand(x), inplace=True) if self.expand is not None else x
        hidden = self.project(F.relu6(self.depthwise(hidden), inplace=True))
        return x + hidden if self.adds else hidden


class Encoder(nn.Module):
    """EfficientNet-Lite0 without its classifier."""

    STEM = 32
    ENDS = (0, 1, 2, 4, 6)
    """The last stage at 1/2, 1/4, 1/8, 1/16 and 1/32 of the input's size."""
    CHANNELS = tuple(LITE0[stage].channels for stage in ENDS)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, self.STEM, 3, 2, 1)
        self.stages = nn.ModuleList()
        inputs = self.STEM
        for blocks, kernel, stride, expansion, channels in LITE0:
            first = Bottleneck(inputs, channels, kernel, stride, expansion)
            rest = (Bottleneck(channels, channels, kernel, 1, expansion) for _ in range(blocks - 1))
            self.stages.append(nn.Sequential(first, *rest))
            inputs = channels

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features at 1/2, 1/4, 1/8, 1/16 and 1/32 of `x`'s size."""
        x, found = F.relu6(self.stem(x)), list[Tensor]()
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number in self.ENDS:
                found.append(x)
        return found


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
        self.encoder = Encoder()
        self.skip = nn.ModuleList(
            nn.Conv2d(found, wanted, 1) for found, wanted in zip(Encoder.CHANNELS, c, strict=True)
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
        return (pixels - 127) / 128

    def forward(self, x: Tensor, sides: int = 2) -> list[Tensor]:
        """Logits of the side outputs, finest first.

        Args:
            x: `(B, 3, H, W)` float, RGB from -1 to 1; sides are multiples of STRIDE.
            sides: 1, or 2 for the coarse answer that training needs too.

        Returns:
            `(B, 1, H, W)`, and for two sides `(B, 1, H / 8, W / 8)`.
        """
        skips = [skip(found) for skip, found in zip(self.skip, self.encoder(x), strict=True)]
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
