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
    """RGB to RGB, `scale` times as high and wide.

    Args:
        num_feat: channels between the convolutions.
        num_conv: convolutions between the first and the last.
        scale: factor.

    The defaults build realesr-general-x4v3 (1,213,296 parameters).

    Attributes:
        multiple_px: of which the height and width of every input must be multiples.
        tile_overlap_px: in input px, how far an output pixel sees: tiles that overlap by this equal
            the whole picture exactly.
    """

    def __init__(self, num_feat: int = 64, num_conv: int = 32, scale: int = 4) -> None:
        super().__init__()
        self.scale = scale
        self.multiple_px = 1
        self.tile_overlap_px = num_conv + 2
        layers: list[nn.Module] = [nn.Conv2d(3, num_feat, 3, padding=1), nn.PReLU(num_feat)]
        for _ in range(num_conv):
            layers += [nn.Conv2d(num_feat, num_feat, 3, padding=1), nn.PReLU(num_feat)]
        layers.append(nn.Conv2d(num_feat, 3 * scale**2, 3, padding=1))
        self.body = nn.Sequential(*layers)
        self.upsampler = nn.PixelShuffle(scale)

    def forward(self, x: Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Upscale.

        Args:
            x: `(B, 3, H, W)` float, RGB in [0, 1].
            sizes: height and width of each picture, at the top left among zeros; None: H and W.

        Returns:
            `(B, 3, scale * H, scale * W)`, RGB, not clamped; beyond a picture it means nothing.
        """
        margin, hidden = Margin(x, sizes), x
        for layer in self.body:
            hidden = layer(hidden)
            if isinstance(layer, nn.Conv2d):
                margin.clear(hidden)
        details = self.upsampler(hidden)
        return details + F.interpolate(x, scale_factor=self.scale, mode="nearest")
