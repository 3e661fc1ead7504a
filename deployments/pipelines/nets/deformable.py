"""Deformable convolution: each tap reads where the network wants it to, with a factor.

Source: Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results", CVPR 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DeformableConv(nn.Module):
    """A convolution that finds the offsets and factors of its taps itself; keeps height and width.

    Args:
        kernel: height and width, odd.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        edge, taps = kernel // 2, kernel**2
        self.offset_conv = nn.Conv2d(inputs, 2 * taps, kernel, padding=edge)
        self.modulator_conv = nn.Conv2d(inputs, taps, kernel, padding=edge)
        self.regular_conv = nn.Conv2d(inputs, outputs, kernel, padding=edge, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        modulation = 2 * self.modulator_conv(x).sigmoid()
        return deformable_conv(x, self.regular_conv.weight, self.offset_conv(x), modulation)


def deformable_conv(x: Tensor, weight: Tensor, offset: Tensor, modulation: Tensor) -> Tensor:
    """A convolution whose taps read anywhere, each with a factor.

    Between pixels a picture is bilinear, outside it is 0.

    Args:
        x: `(B, C, H, W)`.
        weight: `(O, C, K, K)`, K odd.
        offset: `(B, 2 K K, H, W)`: for each tap, row by row, how many pixels further down and
            further right it reads than a plain convolution does.
        modulation: `(B, K K, H, W)`: the factor of each tap.

    Returns:
        `(B, O, H, W)`.
    """
    rows, channels, height, width = x.shape
    kernel = weight.shape[-1]
    pixels = x.float()  # half precision is too coarse for places
    offset = offset.float().view(rows, kernel, kernel, 2, height, width)
    modulation = modulation.view(rows, 1, kernel, kernel, height, width)
    tap = torch.arange(kernel, device=x.device) - kernel // 2
    down = torch.arange(height, device=x.device)[:, None]
    across = torch.arange(width, device=x.device) + tap[:, None, None]
    total = x.new_zeros(rows, weight.shape[0], height, width)
    for i in range(kernel):  # a row of taps at a time: all at once would be large
        places = (offset[:, i, :, 1] + across, offset[:, i, :, 0] + (down + tap[i]))
        # grid_sample takes -1 and 1 for the outer edges of the outermost pixels.
        x_place, y_place = (
            (2 * p + 1) / s - 1 for p, s in zip(places, (width, height), strict=True)
        )
        grid = torch.stack((x_place, y_place), -1).flatten(1, 2)
        read = F.grid_sample(pixels, grid, align_corners=False)
        read = read.view(rows, channels, kernel, height, width).to(x.dtype) * modulation[:, :, i]
        taps = weight[:, :, i].flatten(1)[:, :, None, None]
        total = total + F.conv2d(read.flatten(1, 2), taps)
    return total
