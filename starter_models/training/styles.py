"""What each diffusion starter model learns to turn a picture into. Pictures are `H x W x 3` in
[0, 1], float32.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.restoration import denoise_tv_chambolle

from starter_models.training.data import Picture

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_SEPIA = np.array([1.06, 0.88, 0.62], np.float32)


def degraded(picture: Picture, rng: np.random.Generator, *, sigma: float, quality: int) -> Picture:
    """Gaussian noise of `sigma` / 255, then JPEG at `quality`: a bad phone picture."""
    noisy = picture + rng.normal(0, sigma / 255, picture.shape)
    buffer = io.BytesIO()
    Image.fromarray((np.clip(noisy, 0, 1) * 255).astype(np.uint8)).save(
        buffer, "JPEG", quality=quality
    )
    return np.asarray(Image.open(buffer), np.float32) / 255


def comic(picture: Picture) -> Picture:
    """Flat colour areas, dark outlines, fewer tones, more saturation."""
    # 1) Flatten: total variation (Chambolle 2004) keeps edges and removes texture.
    flat = denoise_tv_chambolle(picture, weight=0.12, channel_axis=2, max_num_iter=60)
    # 2) Fewer tones: a soft staircase of six levels on the luminance alone.
    luma = flat @ _LUMA
    levels = 6
    steps = luma * levels
    toned = (np.floor(steps) + 0.5 + 0.5 * np.tanh((steps % 1 - 0.5) * 6) / np.tanh(3)) / levels
    colour = (flat - luma[..., None]) * 1.35
    out = colour + (0.6 * toned + 0.4 * luma)[..., None]
    # 3) Ink: where a difference of Gaussians says the luminance turns darker.
    edges = ndimage.gaussian_filter(luma, 1.0) - ndimage.gaussian_filter(luma, 2.0)
    ink = np.clip(-edges * 14 - 0.15, 0, 0.8)
    return np.clip(out * (1 - ink[..., None]), 0, 1).astype(np.float32)


def aged(picture: Picture) -> Picture:
    """A faded sepia print. Its grain is the residual noise of the model's own schedule."""
    luma = picture @ _LUMA
    sepia = luma[..., None] * _SEPIA
    faded = np.array([0.12, 0.09, 0.05]) + 0.84 * (0.9 * sepia + 0.1 * picture)
    soft = ndimage.gaussian_filter(faded, (0.6, 0.6, 0))
    return np.clip(soft, 0, 1).astype(np.float32)
