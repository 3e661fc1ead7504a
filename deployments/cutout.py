"""What background removal makes of a picture and its mask."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image, ImageFilter

from deployments.contract import PICTURE
from deployments.foreground import estimate_foreground
from deployments.images import Picture
from deployments.notes import Code, note
from deployments.transparency import BLACK, WHITE, laid_over, scaled, strips

if TYPE_CHECKING:
    from deployments.contract import BackgroundRequest
    from deployments.images import Array

_VISIBLE: Final = 13
"""Alpha, of 255, from which a pixel counts as part of the subject: 5 %."""
_FOREGROUND: Final = 128
"""Alpha, of 255, that some pixel reaches if there is a foreground at all."""


_PLAIN: Final = 8
"""Levels, of 255, by which a picture must vary to show anything."""
_SHADOW_OPACITY: Final = 0.45
_SHADOW_DOWN: Final = 0.03
_SHADOW_BLUR: Final = 0.035
"""How far a shadow falls, and the deviation of its blur; of the side of a square of the subject's
size."""
_WHOLE: Final = (slice(None), slice(None))


def cut_out(picture: Picture, mask: Array, request: BackgroundRequest) -> Picture:
    """The result that `request` asks for.

    Args:
        picture: as the client sent it. Where it is transparent, it stays at least as transparent.
        mask: the foreground, 255, as the model saw it; of any size.
        request: complete.
    """
    alpha, notes = _alpha(picture, mask), picture.notes
    if alpha.max() < _FOREGROUND:
        told = "No foreground was found: nothing in the result is more than half opaque."
        notes += (note(Code.NO_FOREGROUND, told),)
    if request.output == "mask":
        return Picture(alpha[_box(alpha, request)], None, notes)
    rgb = picture.rgb
    if request.edges == "estimated":
        rgb = estimate_foreground(rgb, alpha)
    if request.shadow == "soft":
        rgb, alpha = _with_shadow(rgb, alpha)
    box = _box(alpha, request)
    rgb, alpha = np.ascontiguousarray(rgb[box]), np.ascontiguousarray(alpha[box])
    color = request.color if request.output == "color" else request.background
    if color is None or color == PICTURE:
        return Picture(rgb, alpha, notes)
    red, green, blue = bytes.fromhex(color[1:])
    return Picture(laid_over(rgb, alpha, (red, green, blue)), None, notes)


def laid_on(cutout: Picture, background: Picture) -> Picture:
    """A cut-out on a picture, which is scaled to cover it and cut at its middle.

    Args:
        cutout: with alpha.
        background: of any size; where it is transparent, white shows.
    """
    below = background.rgb
    if background.alpha is not None:
        below = laid_over(below, background.alpha, WHITE)
    width, height = cutout.width_px, cutout.height_px
    share = min(background.width_px / width, background.height_px / height)
    # Rounding may reach a little over the edge, which Pillow refuses.
    kept_width = min(width * share, background.width_px)
    kept_height = min(height * share, background.height_px)
    left, top = (background.width_px - kept_width) / 2, (background.height_px - kept_height) / 2
    scene = Image.fromarray(below).resize(
        (width, height),
        Image.Resampling.LANCZOS,
        box=(left, top, left + kept_width, top + kept_height),
        reducing_gap=3.0,
    )
    notes = [note(Code(one.code), f"Of the background: {one.text}") for one in background.notes]
    rgb = np.asarray(scene)
    if cutout.alpha is not None:
        rgb = laid_over(cutout.rgb, cutout.alpha, rgb)
    return Picture(rgb, None, (*cutout.notes, *notes))


def _with_shadow(rgb: Array, alpha: Array) -> tuple[Array, Array]:
    """Straight colours and alpha of a subject and of its shadow, soft and black, below it."""
    rows, columns = _subject(alpha)
    seen = alpha[rows, columns]
    if not seen.any():
        return rgb, alpha
    side_px = math.sqrt(seen.size)
    lower = np.zeros_like(alpha)
    down_px = min(round(_SHADOW_DOWN * side_px), len(alpha) - 1)
    lower[down_px:] = alpha[: len(alpha) - down_px]
    blur = ImageFilter.GaussianBlur(_SHADOW_BLUR * side_px)
    cast = np.asarray(Image.fromarray(lower).filter(blur))
    both, share = np.empty_like(alpha), np.empty_like(alpha)
    for part in strips(len(alpha)):
        own = alpha[part].astype(np.float32)
        joint = own + cast[part] * _SHADOW_OPACITY * (1 - own / 255)
        both[part] = joint.round()
        share[part] = (own * 255 / np.maximum(joint, 1)).clip(0, 255).round()
    return laid_over(rgb, share, BLACK), both


def _box(alpha: Array, request: BackgroundRequest) -> tuple[slice, slice]:
    return _subject(alpha) if request.crop == "subject" else _WHOLE


def _alpha(picture: Picture, mask: Array) -> Array:
    """The mask at the picture's size, no more opaque than the picture, and 0 where it is plain."""
    if _is_plain(picture):
        # Models trained on pictures of something find something in the middle of nothing.
        return np.zeros((picture.height_px, picture.width_px), np.uint8)
    alpha = scaled(mask, picture.width_px, picture.height_px)
    # Not their product: the model has seen the picture's alpha, which would count twice.
    return alpha if picture.alpha is None else np.minimum(alpha, picture.alpha)


def _is_plain(picture: Picture) -> bool:
    """Whether a picture is of one colour, as the model sees it."""
    step = max(picture.height_px // 64, picture.width_px // 64, 1)
    for every in (step, 1):  # Few pixels tell of nearly all pictures that they are not plain.
        seen = picture.rgb[::every, ::every]
        if picture.alpha is not None:
            seen = laid_over(seen, picture.alpha[::every, ::every], WHITE)
        if np.ptp(seen, axis=(0, 1)).max() > _PLAIN:
            return False
    return True


def _subject(alpha: Array) -> tuple[slice, slice]:
    """Rows and columns of the smallest rectangle around all that is visible; all, if nothing is."""
    visible = alpha >= _VISIBLE
    sides = [np.flatnonzero(visible.any(axis=axis)) for axis in (1, 0)]
    if not sides[0].size:
        return _WHOLE
    rows, columns = (slice(int(side[0]), int(side[-1]) + 1) for side in sides)
    return rows, columns
