"""SRVGGNetCompact, the small upscaler behind realesr-general-x4v3.

Source: Wang et al., "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic
Data", ICCVW 2021. A plain chain of 3x3 convolutions at the input's resolution and one pixel
shuffle. Module names equal those of the published weights, so that a strict load needs no key
mapping.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional as F

from deployments.pipelines.nets.margin import Margin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class SRVGGNetCompact(nn.Module):
    """RGB to RGB, `upscale` times as high and wide.

    Args:
        num_feat: channels between the convolutions.
        num_conv: convolutions between the first and the last.
        upscale: factor.

    The defaults build realesr-general-x4v3 (1,213,296 parameters).
    """

    def __init__(self, num_feat: int = 64, num_conv: int = 32, upscale: int = 4) -> None:
        super().__init__()
        self.upscale = upscale
        self.num_conv = num_conv
        layers: list[nn.Module] = [nn.Conv2d(3, num_feat, 3, padding=1), nn.PReLU(num_feat)]
        for _ in range(num_conv):
            layers += [nn.Conv2d(num_feat, num_feat, 3, padding=1), nn.PReLU(num_feat)]
        layers.append(nn.Conv2d(num_feat, 3 * upscale**2, 3, padding=1))
        self.body = nn.Sequential(*layers)
        self.upsampler = nn.PixelShuffle(upscale)

    @property
    def receptive_field_px(self) -> int:
        """How far, in input pixels, an output pixel sees: tiles that overlap by this are exact."""
        return self.num_conv + 2

    def forward(self, x: Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Upscale.

        Args:
            x: `(B, 3, H, W)` float, RGB in [0, 1].
            sizes: height and width of each picture, at the top left among zeros; None: H and W.

        Returns:
            `(B, 3, upscale * H, upscale * W)`, RGB, not clamped; beyond a picture it means nothing.
        """
        margin, hidden = Margin(x, sizes), x
        for layer in self.body:
            hidden = layer(hidden)
            if isinstance(layer, nn.Conv2d):
                margin.clear(hidden)
        details = self.upsampler(hidden)
        return details + F.interpolate(x, scale_factor=self.upscale, mode="nearest")
