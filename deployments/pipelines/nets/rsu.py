"""Residual U-blocks and the U-shaped network of them that IS-Net and U2-Net share.

Source: Qin et al., "U2-Net: Going Deeper with Nested U-Structure for Salient Object Detection",
Pattern Recognition 2020. Module names equal those of the published weights of both, so that a
strict load needs no key mapping and no remote code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence


class Widths(Protocol):
    """Channel counts.

    Attributes:
        middle: inner channels of encoder stages 1 to 6.
        out: output channels of encoder stages 1 to 6.
        decoder_middle: inner channels of decoder stages 5 to 1.
        decoder_out: output channels of decoder stages 5 to 1.
    """

    @property
    def middle(self) -> Sequence[int]: ...
    @property
    def out(self) -> Sequence[int]: ...
    @property
    def decoder_middle(self) -> Sequence[int]: ...
    @property
    def decoder_out(self) -> Sequence[int]: ...


class ConvBNReLU(nn.Module):
    """3x3 convolution, batch norm, ReLU; keeps height and width."""

    def __init__(self, inputs: int, outputs: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv_s1 = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation)
        self.bn_s1 = nn.BatchNorm2d(outputs)
        self.relu_s1 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu_s1(self.bn_s1(self.conv_s1(x)))


class RSU(nn.Module):
    """Residual U-block: a small U-Net of `depth` levels whose output is added to its input.

    Args:
        depth: levels; the deepest one is dilated by 2 instead of pooled.
        inputs, middle, outputs: channel counts.
        pooled: False gives the "4F" block, which dilates (1, 2, 4, 8) and never pools.
    """

    def __init__(
        self, depth: int, inputs: int, middle: int, outputs: int, *, pooled: bool = True
    ) -> None:
        super().__init__()
        self.depth = depth
        self.pooled = pooled
        self.rebnconvin = ConvBNReLU(inputs, outputs)
        for level in range(1, depth + 1):
            dilation = (2 if level == depth else 1) if pooled else 2 ** (level - 1)
            self.add_module(
                f"rebnconv{level}", ConvBNReLU(outputs if level == 1 else middle, middle, dilation)
            )
        for level in range(depth - 1, 0, -1):
            dilation = 1 if pooled else 2 ** (level - 1)
            self.add_module(
                f"rebnconv{level}d",
                ConvBNReLU(middle * 2, outputs if level == 1 else middle, dilation),
            )

    def forward(self, x: Tensor) -> Tensor:
        # 1) Down: remember every level. 2) Up: join each with the level below it.
        residual = self.rebnconvin(x)
        hidden, skips = residual, list[Tensor]()
        for level in range(1, self.depth):
            hidden = self.get_submodule(f"rebnconv{level}")(hidden)
            skips.append(hidden)
            if self.pooled and level < self.depth - 1:
                hidden = F.max_pool2d(hidden, 2, stride=2, ceil_mode=True)
        hidden = self.get_submodule(f"rebnconv{self.depth}")(hidden)
        for level in range(self.depth - 1, 0, -1):
            skip = skips[level - 1]
            joined = torch.cat((resize_like(hidden, skip), skip), 1)
            hidden = self.get_submodule(f"rebnconv{level}d")(joined)
        return hidden + residual


class NestedUNet(nn.Module):
    """Six encoder stages and five decoder stages of residual U-blocks, with a side output each.

    Args:
        inputs: channels of what the first stage sees.
        widths: channel counts of the stages.
    """

    _DEPTHS = (7, 6, 5, 4, 4, 4)

    def __init__(self, inputs: int, widths: Widths) -> None:
        super().__init__()
        for i, depth in enumerate(self._DEPTHS):
            block = RSU(depth, inputs, widths.middle[i], widths.out[i], pooled=i < 4)
            self.add_module(f"stage{i + 1}", block)
            inputs = widths.out[i]
        for i, stage in enumerate((5, 4, 3, 2, 1)):
            joined = inputs + widths.out[stage - 1]
            middle, inputs = widths.decoder_middle[i], widths.decoder_out[i]
            block = RSU(self._DEPTHS[stage - 1], joined, middle, inputs, pooled=stage < 5)
            self.add_module(f"stage{stage}d", block)
        sides = (*reversed(widths.decoder_out), widths.out[5])
        for i, channels in enumerate(sides):
            self.add_module(f"side{i + 1}", nn.Conv2d(channels, 1, 3, padding=1))

    def side_logits(self, hidden: Tensor, like: Tensor, sides: int) -> list[Tensor]:
        """Logits of the side outputs, finest first.

        Args:
            hidden: what the first stage sees.
            like: of the size of the results.
            sides: how many of them, 1 to 6.
        """
        skips = list[Tensor]()
        for stage in range(1, 7):
            hidden = self.get_submodule(f"stage{stage}")(hidden)
            skips.append(hidden)
            if stage < 6:
                hidden = F.max_pool2d(hidden, 2, stride=2, ceil_mode=True)
        features = [skips[5]]
        for stage in range(5, 0, -1):
            skip = skips[stage - 1]
            joined = torch.cat((resize_like(features[0], skip), skip), 1)
            features.insert(0, self.get_submodule(f"stage{stage}d")(joined))
        return [
            resize_like(self.get_submodule(f"side{i + 1}")(feature), like)
            for i, feature in enumerate(features[:sides])
        ]


def resize_like(x: Tensor, target: Tensor) -> Tensor:
    """`x` at the height and width of `target`, bilinearly."""
    return F.interpolate(x, size=target.shape[2:], mode="bilinear", align_corners=False)
