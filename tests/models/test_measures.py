"""What quality is measured by."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image, ImageFilter
from skimage.metrics import peak_signal_noise_ratio

from starter_models.measures import decibel, sharpness

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (600, 40, 3), np.uint8)  # of more than one band
OTHER = RNG.integers(0, 256, PICTURE.shape, np.uint8)


def test_decibels_are_those_of_scikit_image_for_levels_and_for_shares_of_white() -> None:
    expected = peak_signal_noise_ratio(PICTURE, OTHER)
    assert decibel(PICTURE, OTHER, white=255) == pytest.approx(expected, abs=1e-4)
    a, b = (one / np.float32(255) for one in (PICTURE, OTHER))
    assert decibel(a, b) == pytest.approx(expected, abs=1e-4)
    assert decibel(a, a) == math.inf


def test_a_blurred_picture_is_less_sharp_and_an_even_one_not_at_all() -> None:
    image = Image.fromarray(PICTURE)
    assert sharpness(image.filter(ImageFilter.GaussianBlur(1))) < 0.1 * sharpness(image)
    assert sharpness(Image.new("RGB", (40, 40), "teal")) == 0
