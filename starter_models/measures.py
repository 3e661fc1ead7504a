"""What `starter_models.quality` measures by, and the test pictures it measures on.

Pictures are `H x W x 3`, float32, sRGB in [0, 1]. `benchmarks.detail` measures by them, too.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.metrics import structural_similarity

from starter_models.running import from_image, to_image

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deployments.images import Array
    from starter_models.training.data import Picture

SCALE = 4
_BAND_PX = 256
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def label(name: str) -> str:
    return name.split(":")[1].split(".")[0]


def centre(picture: Picture, longest: int = 256) -> Picture:
    """The middle of a picture: a working size of the models, so that no scaling is measured."""
    height, width = (min(side, longest) // 64 * 64 for side in picture.shape[:2])
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]


def shrunk(picture: Picture) -> tuple[Picture, Picture]:
    """A picture cropped to multiples of `SCALE`, and its small version."""
    height, width = (side // SCALE * SCALE for side in picture.shape[:2])
    image = to_image(picture[:height, :width])
    small = image.resize((width // SCALE, height // SCALE), Image.Resampling.BICUBIC)
    return picture[:height, :width], from_image(small)


def enlarged(small: Picture, shape: tuple[int, ...]) -> list[Picture]:
    """A small picture at the height and width of `shape`, by Pillow's bicubic and Lanczos."""
    kinds = (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
    return [from_image(to_image(small).resize((shape[1], shape[0]), kind)) for kind in kinds]


def resaved(picture: Picture, quality: int) -> Picture:
    """The picture after JPEG."""
    buffer = io.BytesIO()
    to_image(picture).save(buffer, "JPEG", quality=quality)
    return from_image(Image.open(buffer))


def sharpness(image: Image.Image) -> float:
    """Variance of the luma's Laplacian, the usual measure of focus (Pech-Pacheco et al. 2000).

    In squares of 8-bit levels.
    """
    return float(ndimage.laplace(np.asarray(image.convert("L"), np.float32)).var())


def spoiled(picture: Picture) -> Picture:
    """Noise of 10 / 255, then JPEG at quality 20: as a bad phone would have saved it."""
    noise = np.random.default_rng(0).normal(0, 10 / 255, picture.shape)
    return resaved(np.floor(np.clip(picture + noise, 0, 1) * 255) / 255, quality=20)


def everything(picture: Picture) -> Picture:
    return np.ones(picture.shape[:2], np.float32)


def ellipse(picture: Picture) -> Picture:
    """The ellipse that fills the middle half of each side."""
    y, x = (np.linspace(-2, 2, side) for side in picture.shape[:2])
    return (x[None] ** 2 + y[:, None] ** 2 < 1).astype(np.float32)


def otsu(picture: Picture) -> Picture:
    """The side of Otsu's threshold (1979) that the border mostly is not on."""
    luma = picture @ LUMA
    bright = luma > threshold_otsu(luma)
    border = np.concatenate([bright[0], bright[-1], bright[:, 0], bright[:, -1]])
    return (bright != (border.mean() > 0.5)).astype(np.float32)


def decibel(a: Array, b: Array, white: int = 1) -> float:
    """PSNR of two pictures; infinite if they are equal.

    Args:
        a, b: of one shape, `H x W x 3` or `H x W`.
        white: the level of white: 1, or 255 for 8-bit levels.
    """
    # In bands, so that large pictures take little memory.
    total = 0.0
    for top in range(0, len(a), _BAND_PX):
        band = slice(top, top + _BAND_PX)
        total += float(((a[band].astype(np.float32) - b[band]) ** 2).sum(dtype=np.float64))
    mean = total / a.size
    return 10 * math.log10(white**2 / mean) if mean else math.inf


def similarity(a: Picture, b: Picture) -> float:
    """SSIM (Wang et al. 2004) of the luminance."""
    return float(structural_similarity(a @ LUMA, b @ LUMA, data_range=1.0))


def flat_share(picture: Picture, blur_px: float = 0) -> float:
    """Share of pixels whose luminance gradient is below 2/255 a pixel.

    Args:
        picture: any.
        blur_px: Gaussian blur beforehand, so that noise does not count as relief.
    """
    dy, dx = np.gradient(ndimage.gaussian_filter(picture @ LUMA, blur_px))
    return float((np.hypot(dx, dy) < 2 / 255).mean())


def warmth(picture: Picture) -> float:
    """Mean red minus blue, /255."""
    return float((picture[..., 0] - picture[..., 2]).mean()) * 255


def off_tint(picture: Picture) -> float:
    """RMS distance, /255, of the chroma from the line that luminance alone predicts it by."""
    luma = (picture @ LUMA).ravel()
    chroma = picture.reshape(-1, 3)[:, ::2] - luma[:, None]
    basis = np.stack([luma, np.ones_like(luma)], 1)
    fitted = basis @ np.linalg.lstsq(basis, chroma)[0]
    return float(np.sqrt(((chroma - fitted) ** 2).sum(1).mean())) * 255


def grain(picture: Picture, smooth: NDArray[np.bool_]) -> float:
    """Deviation of the luminance noise, /255 (Immerkaer 1996), where `smooth` is true.

    Over the whole picture the estimate would be of texture rather than of noise.
    """
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
    response = ndimage.convolve(picture @ LUMA, kernel)
    return float(np.sqrt(np.pi / 2) / 6 * np.abs(response[smooth]).mean()) * 255


def smooth_quarter(picture: Picture) -> NDArray[np.bool_]:
    """The quarter of the pixels around which the luminance changes least."""
    slope = ndimage.gaussian_gradient_magnitude(picture @ LUMA, 2)
    return slope <= np.quantile(slope, 0.25)
