"""RRDBNet, the large upscaler behind RealESRGAN_x4plus and RealESRGAN_x2plus.

Source: Wang et al., "ESRGAN: Enhanced Super-Resolution Generative Adversarial Networks", ECCVW
2018: residual-in-residual dense blocks at the input's resolution, then two doublings. A network for
2 times first folds each 2 x 2 pixels into channels, and so works at half the input's resolution.
Module names equal those of the published weights, so that a strict load needs no key mapping.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deployments.pipelines.nets.margin import Margin

if TYPE_CHECKING:
    from collections.abc import Sequence

_RESIDUAL_SCALE = 0.2
_SLOPE = 0.2
_UPSCALE = 4
"""Of the two doublings."""
_SEEN_PX = 64
"""How far a deep network sees at the resolution of its blocks. What lies farther passes many
residuals at 0.2: with the published weights of 23 blocks, tiles that overlap by 64 px differ from
the whole picture by 2 levels of 255 at most, and by 53 where they overlap by 32 px."""


class ResidualDenseBlock(nn.Module):
    """Five 3x3 convolutions, each fed every earlier output; added to the input at 0.2.

    Args:
        num_feat: channels in and out.
        num_grow_ch: channels each of the first four convolutions adds.
    """

    def __init__(self, num_feat: int, num_grow_ch: int) -> None:
        super().__init__()
        for i in range(5):
            outputs = num_feat if i == 4 else num_grow_ch
            self.add_module(f"conv{i + 1}", _conv(num_feat + i * num_grow_ch, outputs))

    def forward(self, x: Tensor, margin: Margin) -> Tensor:
        features = [x]
        for i in range(1, 5):
            hidden = margin.clear(self.get_submodule(f"conv{i}")(torch.cat(features, 1)))
            features.append(F.leaky_relu(hidden, _SLOPE, inplace=True))
        last = margin.clear(self.get_submodule("conv5")(torch.cat(features, 1)))
        return x + _RESIDUAL_SCALE * last


class RRDB(nn.Module):
    """Three dense blocks in a row, added to the input at 0.2."""

    def __init__(self, num_feat: int, num_grow_ch: int) -> None:
        super().__init__()
        self.rdb1 = ResidualDenseBlock(num_feat, num_grow_ch)
        self.rdb2 = ResidualDenseBlock(num_feat, num_grow_ch)
        self.rdb3 = ResidualDenseBlock(num_feat, num_grow_ch)

    def forward(self, x: Tensor, margin: Margin) -> Tensor:
        hidden = x
        for block in (self.rdb1, self.rdb2, self.rdb3):
            hidden = block(hidden, margin)
        return x + _RESIDUAL_SCALE * hidden


class RRDBNet(nn.Module):
    """RGB to RGB, `scale` times as high and wide.

    Args:
        num_feat: channels between the blocks.
        num_block: residual-in-residual blocks.
        num_grow_ch: channels a convolution adds inside a dense block.
        scale: 4 or 2.

    The defaults build RealESRGAN_x4plus (16,697,987 parameters).

    Attributes:
        multiple_px: of which the height and width of every input must be multiples.
        tile_overlap_px: in input px, by which tiles must overlap to show no seam.

    Raises:
        ValueError: another scale.
    """

    def __init__(
        self, num_feat: int = 64, num_block: int = 23, num_grow_ch: int = 32, scale: int = _UPSCALE
    ) -> None:
        super().__init__()
        if scale not in (2, 4):
            raise ValueError(f"scale is {scale}; an RRDBNet enlarges 2 or 4 times")
        self.scale = scale
        self.multiple_px = _UPSCALE // scale
        # Exactly, 15 px a block and 4 px for the convolutions around them.
        self.tile_overlap_px = min(15 * num_block + 4, _SEEN_PX) * self.multiple_px
        self.conv_first = _conv(3 * self.multiple_px**2, num_feat)
        self.body = nn.Sequential(*(RRDB(num_feat, num_grow_ch) for _ in range(num_block)))
        self.conv_body = _conv(num_feat, num_feat)
        self.conv_up1 = _conv(num_feat, num_feat)
        self.conv_up2 = _conv(num_feat, num_feat)
        self.conv_hr = _conv(num_feat, num_feat)
        self.conv_last = _conv(num_feat, 3)

    def forward(self, x: Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Upscale.

        Args:
            x: `(B, 3, H, W)` float, RGB in [0, 1].
            sizes: height and width of each picture, at the top left among zeros; None: H and W.
                All are multiples of `multiple_px`.

        Returns:
            `(B, 3, scale * H, scale * W)`, RGB, not clamped; beyond a picture it means nothing.
        """
        if (fold := self.multiple_px) > 1:
            x = F.pixel_unshuffle(x, fold)
            sizes = sizes and [(height // fold, width // fold) for height, width in sizes]
        margin = Margin(x, sizes)
        shallow = hidden = margin.clear(self.conv_first(x))
        for block in self.body:
            hidden = block(hidden, margin)
        hidden = shallow + margin.clear(self.conv_body(hidden))
        for conv, scale in ((self.conv_up1, 2), (self.conv_up2, 4)):
            doubled = F.interpolate(hidden, scale_factor=2, mode="nearest")
            hidden = F.leaky_relu(margin.clear(conv(doubled), scale), _SLOPE, inplace=True)
        hidden = F.leaky_relu(margin.clear(self.conv_hr(hidden), 4), _SLOPE, inplace=True)
        return self.conv_last(hidden)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)
