"""Masks as pictures: what they mark, their soft edges, and what they leave as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from deployments.buckets import fit_mask_to_bucket
from deployments.contract import EnhanceRequest
from deployments.errors import InvalidParameter
from deployments.images import Picture
from deployments.masks import check_size, feathered, kept, masked
from deployments.notes import Code, note

RNG = np.random.default_rng(0)
PICTURE = Picture(RNG.integers(0, 256, (40, 60, 3), np.uint8), None)


def asked(**changes: Any) -> EnhanceRequest:
    return EnhanceRequest(mask="picture", **changes)


def blob() -> np.ndarray:
    y, x = np.mgrid[:40, :60]
    return np.where((x - 25) ** 2 + (y - 20) ** 2 < 150, 255, 0).astype(np.uint8)


def test_white_is_changed_and_grey_between() -> None:
    grey = np.linspace(0, 255, 60).astype(np.uint8)[None].repeat(40, axis=0)
    for file in (Picture(grey, None), Picture(np.stack([grey] * 3, axis=-1), None)):
        assert (masked(PICTURE, file, asked())[1] == grey).all()


def test_transparent_is_changed_where_the_request_says_so() -> None:
    alpha = 255 - blob()
    file = Picture(PICTURE.rgb, alpha)
    assert (masked(PICTURE, file, asked(mask_changes="transparent"))[1] == blob()).all()


def test_notes_say_how_much_is_marked_and_what_the_mask_lost() -> None:
    file = Picture(blob(), None, (note(Code.FRAMES_DROPPED, "The first of 3 frames was used."),))
    picture, _ = masked(PICTURE, file, asked())
    told = {one.code: one.text for one in picture.notes}
    assert told["masked"] == "The mask marks 20 % of the picture; the rest stays as it was."
    assert told["frames_dropped"] == "Of the mask: The first of 3 frames was used."


def test_another_size_is_refused_with_both_even_of_the_same_shape() -> None:
    with pytest.raises(InvalidParameter) as caught:
        check_size((120, 80), (60, 40))
    assert caught.value.value == "120 x 80 px for a picture of 60 x 40 px"
    assert caught.value.remedy == "Send a mask of 60 x 40 px."


@pytest.mark.parametrize("width_px", [1, 4, 9, 128])
def test_a_feather_rises_from_the_edge_inwards_by_distance(width_px: int) -> None:
    mask = blob()
    mask[30:34, :] = 255  # a thin stroke, and one along the border
    mask[:, 0] = 128
    distance = ndimage.distance_transform_edt(mask)
    expected = np.ceil(mask * np.minimum(distance / (width_px + 1), 1).astype(np.float32))
    soft = feathered(mask, width_px)
    assert np.abs(soft.astype(int) - expected).max() <= 1
    assert ((soft > 0) == (mask > 0)).all()


def test_no_feather_leaves_the_mask() -> None:
    assert feathered(blob(), 0) is not None
    assert (feathered(blob(), 0) == blob()).all()
    everywhere = np.full((40, 60), 255, np.uint8)
    assert (feathered(everywhere, 20) == 255).all(), "the picture's border is no edge"


def test_what_is_left_out_stays_to_the_bit_and_grey_is_mixed() -> None:
    made = Picture(255 - PICTURE.rgb, None)
    mask = blob()
    mask[:5] = 128
    result = kept(made, PICTURE, mask).rgb
    assert (result[mask == 0] == PICTURE.rgb[mask == 0]).all()
    assert (result[mask == 255] == made.rgb[mask == 255]).all()
    assert np.abs(result[:5].astype(int) - 127).max() <= 1


def test_a_mask_lies_in_its_bucket_as_its_picture_does() -> None:
    fitted = fit_mask_to_bucket(blob(), (64, 64))
    assert fitted.shape == (64, 64)
    rows = np.flatnonzero((fitted[:43] > 127).any(axis=1))
    assert (rows[0], rows[-1]) == pytest.approx((9, 34), abs=1)
    assert set(np.unique(fit_mask_to_bucket(blob(), (30, 20)))) >= {0, 255}
