"""Any picture Pillow can load, as 8-bit sRGB and alpha."""

from __future__ import annotations

import io
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

_MODES: Final = {b"GRAY": "L", b"RGB ": "RGB", b"CMYK": "CMYK", b"Lab ": "LAB"}
"""Pillow's mode for the colour space that bytes 16 to 20 of an ICC profile name."""

_SRGB_NAMES: Final = {"sRGB", "sRGB built-in", "sRGB IEC61966-2.1"}

_untyped: Any = ImageCms
"""For `createProfile`, whose result Pillow leaves without a type."""


def to_srgb(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours as a screen shows them, and the transparency.

    Args:
        image: loaded, of any mode.

    Returns:
        An `RGB` image in sRGB, laid over white where transparent, as models expect a cut-out; and
        an `L` image of its alpha, or None where all of it is opaque.
    """
    profile: bytes | None = image.info.get("icc_profile")
    colours, alpha = _split(_eight_bits(image))
    rgb = _without_profile(colours, profile)
    if alpha is None or alpha.getextrema() == (255, 255):
        return rgb, None
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=alpha)
    return white, alpha


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours in a mode that a profile can describe, and alpha, which none describes."""
    if image.has_transparency_data:
        grey = image.mode in {"1", "L", "LA", "La"}
        image = image.convert("LA" if grey else "RGBA")
        return image.convert("L" if grey else "RGB"), image.getchannel("A")
    if image.mode == "1":
        return image.convert("L"), None
    return image if image.mode in _MODES.values() else image.convert("RGB"), None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits scaled to 8; Pillow's own conversion would clip it to white."""
    if image.mode == "F":
        return Image.fromarray(_from_float(np.asarray(image, dtype=np.float32)))
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    # Mode I is how 16-bit files arrive from formats that allow signed or 32-bit samples.
    levels = np.asarray(image, dtype=np.int64)
    grey = Image.fromarray((levels.clip(0, 65535) >> 8).astype(np.uint8))
    clear: object = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    return grey


def _from_float(levels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Float grey, in 0-1 or 0-255 or brighter; NaN is black and infinity the brightest."""
    finite = levels[np.isfinite(levels)]
    peak = float(finite.max()) if finite.size else 0.0
    scale = 255.0 if peak <= 1 else min(1.0, 255.0 / peak)
    known = np.nan_to_num(levels, nan=0.0, posinf=peak, neginf=0.0)
    return np.rint((known * scale).clip(0, 255)).astype(np.uint8)


def _without_profile(image: Image.Image, data: bytes | None) -> Image.Image:
    """`image` in sRGB. A profile that is broken, or made for other colours, is ignored."""
    if not data:
        return image.convert("RGB")
    mode = _MODES.get(data[16:20])
    # Cameras and scanners often give grey pictures the profile of their colour ones.
    source = image.convert("RGB") if (image.mode, mode) == ("L", "RGB") else image
    if mode != source.mode:
        return image.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        if ImageCms.getProfileDescription(profile).strip() in _SRGB_NAMES:
            return source.convert("RGB")
        srgb = ImageCms.ImageCmsProfile(_untyped.createProfile("sRGB"))
        return ImageCms.ImageCmsTransform(profile, srgb, source.mode, "RGB").apply(source)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image.convert("RGB")
