"""Pictures of any shape go to a working size and come back at their own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments import buckets


def scene(width: int, height: int) -> np.ndarray:
    """A smooth picture whose four corners differ, so that any turn shows."""
    across, down = np.linspace(0, 255, width), np.linspace(0, 255, height)
    red, green = np.meshgrid(across, down)
    return np.dstack([red, green, 255 - red]).astype(np.uint8)


BUCKETS = [(512, 512), (1024, 1024), (1216, 832), (832, 1216), (1536, 640)]
sides = st.integers(1, 3000)
small_buckets = st.tuples(st.integers(1, 96), st.integers(1, 96))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((400, 400), (512, 512)),
        ((512, 512), (512, 512)),
        ((513, 513), (1024, 1024)),
        ((4000, 4000), (1024, 1024)),
        ((4000, 2700), (1216, 832)),
        ((2700, 4000), (832, 1216)),
        ((10000, 1), (1536, 640)),
    ],
)
def test_a_picture_gets_the_bucket_of_its_shape(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert buckets.choose_bucket(*size, BUCKETS) == expected


@given(width=sides, height=sides)
def test_a_bucket_is_always_found_and_the_content_lies_inside(width: int, height: int) -> None:
    bucket = buckets.choose_bucket(width, height, BUCKETS)
    across, down = buckets.content_box(width, height, bucket)
    assert bucket in BUCKETS
    assert 1 <= across <= bucket[0]
    assert 1 <= down <= bucket[1]
    assert across == bucket[0] or down == bucket[1]


@settings(deadline=None)
@given(
    size=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    bucket=small_buckets,
    grey=st.booleans(),
)
def test_there_and_back_keeps_the_size(
    size: tuple[int, int], bucket: tuple[int, int], grey: bool
) -> None:
    fitted = buckets.fit_to_bucket(scene(*size), bucket)
    assert fitted.shape == (bucket[1], bucket[0], 3)
    output = fitted[..., 0] if grey else fitted
    restored = buckets.restore_from_bucket(output, *size, working=False)
    assert restored.shape[:2] == (size[1], size[0])
    assert restored.ndim == output.ndim
    working = buckets.restore_from_bucket(output, *size, working=True)
    assert working.shape[:2] == buckets.content_box(*size, bucket)[::-1]


@pytest.mark.parametrize("size", [(1, 1), (10000, 1), (1, 10000), (3, 2), (1920, 1080)])
def test_pictures_of_any_shape_fit(size: tuple[int, int]) -> None:
    fitted = buckets.fit_to_bucket(scene(*size), (256, 192))
    assert fitted.shape == (192, 256, 3)
    assert buckets.restore_from_bucket(fitted, *size, working=False).shape == (size[1], size[0], 3)


def test_there_and_back_keeps_the_picture() -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    picture = buckets.resize(coarse, 300, 200)
    fitted = buckets.fit_to_bucket(picture, (512, 512))
    restored = buckets.restore_from_bucket(fitted, 300, 200, working=False)
    error = np.mean((restored.astype(float) - picture) ** 2)
    assert error < 255**2 / 10**4  # a signal-to-noise ratio of 40 dB


def test_the_rest_of_a_bucket_mirrors_the_picture() -> None:
    fitted = buckets.fit_to_bucket(scene(64, 48), (64, 64))
    assert np.array_equal(fitted[:48], scene(64, 48))
    assert np.array_equal(fitted[48:], fitted[46:30:-1])


@pytest.mark.parametrize("shape", [(8, 6, 3), (8, 6)])
def test_resize_gives_a_new_array_of_the_size(shape: tuple[int, ...]) -> None:
    pixels = np.zeros(shape, np.uint8)
    assert buckets.resize(pixels, 12, 10).shape == (10, 12, *shape[2:])
    same = buckets.resize(pixels, 6, 8)
    assert not np.shares_memory(same, pixels)
    assert same.flags.writeable
