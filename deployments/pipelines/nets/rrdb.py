"""RRDBNet, the large upscaler behind RealESRGAN_x4plus.

Source: Wang et al., "ESRGAN: Enhanced Super-Resolution Generative Adversarial Networks", ECCVW
2018: residual-in-residual dense blocks at the input's resolution, then two doublings. Module names
equal those of the published weights, so that a strict load needs no key mapping.
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
    """RGB to RGB, four times as high and wide.

    Args:
        num_in_ch, num_out_ch: picture channels in and out.
        num_feat: channels between the blocks.
        num_block: residual-in-residual blocks.
        num_grow_ch: channels a convolution adds inside a dense block.

    The defaults build RealESRGAN_x4plus (16,697,987 parameters).
    """

    scale = 4

    tile_overlap_px = 32
    """Practical tile overlap in input pixels. An output pixel may see 15 pixels a block, 345 in
    all, but what lies farther than a few dozen passes many residuals at 0.2 and stays unseen."""

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 64,
        num_block: int = 23,
        num_grow_ch: int = 32,
    ) -> None:
        super().__init__()
        self.conv_first = _conv(num_in_ch, num_feat)
        self.body = nn.Sequential(*(RRDB(num_feat, num_grow_ch) for _ in range(num_block)))
        self.conv_body = _conv(num_feat, num_feat)
        self.conv_up1 = _conv(num_feat, num_feat)
        self.conv_up2 = _conv(num_feat, num_feat)
        self.conv_hr = _conv(num_feat, num_feat)
        self.conv_last = _conv(num_feat, num_out_ch)

    def forward(self, x: Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Upscale.

        Args:
            x: `(B, 3, H, W)` float, RGB in [0, 1].
            sizes: height and width of each picture, at the top left among zeros; None: H and W.

        Returns:
            `(B, 3, 4 * H, 4 * W)`, RGB, not clamped; beyond a picture it means nothing.
        """
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
