"""Any picture Pillow can load, as 8-bit sRGB and alpha."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from deployments import icc
from deployments.notes import Code, Note, note

_MODES: Final = {b"GRAY": "L", b"RGB ": "RGB", b"CMYK": "CMYK", b"Lab ": "LAB"}
"""Pillow's mode for the colour space that bytes 16 to 20 of an ICC profile name."""

_STRIP_ROWS: Final = 256
_SRGB_NAMES: Final = {"sRGB", "sRGB built-in", "sRGB IEC61966-2.1"}

_untyped: Any = ImageCms
"""For `createProfile`, whose result Pillow leaves without a type."""


@dataclass(slots=True)
class Declared:
    """How a file describes its colours. What comes first goes before what comes later.

    Attributes:
        code_points: primaries and transfer of ITU-T H.273, as in cICP and nclx.
        profile: of ICC.
        is_srgb: whether it says that they are sRGB.
        gamma: exponent from light to values, as in a PNG's gAMA.
        chromaticities: of white and the primaries.
    """

    code_points: tuple[int, int] | None = None
    profile: bytes | None = None
    is_srgb: bool = False
    gamma: float | None = None
    chromaticities: icc.Chromaticities | None = None

    @property
    def is_hdr(self) -> bool:
        return self.code_points is not None and self.code_points[1] in (icc.PQ, icc.HLG)


def to_srgb(
    image: Image.Image, declared: Declared
) -> tuple[Image.Image, Image.Image | None, list[Note]]:
    """Colours as a screen shows them, and the transparency.

    Args:
        image: loaded, of any mode.
        declared: how the file describes its colours.

    Returns:
        An `RGB` image in sRGB, of straight colours: alpha is not in them, and clear pixels keep
        whatever the file has there; an `L` image of its alpha, or None where all of it is opaque;
        and what was lost or converted.
    """
    colours, alpha = _split(_eight_bits(image))
    rgb, notes = _converted(colours, declared)
    opaque = alpha is None or alpha.getextrema() == (255, 255)
    return rgb, None if opaque else alpha, notes


def is_grey(rgb: NDArray[np.uint8]) -> bool:
    """Whether all pixels of `H x W x 3` have three equal channels, or there is only one."""
    if rgb.ndim == 2:
        return True
    return all(
        bool((part[..., :1] == part[..., 1:]).all())
        for part in (rgb[top : top + _STRIP_ROWS] for top in range(0, len(rgb), _STRIP_ROWS))
    )


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


def _converted(image: Image.Image, declared: Declared) -> tuple[Image.Image, list[Note]]:
    """`image` in sRGB. A profile that is broken, or made for other colours, is ignored."""
    if declared.profile and not declared.code_points:
        return _by_profile(image, declared.profile)
    data, notes = _described(declared)
    if data is not None:
        return _apply(image.convert("RGB"), ImageCms.ImageCmsProfile(io.BytesIO(data))), notes
    if image.mode == "CMYK":
        told = "The inks (CMYK) have no colour profile, and were converted by a simple formula."
        notes.append(note(Code.PROFILE_MISSING, told))
    return image.convert("RGB"), notes


def _described(declared: Declared) -> tuple[bytes | None, list[Note]]:
    """A profile of colours that are described by numbers; None for sRGB."""
    try:
        if declared.code_points is not None:
            return _by_code_points(declared)
        if declared.is_srgb or _is_nearly_srgb(declared):
            return None, []
        gamma = declared.gamma
        curve = icc.transfer(icc.SRGB) if gamma is None else icc.power(1 / gamma)
        data = icc.profile(declared.chromaticities or icc.BT709, curve)
        told = "The colours were converted to sRGB by the gamma and primaries that the file states."
        return data, [note(Code.PROFILE_CONVERTED, told)]
    except (ValueError, ZeroDivisionError, OverflowError):
        told = "The gamma or primaries that the file states are no colours, and were ignored."
        return None, [note(Code.PROFILE_IGNORED, told)]


def _by_code_points(declared: Declared) -> tuple[bytes | None, list[Note]]:
    primaries, transfer = declared.code_points or (0, 0)
    colours = icc.PRIMARIES.get(primaries, icc.BT709)
    if colours is icc.BT709 and transfer not in icc.UNLIKE_SRGB:
        return None, []
    data = icc.profile(colours, icc.transfer(transfer))
    if not declared.is_hdr:
        told = f"The colours (H.273 primaries {primaries}, transfer {transfer}) became sRGB."
        return data, [note(Code.PROFILE_CONVERTED, told)]
    name = "PQ" if transfer == icc.PQ else "HLG"
    told = (
        f"The picture is HDR ({name}) and was tone-mapped to sRGB: diffuse white is "
        f"{icc.WHITE_NITS:.0f} cd/m2, and light up to {icc.PEAK_NITS:.0f} cd/m2 was compressed."
    )
    return data, [note(Code.HDR_TONE_MAPPED, told)]


def _is_nearly_srgb(declared: Declared) -> bool:
    """Whether gamma and primaries are absent, or those that programs write for sRGB.

    They write a gamma of 1 / 2.2, which only comes near its curve.
    """
    gamma, points = declared.gamma, declared.chromaticities
    return (gamma is None or abs(gamma - 1 / 2.2) < 0.005) and (
        points is None or bool(np.allclose(points, icc.BT709, atol=0.002))
    )


def _by_profile(image: Image.Image, data: bytes) -> tuple[Image.Image, list[Note]]:
    mode = _MODES.get(data[16:20])
    # Cameras and scanners often give grey pictures the profile of their colour ones.
    source = image.convert("RGB") if (image.mode, mode) == ("L", "RGB") else image
    try:
        if mode != source.mode:
            raise ValueError("the profile is made for other colours")
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc.without_elements(data)))
        name = ImageCms.getProfileDescription(profile).strip()
        if name in _SRGB_NAMES:
            return source.convert("RGB"), []
        rgb = _apply(source, profile)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        told = "The colour profile is damaged or made for other colours, and was ignored."
        return image.convert("RGB"), [note(Code.PROFILE_IGNORED, told)]
    told = f'The colours were converted from "{name[:80]}" to sRGB.'
    return rgb, [note(Code.PROFILE_CONVERTED, told)]


def _apply(source: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    srgb = ImageCms.ImageCmsProfile(_untyped.createProfile("sRGB"))
    rgb = ImageCms.ImageCmsTransform(profile, srgb, source.mode, "RGB").apply(source)
    if source.mode in ("L", "RGB") and is_grey(np.asarray(source)):
        # Little CMS rounds each channel by itself, and would tint grey by a level.
        green = rgb.getchannel("G")
        return Image.merge("RGB", (green, green, green))
    return rgb
