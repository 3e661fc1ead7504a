"""What each diffusion starter model learns to turn a picture into. Pictures are `H x W x 3` in
[0, 1], float32.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from skimage.morphology import remove_small_objects

from deployments.images import Array
from starter_models.training.data import Picture

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
BLACK = np.array([0.16, 0.10, 0.07], np.float32)
PAPER = np.array([0.98, 0.90, 0.74], np.float32)
"""What black and white of a photograph become on the old print."""
WARMTH = np.array([0.85, 1.0, 1.15], np.float32)
"""Exponents of red, green and blue between them: greys become brown rather than olive."""


def comic(picture: Picture) -> Picture:
    """Flat colour areas with crisp borders, few tones, more saturation, ink lines with weight."""
    # 1) Flatten, less where it is dark, or a forest is one dark area. Beyond the frame the picture
    # goes on as its mirror image.
    margin = 16
    wide = np.pad(picture, ((margin, margin), (margin, margin), (0, 0)), mode="symmetric")
    light = ndimage.gaussian_filter(wide @ LUMA, 16)
    flat = flattened(wide, strength=0.022 * np.clip((light / 0.4) ** 2, 0.08, 1))
    flat = flat[margin:-margin, margin:-margin]
    # 2) Few tones: a steep staircase of six levels on the luminance alone.
    luma = flat @ LUMA
    levels = 6
    steps = luma * levels
    stairs = (np.floor(steps) + 0.5 + 0.5 * np.tanh((steps % 1 - 0.5) * 8) / np.tanh(4)) / levels
    toned = 0.75 * stairs + 0.25 * luma
    colour = (flat - luma[..., None]) * 1.3 + toned[..., None]
    # 3) Ink: where a difference of Gaussians says the luminance turns darker, specks left out.
    detail = 0.8 * luma + 0.2 * ndimage.gaussian_filter(picture @ LUMA, 0.6)
    edges = ndimage.gaussian_filter(detail, 1.0) - ndimage.gaussian_filter(detail, 2.2)
    lines = remove_small_objects(edges < -0.016, max_size=60, connectivity=2)
    ink = 0.9 * ndimage.gaussian_filter(np.clip((-edges - 0.016) / 0.014, 0, 1) * lines, 0.5)
    return np.clip(colour * (1 - ink[..., None]), 0, 1).astype(np.float32)


def flattened(picture: Picture, strength: Array) -> Picture:
    """L0 gradient minimisation (Xu, Lu, Xu and Jia, 2011): the nearest picture with few changes of
    colour. `strength`, `H x W`, weighs a change; the frame is taken to wrap around.
    """
    rise = 2.0
    height, width = picture.shape[:2]
    turn = [np.fft.fftfreq(n)[:, None] for n in (height, width)]
    slopes = 4 * np.sin(np.pi * turn[0]) ** 2 + 4 * np.sin(np.pi * turn[1]).T ** 2
    source, flat, beta = np.fft.fft2(picture, axes=(0, 1)), picture, 2 * strength.max()
    while beta < 1e4:
        down, right = (np.roll(flat, -1, axis) - flat for axis in (0, 1))
        small = (down**2 + right**2).sum(2) < strength / beta
        down[small] = right[small] = 0
        back = np.roll(down, 1, 0) - down + np.roll(right, 1, 1) - right
        mixed = source + beta * np.fft.fft2(back, axes=(0, 1))
        flat = np.fft.ifft2(mixed / (1 + beta * slopes)[..., None], axes=(0, 1)).real
        beta *= rise
    return flat.astype(np.float32)


def aged(picture: Picture) -> Picture:
    """A faded print in tones of one colour, a little soft. Training adds the grain."""
    luma = np.clip(picture @ LUMA, 0, 1)
    contrasty = 0.7 * luma + 0.3 * luma**2 * (3 - 2 * luma)
    tones = ndimage.gaussian_filter(contrasty, 0.6)[..., None] ** WARMTH
    return (BLACK + (PAPER - BLACK) * tones).astype(np.float32)
