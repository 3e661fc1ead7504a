"""IS-Net, the dichotomous segmentation network behind RMBG-1.4.

Source: Qin et al., "Highly Accurate Dichotomous Image Segmentation", ECCV 2022. Module names equal
those of the published RMBG-1.4 weights (798 keys), so that a strict load of `model.safetensors`
needs no key mapping and no remote code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from deployments.pipelines.nets.rsu import NestedUNet

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class ISNetWidths:
    """Channel counts. The defaults are RMBG-1.4's.

    Attributes:
        stem: channels after the first, strided convolution.
        middle, out, decoder_middle, decoder_out: see `Widths`.
    """

    stem: int = 64
    middle: Sequence[int] = (32, 32, 64, 128, 256, 256)
    out: Sequence[int] = (64, 128, 256, 512, 512, 512)
    decoder_middle: Sequence[int] = (256, 128, 64, 32, 16)
    decoder_out: Sequence[int] = (512, 256, 128, 64, 64)


class ISNet(NestedUNet):
    """RGB to foreground logits.

    Args:
        widths: channel counts; the defaults build RMBG-1.4 (44,046,790 parameters).
    """

    input_px = 1024
    """Height and width it was published for."""

    def __init__(self, widths: ISNetWidths | None = None) -> None:
        widths = widths or ISNetWidths()
        super().__init__(widths.stem, widths)
        self.conv_in = nn.Conv2d(3, widths.stem, 3, stride=2, padding=1)

    @staticmethod
    def normalised(pixels: Tensor) -> Tensor:
        """Pixels from 0 to 255, `(B, 3, H, W)`, as the network takes them."""
        return pixels / 255 - 0.5

    def forward(self, x: Tensor, sides: int = 6) -> list[Tensor]:
        """Logits of the side outputs, finest first.

        Args:
            x: `(B, 3, H, W)` float, RGB minus 0.5, so in [-0.5, 0.5].
            sides: how many of them, 1 to 6.

        Returns:
            As many tensors `(B, 1, H, W)`; the first is the answer, the others serve training.
        """
        return self.side_logits(self.conv_in(x), x, sides)
