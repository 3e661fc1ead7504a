"""IS-Net, the dichotomous segmentation network behind RMBG-1.4.

Source: Qin et al., "Highly Accurate Dichotomous Image Segmentation", ECCV 2022; block structure
from U2-Net (Qin et al., 2020). Module names equal those of the published RMBG-1.4 weights (798
keys), so that a strict load of `model.safetensors` needs no key mapping and no remote code.
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
class ISNetWidths:
    """Channel counts. The defaults are RMBG-1.4's.

    Attributes:
        stem: channels after the first, strided convolution.
        middle: inner channels of encoder stages 1 to 6.
        out: output channels of encoder stages 1 to 6.
        decoder_middle: inner channels of decoder stages 5 to 1.
        decoder_out: output channels of decoder stages 5 to 1.
    """

    stem: int = 64
    middle: Sequence[int] = (32, 32, 64, 128, 256, 256)
    out: Sequence[int] = (64, 128, 256, 512, 512, 512)
    decoder_middle: Sequence[int] = (256, 128, 64, 32, 16)
    decoder_out: Sequence[int] = (512, 256, 128, 64, 64)


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
            joined = torch.cat((_resize_like(hidden, skip), skip), 1)
            hidden = self.get_submodule(f"rebnconv{level}d")(joined)
        return hidden + residual


class ISNet(nn.Module):
    """RGB to foreground logits.

    Args:
        widths: channel counts; the defaults build RMBG-1.4 (44,046,790 parameters).
    """

    _DEPTHS = (7, 6, 5, 4, 4, 4)

    def __init__(self, widths: ISNetWidths | None = None) -> None:
        super().__init__()
        w = widths or ISNetWidths()
        self.conv_in = nn.Conv2d(3, w.stem, 3, stride=2, padding=1)
        inputs = w.stem
        for i, depth in enumerate(self._DEPTHS):
            block = RSU(depth, inputs, w.middle[i], w.out[i], pooled=i < 4)
            self.add_module(f"stage{i + 1}", block)
            inputs = w.out[i]
        for i, stage in enumerate((5, 4, 3, 2, 1)):
            joined = inputs + w.out[stage - 1]
            block = RSU(
                self._DEPTHS[stage - 1],
                joined,
                w.decoder_middle[i],
                w.decoder_out[i],
                pooled=stage < 5,
            )
            self.add_module(f"stage{stage}d", block)
            inputs = w.decoder_out[i]
        sides = (*reversed(w.decoder_out), w.out[5])
        for i, channels in enumerate(sides):
            self.add_module(f"side{i + 1}", nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, x: Tensor, sides: int = 6) -> list[Tensor]:
        """Logits of the side outputs, finest first.

        Args:
            x: `(B, 3, H, W)` float, RGB minus 0.5, so in [-0.5, 0.5].
            sides: how many of them, 1 to 6.

        Returns:
            As many tensors `(B, 1, H, W)`; the first is the answer, the others serve training.
        """
        hidden, skips = self.conv_in(x), list[Tensor]()
        for stage in range(1, 7):
            hidden = self.get_submodule(f"stage{stage}")(hidden)
            skips.append(hidden)
            if stage < 6:
                hidden = F.max_pool2d(hidden, 2, stride=2, ceil_mode=True)
        features = [skips[5]]
        for stage in range(5, 0, -1):
            skip = skips[stage - 1]
            joined = torch.cat((_resize_like(features[0], skip), skip), 1)
            features.insert(0, self.get_submodule(f"stage{stage}d")(joined))
        return [
            _resize_like(self.get_submodule(f"side{i + 1}")(feature), x)
            for i, feature in enumerate(features[:sides])
        ]


def _resize_like(x: Tensor, target: Tensor) -> Tensor:
    return F.interpolate(x, size=target.shape[2:], mode="bilinear", align_corners=False)
