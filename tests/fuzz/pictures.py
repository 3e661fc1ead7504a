"""Picture files of every format, and ways to damage them."""

from __future__ import annotations

import io
import zlib
from typing import TYPE_CHECKING

from hypothesis import strategies as st
from PIL import Image

from benchmarks.torture import heic

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_PNG = b"\x89PNG\r\n\x1a\n"
_EXTREMES = (
    *(b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\xff\xff"),
    *(b"\xff\xff\0\0", b"\0\x01\0\0", b"\0\0\x01\0", b"\xff\x7f", b"\0", b"\xff", b"\x01"),
)


def _file(
    kind: str, mode: str = "RGB", size: tuple[int, int] = (24, 16), **options: object
) -> bytes:
    file = io.BytesIO()
    noise = Image.effect_noise(size, 60)
    more = {"append_images": [noise.convert(mode)]} if options.get("save_all") else {}
    noise.convert(mode).save(file, kind, **options, **more)
    return file.getvalue()


def _blank(side_px: int) -> bytes:
    """A PNG of few bytes and many pixels."""
    row = bytes(1 + -(-side_px // 8))
    head = side_px.to_bytes(4) * 2 + b"\x01\0\0\0\0"
    data = zlib.compress(row * side_px)
    return _PNG + _chunk(b"IHDR", head) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def _text_chunks(count: int) -> bytes:
    """A PNG of so many chunks before its picture."""
    png = _file("PNG")
    return png[:33] + _chunk(b"tEXt", b"a\0b") * count + png[33:]


def _chunk(name: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(name + data).to_bytes(4)
    return len(data).to_bytes(4) + name + data + crc


WHOLE = (
    *(_file(kind) for kind in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")),
    *(_file("PNG", mode) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")),
    *(_file("JPEG", mode) for mode in ("L", "CMYK")),
    *(_file("TIFF", mode) for mode in ("1", "CMYK", "F", "LAB")),
    *(_file("TIFF", compression=name) for name in ("tiff_lzw", "jpeg", "tiff_adobe_deflate")),
    *(_file(kind, save_all=True) for kind in ("PNG", "GIF", "WEBP", "TIFF")),
    *(_file(kind, exif=_turned()) for kind in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF")),
    _file("JPEG", progressive=True),
    _file("WEBP", "RGBA", lossless=True),
    _file("BMP", "P"),
    _file("PNG", size=(1, 1)),
    _file("PNG", "1", size=(20_000, 1)),
    _text_chunks(3),
    heic.COLOUR,
    heic.GREY_10_BIT,
)
ODD = (
    *(b"", b"GIF89a", b"\xff\xd8\xff", _PNG, b"BM", b"II*\0", b"RIFF\0\0\0\0WEBP"),
    b"\0\0\0\x18ftypheic\0\0\0\0heicmif1",
    b"<svg xmlns='http://www.w3.org/2000/svg' width='99999' height='99999'/>",
    b"%PDF-1.7",
    _text_chunks(3000),
    *(_blank(side_px) for side_px in (40_000, 2_000)),  # a bomb, and 4 MP, which are allowed
)


def mended(data: bytes) -> bytes:
    """A PNG with the check sums that its chunks should have, so that readers look inside."""
    if not data.startswith(_PNG):
        return data
    found, at = bytearray(_PNG), len(_PNG)
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4])
        if at + 12 + length > len(data):
            break
        found += _chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length])
        at += 12 + length
    return bytes(found) + data[at:]


@st.composite
def _damaged(draw: st.DrawFn) -> bytes:
    data = draw(st.sampled_from(WHOLE))
    for _ in range(draw(st.integers(1, 4))):
        # Headers are the interesting part.
        most = draw(st.sampled_from((12, 64, 256, len(data))))
        a, b = sorted(draw(st.tuples(*[st.integers(0, min(most, len(data)))] * 2)))
        match draw(st.integers(0, 5)):
            case 0 | 1:
                new = draw(st.sampled_from(_EXTREMES))
                data = data[:a] + new + data[a + len(new) :]
            case 2:
                data = data[:b]
            case 3:
                data = data[:a] + data[b:]
            case 4:
                data = data[:b] + data[a:]
            case _:
                data = data[:a] + draw(st.binary(max_size=8)) + data[b:]
    return mended(data) if draw(st.booleans()) else data


def pictures() -> SearchStrategy[bytes]:
    """Mostly damaged ones."""
    return st.one_of(_damaged(), _damaged(), st.sampled_from(WHOLE), st.sampled_from(ODD))
