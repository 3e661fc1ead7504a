"""What cameras do to a picture, on the device and by the batch: light, blur, noise, JPEG.

Pictures are `(B, 3, H, W)` in [0, 1]; every row is treated by chances of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_LUMINANCE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113,
    92, 49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
_CHROMA = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99,
    47, 66, 99, 99, 99, 99, 99, 99, *(99,) * 32,
)  # fmt: skip
_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def adjusted(picture: Tensor, strength: float = 1.0) -> Tensor:
    """Brightness, contrast, saturation, white balance and gamma changed at random."""
    count, device = len(picture), picture.device

    def normal(deviation: float, channels: int = 1) -> Tensor:
        return torch.randn(count, channels, 1, 1, device=device) * deviation * strength

    gain = torch.exp(normal(0.12)) * torch.exp(normal(0.05, 3))
    grey = picture.mean(1, keepdim=True)
    picture = grey + (picture - grey) * torch.exp(normal(0.25))
    middle = picture.mean((1, 2, 3), keepdim=True)
    picture = middle + (picture - middle) * torch.exp(normal(0.15))
    picture = (picture * gain + normal(0.04)).clamp(1e-3, 1)
    return picture ** torch.exp(normal(0.2))


def recoloured(picture: Tensor) -> Tensor:
    """Half the rows with their channels in another order, another quarter up to 3 times as vivid.

    Photographs are mostly greyish. A small network that sees only them learns to draw the edges of
    all channels alike, and spoils a yellow flower.
    """
    swapped = len(picture) // 2
    vivid = picture[swapped : swapped + len(picture) // 4]
    grey = vivid.mean(1, keepdim=True)
    factor = 1 + 2 * torch.rand(len(vivid), 1, 1, 1, device=picture.device)
    parts = (
        picture[:swapped, torch.randperm(3).tolist()],
        (grey + factor * (vivid - grey)).clamp(0, 1),
        picture[swapped + len(vivid) :],
    )
    return torch.cat(parts)


def blurred(picture: Tensor, *, odds: float, strongest: float) -> Tensor:
    """Gaussian blur of up to `strongest` pixels, for `odds` of the rows."""
    count = len(picture)
    rows = (torch.rand(count, device=picture.device) < odds).nonzero()[:, 0]
    out = picture.clone()
    # Rows of a like blur are treated together.
    for part in rows.tensor_split(6) if len(rows) >= 6 else [rows]:
        if len(part):
            sigma = strongest ** torch.rand(()).item() if strongest > 1.5 else (
                0.3 + (strongest - 0.3) * torch.rand(()).item()
            )  # fmt: skip
            out[part] = gaussian(picture[part], sigma)
    return out


def gaussian(picture: Tensor, sigma: float) -> Tensor:
    """Gaussian blur by `sigma` pixels; a strong one is computed on a smaller picture."""
    size = picture.shape[-2:]
    if sigma > 4 and min(size) >= 64:
        small = gaussian(F.avg_pool2d(picture, 2), sigma / 2)
        return F.interpolate(small, size=size, mode="bilinear", align_corners=False)
    radius = max(math.ceil(2.5 * sigma), 1)
    line = torch.arange(-radius, radius + 1, device=picture.device, dtype=picture.dtype)
    kernel = torch.exp(-0.5 * (line / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).repeat(picture.shape[1], 1, 1, 1)
    groups = picture.shape[1]
    padded = F.pad(picture, (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=groups), kernel.mT, groups=groups)


def noisy(picture: Tensor, *, odds: float, strongest: float) -> Tensor:
    """Gaussian noise of a deviation of up to `strongest`, for `odds` of the rows."""
    shape = (len(picture), 1, 1, 1)
    deviation = torch.rand(shape, device=picture.device) * strongest
    deviation = deviation * (torch.rand(shape, device=picture.device) < odds)
    return (picture + deviation * torch.randn_like(picture)).clamp(0, 1)


def compressed(picture: Tensor, *, odds: float, lowest: float, highest: float = 95) -> Tensor:
    """JPEG at a quality between both, for `odds` of the rows; sides are multiples of 16."""
    count, device = len(picture), picture.device
    quality = lowest + (highest - lowest) * torch.rand(count, device=device)
    rows = (torch.rand(count, device=device) < odds).nonzero()[:, 0]
    if not len(rows):
        return picture
    out = picture.clone()
    out[rows] = jpeg(picture[rows], quality[rows]).to(picture.dtype)
    return out


def jpeg(picture: Tensor, quality: Tensor) -> Tensor:
    """What JPEG with halved chroma makes of each row (ITU-T T.81; scaling of the tables as in the
    Independent JPEG Group's library).

    Args:
        picture: sides are multiples of 16.
        quality: (B,), 1 to 100.
    """
    picture = (picture.float() * 255).round()
    to = torch.tensor(_YCC, device=picture.device)
    ycc = torch.einsum("ij,bjhw->bihw", to, picture)
    luma, chroma = ycc[:, :1] - 128, F.avg_pool2d(ycc[:, 1:], 2)
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality).view(-1, 1, 1, 1, 1, 1)
    luma = _quantised(luma, _LUMINANCE, scale) + 128
    chroma = _quantised(chroma, _CHROMA, scale)
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    inverse = torch.linalg.inv(torch.tensor(_YCC)).to(picture.device)
    back = torch.einsum("ij,bjhw->bihw", inverse, torch.cat([luma, chroma], 1))
    return (back.round() / 255).clamp(0, 1)


def _quantised(plane: Tensor, table: tuple[int, ...], scale: Tensor) -> Tensor:
    count, channels, height, width = plane.shape
    k = torch.arange(8, device=plane.device, dtype=torch.float32)
    basis = torch.cos((2 * k + 1) * k.view(8, 1) * math.pi / 16) / 2
    basis[0] /= math.sqrt(2)
    blocks = plane.reshape(count, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    steps = torch.tensor(table, device=plane.device, dtype=torch.float32).view(8, 8)
    steps = ((steps * scale + 50) / 100).floor().clamp(1, 255)
    found = (basis @ blocks @ basis.T / steps).round() * steps
    return (basis.T @ found @ basis).transpose(3, 4).reshape(plane.shape)
