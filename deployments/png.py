"""The chunks of a PNG: what the picture needs, and what can be left out when it is damaged.

Pillow refuses a file for a damaged or a large chunk of text. It gets a file without them.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from deployments.colour import Declared
from deployments.icc import Chromaticities
from deployments.notes import Code, Note, note, trailing_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_ANCILLARY: Final = 0x20
"""Bit 5 of a chunk name's first letter, which only critical chunks lack."""
_END: Final = b"\0\0\0\0IEND\xaeB`\x82"
_PIXELS: Final = frozenset({b"tRNS", b"acTL", b"fcTL", b"eXIf"})
"""Ancillary chunks that Pillow needs: transparency, frames, and which way is up."""
_TEXT: Final = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_KEYWORDS: Final = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"imagen\0")
"""Texts that may say which way is up; and ours."""
_MAX_TEXT_BYTES: Final = 2**19
_MAX_PROFILE_BYTES: Final = 2**24
_MAX_CHUNKS: Final = 50_000


class _Chunk(NamedTuple):
    name: bytes
    body: memoryview
    whole: memoryview
    is_sound: bool


@dataclass(slots=True)
class Chunks:
    """A PNG taken apart.

    Attributes:
        data: a PNG of the same picture that has nothing which Pillow stumbles over.
        depth: bits of a sample.
        colours: how it describes them.
        notes: of what was left out.
    """

    data: bytes = b""
    depth: int = 8
    colours: Declared = field(default_factory=Declared)
    notes: list[Note] = field(default_factory=list[Note])


def take_apart(data: bytes) -> Chunks:
    """What the picture needs of a PNG.

    Raises:
        ValueError: a critical chunk is damaged, or the pixels are cut off.
    """
    found, kept, seen = Chunks(), [memoryview(SIGNATURE)], set[bytes]()
    pixels, end, damaged = False, 0, list[bytes]()
    for chunk in _chunks(data):
        end += len(chunk.whole)
        if chunk.name == b"IEND":
            if rest := len(data) - len(SIGNATURE) - end:
                found.notes.append(trailing_bytes(rest))
            break
        pixels = pixels or chunk.name == b"IDAT"
        if not chunk.is_sound and not chunk.name[0] & _ANCILLARY:
            raise ValueError(f"the check sum of {chunk.name!r} is wrong")
        if not chunk.is_sound:
            damaged.append(chunk.name)
        elif _is_needed(chunk, seen, pixels=pixels):
            # An orientation behind the pixels counts too: readers of the header look before them.
            behind = pixels and (chunk.name in _TEXT or chunk.name == b"eXIf")
            kept.insert(2 if behind else len(kept), chunk.whole)
        elif not pixels and chunk.name not in seen:
            seen.add(chunk.name)
            _read(found, chunk)
    else:
        if not pixels:
            raise ValueError("the file ends before its pixels")
        told = "The file lacks its last chunk; every row was there."
        found.notes.append(note(Code.END_MISSING, told))
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        told = f"Damaged chunks were left out: {damaged[0].decode('latin-1')}{more}."
        found.notes.append(note(Code.CHUNK_DROPPED, told))
    found.depth = kept[1][16] if len(kept) > 1 and len(kept[1]) > 16 else 8  # of IHDR
    found.data = b"".join((*kept, _END))
    return found


def _chunks(data: bytes) -> Iterator[_Chunk]:
    """All whole chunks; one that is cut off raises if it holds pixels or comes before them."""
    view, at, count, pixels = memoryview(data), len(SIGNATURE), 0, False
    while at + 8 <= len(data):
        length, name = int.from_bytes(view[at : at + 4]), bytes(view[at + 4 : at + 8])
        pixels, count = pixels or name == b"IDAT", count + 1
        end = at + 12 + length
        if count > _MAX_CHUNKS:
            raise ValueError("too many chunks")
        if name == b"IEND":
            yield _Chunk(name, view[:0], view[at : min(at + 12, len(data))], True)
            return
        if end > len(data):
            if not pixels or name == b"IDAT":
                raise ValueError("the file is cut off")
            return
        sum_found = int.from_bytes(view[end - 4 : end])
        is_sound = zlib.crc32(view[at + 4 : end - 4]) == sum_found
        yield _Chunk(name, view[at + 8 : end - 4], view[at:end], is_sound)
        at = end


def _is_needed(chunk: _Chunk, seen: set[bytes], *, pixels: bool) -> bool:
    """Whether Pillow must see a sound chunk; of each text only the first, which goes to `seen`."""
    if not chunk.name[0] & _ANCILLARY:
        return True
    if chunk.name not in _TEXT:
        # The frames behind the first one are not read.
        return chunk.name in _PIXELS and not (pixels and chunk.name == b"fcTL")
    head = bytes(chunk.body[:32])
    keyword = next((word for word in _KEYWORDS if head.startswith(word)), None)
    if keyword is None or keyword in seen:
        return False
    seen.add(keyword)
    return _is_small(chunk, len(keyword))


def _is_small(chunk: _Chunk, keyword_bytes: int) -> bool:
    """Whether a text is within Pillow's limits once it is unpacked."""
    if chunk.name == b"iTXt" and bytes(chunk.body[keyword_bytes : keyword_bytes + 1]) != b"\0":
        return False  # compressed, which programs do not do with XMP
    if len(chunk.body) > _MAX_TEXT_BYTES:
        return False
    if chunk.name != b"zTXt":
        return True
    return _unpack(chunk.body[keyword_bytes + 1 :], _MAX_TEXT_BYTES) is not None


def _read(found: Chunks, chunk: _Chunk) -> None:
    """What a chunk says of the colours."""
    body, colours = bytes(chunk.body), found.colours
    match chunk.name:
        case b"iCCP":
            packed = body.partition(b"\0")[2]
            colours.profile = _unpack(packed[1:], _MAX_PROFILE_BYTES)
            if colours.profile is None:
                told = "The colour profile cannot be unpacked, and was ignored."
                found.notes.append(note(Code.PROFILE_IGNORED, told))
        case b"sRGB":
            colours.is_srgb = True
        case b"gAMA" if len(body) == 4:
            colours.gamma = int.from_bytes(body) / 100_000
        case b"cHRM" if len(body) == 32:
            pairs = [value / 100_000 for value in struct.unpack(">8I", body)]
            points = zip(pairs[::2], pairs[1::2], strict=True)
            colours.chromaticities = Chromaticities(*points)
        case b"cICP" if len(body) == 4:
            colours.code_points = body[0], body[1]
        case _:
            pass


def _unpack(packed: bytes | memoryview, most_bytes: int) -> bytes | None:
    """What zlib packed; None if that is broken, or larger."""
    unpacker = zlib.decompressobj()
    try:
        body = unpacker.decompress(packed, most_bytes)
    except zlib.error:
        return None
    return body if unpacker.eof else None
