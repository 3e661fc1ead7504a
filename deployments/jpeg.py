"""The markers of a JPEG (ITU-T T.81): where the picture ends, and whether all of it is there."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from deployments.notes import Code, Note, gain_map_dropped, note, trailing_bytes

EOI: Final = b"\xff\xd9"
_SOS: Final = 0xDA
_SOF: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ALONE: Final = frozenset({0x01, *range(0xD0, 0xD8)})
"""Markers without a length."""
_NEXT: Final = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)
"""A marker within coded data: neither a stuffed byte nor a restart."""
_PROBES: Final = (b"\x55\xaa\x33\xcc" * 256, b"\xa5\x5b\x3c\x0e" * 256)
"""Coded data that would change the picture, were any of it read."""
_LAST_COEFFICIENT: Final = 63
_MAX_MARKERS: Final = 20_000
_MAX_SCANS: Final = 200
"""Encoders write ten or so; each takes the decoder a walk over the whole picture."""
_GAIN_MAPS: Final = (b"http://ns.adobe.com/hdr-gain-map/", b"urn:iso:std:iso:ts:21496:-1")
_APPLE_GAIN_MAP: Final = b"HDRGainMap"


@dataclass(slots=True)
class Markers:
    """What stands between the coded data of a JPEG.

    Attributes:
        end: where the picture ends, behind EOI; None if there is none.
        has_more: whether it says that further pictures follow (CIPA DC-007, MPF).
        is_complete: whether there is a scan for every coefficient of every component.
    """

    end: int | None = None
    has_more: bool = False
    is_complete: bool = False


@dataclass(slots=True)
class _Scans:
    """Coefficients that scans have brought to their last bit, by component."""

    components: list[int] = field(default_factory=list[int])
    done: dict[int, set[int]] = field(default_factory=dict[int, set[int]])
    count: int = 0

    def frame(self, body: bytes) -> None:
        self.components = list(body[6 : 6 + 3 * body[5] : 3])
        self.done = {one: set() for one in self.components}

    def scan(self, body: bytes) -> None:
        count = body[0]
        first, last, bits = body[1 + 2 * count : 4 + 2 * count]
        if bits & 15 == 0:
            for one in body[1 : 1 + 2 * count : 2]:
                self.done[one].update(range(first, last + 1))

    @property
    def are_complete(self) -> bool:
        wanted = set(range(_LAST_COEFFICIENT + 1))
        return bool(self.done) and all(one >= wanted for one in self.done.values())


def markers(data: bytes) -> Markers:
    """The markers of a file that Pillow could open.

    Raises:
        IndexError, KeyError, ValueError: they contradict each other.
    """
    found, scans, at, count = Markers(), _Scans(), 2, 0
    while match := _NEXT.search(data, at):
        marker, at, count = match[1][0], match.end(), count + 1
        if count > _MAX_MARKERS:
            raise ValueError("too many markers")
        if marker == EOI[1]:
            found.end = at
            break
        if marker in _ALONE:
            continue
        length = int.from_bytes(data[at : at + 2])
        body = data[at + 2 : at + length]
        if marker in _SOF:
            scans.frame(body)
        elif marker == _SOS:
            scans.scan(body)
            scans.count += 1
            if scans.count > _MAX_SCANS:
                raise ValueError("too many scans")
        elif marker == 0xE2 and body.startswith(b"MPF\0"):
            found.has_more = True
        at += max(length, 2)
    found.is_complete = scans.are_complete
    return found


def ended(data: bytes) -> tuple[bytes, tuple[bytes, ...]]:
    """A JPEG that lacks its end, with one; and two with more coded data before it.

    If every row was there, no decoder reads the additional data, so that all three give the same
    pixels. If a row was missing, they differ, because decoders take for its pixels what they find.

    Raises:
        ValueError: it has an end, or lacks scans.
        IndexError, KeyError: its markers contradict each other.
    """
    found = markers(data)
    if found.end is not None or not found.is_complete:
        raise ValueError("the picture is cut off")
    # A download that failed may be filled up with zeros, which decoders would take for pixels.
    if data.endswith(b"\0\0"):
        raise ValueError("the picture ends in zeros")
    body = data.rstrip(b"\xff")
    return body + EOI, tuple(body + probe + EOI for probe in _PROBES)


def notes_of(data: bytes) -> tuple[Note, ...]:
    """What is left out of a sound file: what lies behind the picture, such as a gain map."""
    found = markers(data)
    rest = 0 if found.end is None else len(data) - found.end
    if any(name in data for name in _GAIN_MAPS) or (_APPLE_GAIN_MAP in data and rest):
        return (gain_map_dropped(),)
    if not rest:
        return ()
    if found.has_more:
        told = "The file holds further pictures behind the first one; they were left out."
        return (note(Code.AUXILIARY_DROPPED, told),)
    return (trailing_bytes(rest),)
