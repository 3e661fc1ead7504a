"""U2-Net, for salient objects; the network behind u2net.pth and u2netp.pth.

Source: Qin et al., "U2-Net: Going Deeper with Nested U-Structure for Salient Object Detection",
Pattern Recognition 2020. Module names equal those of the published weights (798 keys).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deployments.pipelines.nets.rsu import NestedUNet

if TYPE_CHECKING:
    from collections.abc import Sequence

_SIDES = 6
_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class U2NetWidths:
    """Channel counts, as `Widths` has them. The defaults are u2net.pth's."""

    middle: Sequence[int] = (32, 32, 64, 128, 256, 256)
    out: Sequence[int] = (64, 128, 256, 512, 512, 512)
    decoder_middle: Sequence[int] = (256, 128, 64, 32, 16)
    decoder_out: Sequence[int] = (512, 256, 128, 64, 64)


class U2Net(NestedUNet):
    """RGB to foreground logits, fused of all six side outputs.

    Args:
        widths: channel counts; the defaults build u2net.pth (44,009,869 parameters).
    """

    input_px = 320
    """Height and width it was published for."""

    def __init__(self, widths: U2NetWidths | None = None) -> None:
        super().__init__(3, widths or U2NetWidths())
        self.outconv = nn.Conv2d(_SIDES, 1, 1)

    @staticmethod
    def normalised(pixels: Tensor) -> Tensor:
        """Pixels from 0 to 255, `(B, 3, H, W)`, as the network takes them: the brightest value of
        each picture is 1, then ImageNet's mean and deviation are taken out.
        """
        brightest = pixels.amax((1, 2, 3), keepdim=True).clamp(min=1)
        mean, deviation = (pixels.new_tensor(v).reshape(3, 1, 1) for v in (_MEAN, _DEVIATION))
        return (pixels / brightest - mean) / deviation

    def forward(self, x: Tensor, sides: int = _SIDES + 1) -> list[Tensor]:
        """Logits, the fused ones first, then those of the side outputs, finest first.

        Args:
            x: `(B, 3, H, W)` float, from `normalised`.
            sides: how many of them, 1 to 7.

        Returns:
            As many tensors `(B, 1, H, W)`; the first is the answer, the others serve training.
        """
        found = self.side_logits(x, x, _SIDES)
        return [self.outconv(torch.cat(found, 1)), *found][:sides]
