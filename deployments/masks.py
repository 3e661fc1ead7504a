"""Masks: which part of a picture is changed, and how the rest stays as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from deployments.buckets import resize
from deployments.errors import InvalidParameter
from deployments.images import Picture
from deployments.notes import Code, note
from deployments.transparency import laid_over, scaled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deployments.contract import Img2ImgRequest
    from deployments.images import Array

_STRIP_ROWS: Final = 64
"""Rows whose distances are worked on at a time, so that they stay in a processor's cache."""


def check_size(mask_px: tuple[int, int], picture_px: tuple[int, int]) -> None:
    """Whether a mask has the picture's size; of the same shape is not enough.

    Args:
        mask_px, picture_px: width and height of each, upright.

    Raises:
        InvalidParameter: it has another one.
    """
    if mask_px != picture_px:
        raise InvalidParameter(
            "The mask has another size than the picture.",
            value="{} x {} px for a picture of {} x {} px".format(*mask_px, *picture_px),
            remedy="Send a mask of {} x {} px.".format(*picture_px),
        )


def masked(
    picture: Picture, file: Picture | None, request: Img2ImgRequest
) -> tuple[Picture, Array]:
    """The picture as the model gets it, and what of it may change.

    Args:
        picture: as the client sent it.
        file: the mask that came as a file; None for the picture's own alpha.
        request: complete, with a mask.

    Returns:
        The picture, which has no alpha any more if that was the mask, with the notes of both; and
        the mask, `H x W`, uint8: 255 is changed, 0 stays, and what is between is mixed.

    Raises:
        InvalidParameter: the mask has another size, lacks what it should mark with, or marks
            nothing.
    """
    if file is None:
        mask = _transparent(picture, "picture", "mask")
        picture = Picture(picture.rgb, None, picture.notes)
    else:
        check_size((file.width_px, file.height_px), (picture.width_px, picture.height_px))
        is_clear = request.mask_changes == "transparent"
        mask = _transparent(file, "mask", "mask_changes") if is_clear else _white(file)
    mask = feathered(mask, request.mask_feather_px)
    if not mask.any():
        raise InvalidParameter(
            "The mask marks nothing for change.",
            value="black everywhere",
            remedy="Make white what shall change, or leave the mask out.",
        )
    told = f"The mask marks {_percent(mask)} % of the picture; the rest stays as it was."
    notes = [note(Code.MASKED, told)]
    if file is not None:
        notes += [note(Code(one.code), f"Of the mask: {one.text}") for one in file.notes]
    return replace(picture, notes=(*picture.notes, *notes)), mask


def feathered(mask: Array, width_px: int) -> Array:
    """A mask that rises over so many pixels from its edge inwards.

    What is 0 stays 0. Pixels count by their Euclidean distance to the nearest 0, in the columns
    first and then along the rows (Felzenszwalb and Huttenlocher 2012, section 4.1), as far as the
    edge reaches. The picture's own border is no edge.

    Args:
        mask: `H x W`.
        width_px: 0 to 128.
    """
    if not width_px or not mask.any():
        return mask
    rows, columns = (_around(mask.max(axis=axis)) for axis in (1, 0))
    soft, part = mask.copy(), mask[rows, columns]
    down = _distances_down(part == 0, width_px + 1)
    for top in range(0, len(part), _STRIP_ROWS):
        strip = slice(top, top + _STRIP_ROWS)
        share = np.sqrt(_squares(down[strip], width_px), dtype=np.float32) / (width_px + 1)
        soft[rows, columns][strip] = np.ceil(part[strip] * np.minimum(share, 1))
    return soft


def kept(result: Picture, picture: Picture, mask: Array) -> Picture:
    """The result where the mask is 255, and the picture itself where it is 0.

    Args:
        result: of the picture's size, or of the size that the model worked at.
        picture: as the model got it.
        mask: of the picture's size.
    """
    size, rgb = (result.width_px, result.height_px), picture.rgb
    if size != (picture.width_px, picture.height_px):
        mask, rgb = scaled(mask, *size), resize(rgb, *size)
    return replace(result, rgb=laid_over(result.rgb, mask, rgb))


def _white(file: Picture) -> Array:
    if file.alpha is not None:
        raise InvalidParameter(
            "The mask has both colours and transparency, and may mean either.",
            value="mask_changes=white, and a mask that is transparent",
            remedy="Send a mask without transparency, or mask_changes=transparent.",
        )
    return np.asarray(Image.fromarray(file.rgb).convert("L"))


def _transparent(of: Picture, what: str, field: str) -> Array:
    """What is transparent in a picture."""
    if of.alpha is None:
        raise InvalidParameter(
            f"The {what} has no transparent part.",
            value="an opaque picture",
            remedy=f"Make transparent what shall change, or send another {field}.",
        )
    return 255 - of.alpha


def _percent(mask: Array) -> str:
    share = 100 * np.count_nonzero(mask) / mask.size
    return f"{share:.0f}" if share >= 1 else f"{share:.1g}"


def _around(marked: Array) -> slice:
    """From the first that is not 0 to the last, and one more on each side."""
    places = np.flatnonzero(marked)
    return slice(max(int(places[0]) - 1, 0), int(places[-1]) + 2)


def _distances_down(edge: NDArray[np.bool_], most: int) -> NDArray[np.uint16]:
    """How far the nearest edge of its column is from each pixel, px; at most `most`."""
    distances = np.where(edge, 0, most).astype(np.uint16)
    for row in range(1, len(edge)):
        np.minimum(distances[row], distances[row - 1] + 1, out=distances[row])
    for row in range(len(edge) - 2, -1, -1):
        np.minimum(distances[row], distances[row + 1] + 1, out=distances[row])
    return distances


def _squares(down: NDArray[np.uint16], most_px: int) -> NDArray[np.uint16]:
    """The squared distance to the nearest edge of any column, where that is at most `most_px`."""
    own = down * down
    nearest = own.copy()
    for apart in range(1, min(most_px, own.shape[1] - 1) + 1):
        square = np.uint16(apart * apart)
        left, right = nearest[:, apart:], nearest[:, :-apart]
        np.minimum(left, own[:, :-apart] + square, out=left)
        np.minimum(right, own[:, apart:] + square, out=right)
    return nearest
