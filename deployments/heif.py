"""What the boxes of a HEIC or AVIF file (ISO/IEC 23008-12) say beside the picture."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from deployments.colour import Declared
from deployments.notes import Code, Note, gain_map_dropped, note, trailing_bytes

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

_NCLX: Final = re.compile(rb"colrnclx(.{4})", re.DOTALL)
_AV1: Final = re.compile(rb"av1C\x81.(.)", re.DOTALL)
_TONE_MAP: Final = re.compile(rb"infe.{8}tmap", re.DOTALL)
"""An item that applies a gain map (ISO 21496-1)."""
_PICTURES: Final = frozenset({b"meta", b"mdat", b"moov"})
"""Boxes without which a picture is not whole."""
_MAX_BOXES: Final = 10_000
_APPLE_GAIN_MAP: Final = "urn:com:apple:photo:2020:aux:hdrgainmap"


def end(data: bytes) -> int:
    """Where the last box ends.

    Raises:
        ValueError: the file is cut off. libheif would leave the missing tiles black.
    """
    at = 0
    for _ in range(_MAX_BOXES):
        if at + 8 > len(data):
            break
        length, name = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        if length == 1:
            length = int.from_bytes(data[at + 8 : at + 16])
        if length == 0:
            return len(data)
        if length < 8 or at + length > len(data):
            if name in _PICTURES:
                raise ValueError("a box is cut off")
            break
        at += length
    return at


def declared(image: ImageFile, data: bytes) -> Declared:
    """How the file describes its colours. HDR goes before a profile, and a profile before SDR."""
    found = Declared(profile=image.info.get("icc_profile"))
    stated = [(int.from_bytes(each[:2]), int.from_bytes(each[2:])) for each in _NCLX.findall(data)]
    if _TONE_MAP.search(data):
        # HDR is what the gain map would make of the picture, not the picture itself.
        stated = [points for points in stated if not Declared(points).is_hdr]
    if stated and (Declared(stated[0]).is_hdr or not found.profile):
        found.code_points = stated[0]
    return found


def depth(image: ImageFile, data: bytes) -> int:
    """Bits of a sample."""
    if match := _AV1.search(data):
        flags = match[1][0]
        return 8 + 2 * bool(flags & 0x40) + 2 * bool(flags & 0x20)
    found: object = image.info.get("bit_depth")
    return found if isinstance(found, int) else 8


def notes_of(image: ImageFile, data: bytes) -> tuple[Note, ...]:
    """What is left out: a gain map, or pictures that belong to this one."""
    found: object = image.info.get("aux")
    kinds = [str(kind) for kind in found] if isinstance(found, dict) else []
    rest = len(data) - end(data)
    behind = (trailing_bytes(rest),) if rest else ()
    if _APPLE_GAIN_MAP in kinds or _TONE_MAP.search(data):
        return (gain_map_dropped(), *behind)
    if kinds:
        told = "The file holds pictures that belong to this one, such as masks; they were left out."
        return (note(Code.AUXILIARY_DROPPED, told), *behind)
    return behind
