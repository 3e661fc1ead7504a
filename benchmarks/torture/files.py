"""Files byte by byte: what public bug reports of picture services are about."""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageCms
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    from benchmarks.torture.arithmetic import Colour

SIDE_PX = 48
GREY: Colour = (55, 55, 55)
RED: Colour = (210, 60, 40)
END = b"\0\0\0\0IEND\xaeB`\x82"
_HEADER_BYTES = 33
"""Signature and IHDR of a PNG."""


def flat(colour: Colour = GREY, mode: str = "RGB") -> Image.Image:
    """A picture of one colour."""
    return Image.new("RGB", (SIDE_PX, SIDE_PX), colour).convert(mode)


def corners() -> Image.Image:
    """Red at the top left, green at the top right, blue below left, white below right."""
    image, half = flat((255, 255, 255)), SIDE_PX // 2
    image.paste((200, 30, 30), (0, 0, half, half))
    image.paste((30, 200, 30), (half, 0, SIDE_PX, half))
    image.paste((30, 30, 200), (0, half, half, SIDE_PX))
    return image


def noise() -> Image.Image:
    """Something that takes bytes."""
    pixels = np.random.default_rng(0).integers(60, 200, (SIDE_PX, SIDE_PX, 3), np.uint8)
    return Image.fromarray(pixels)


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The image as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# --- PNG ---


def chunk(name: bytes, body: bytes, *, is_sound: bool = True) -> bytes:
    """A chunk of a PNG, with a right or a wrong check sum."""
    checksum = zlib.crc32(name + body) ^ (0 if is_sound else 255)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def with_chunk(*chunks: bytes, image: Image.Image | None = None) -> bytes:
    """A PNG with chunks before its pixels."""
    png = file_of(image or flat())
    return png[:_HEADER_BYTES] + b"".join(chunks) + png[_HEADER_BYTES:]


def spoilt(png: bytes, name: bytes) -> bytes:
    """A PNG with a wrong check sum of a chunk that it has."""
    start = png.index(name) - 4
    end = start + 12 + int.from_bytes(png[start : start + 4])
    return png[: end - 1] + bytes([png[end - 1] ^ 255]) + png[end:]


def gamma(value: float) -> bytes:
    """The chunk gAMA."""
    return chunk(b"gAMA", struct.pack(">I", round(value * 100_000)))


def primaries(*pairs: tuple[float, float]) -> bytes:
    """The chunk cHRM: x and y of white, red, green and blue."""
    return chunk(b"cHRM", b"".join(struct.pack(">2I", *(round(v * 1e5) for v in p)) for p in pairs))


P3_CHUNK = primaries((0.3127, 0.329), (0.68, 0.32), (0.265, 0.69), (0.15, 0.06))


def code_points(colours: int, transfer: int) -> bytes:
    """The chunk cICP of full-range RGB."""
    return chunk(b"cICP", bytes([colours, transfer, 0, 1]))


def long_text(*, packed: bool) -> bytes:
    """A PNG with 1.3 MB of text, as node editors write it."""
    text = PngInfo()
    text.add_text("workflow", "a b c d " * 160_000, zip=packed)
    return file_of(flat(), pnginfo=text)


def sixteen_bits(colour: Colour) -> bytes:
    """A PNG of 16 bits a channel."""
    header = struct.pack(">IIBBBBB", SIDE_PX, SIDE_PX, 16, 2, 0, 0, 0)
    row = b"\0" + b"".join(struct.pack(">H", level * 257) for level in colour) * SIDE_PX
    data = chunk(b"IDAT", zlib.compress(row * SIDE_PX))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + END


# --- Colour profiles ---


def srgb_profile() -> bytes:
    """As Little CMS makes it."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def p3_profile(padding_bytes: int = 0) -> bytes:
    """Display P3 with a gamma of 2.2, and any number of bytes behind it."""
    columns = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
        b"wtpt": (0.96420, 1.00000, 0.82491),
    }
    tags = {
        name: b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)
        for name, values in columns.items()
    }
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(2.2 * 256), 0)
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(80)
    tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve, b"desc": text}
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    body += bytes(padding_bytes)
    kind = (b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    head = struct.pack(">I4sI4s4s4s12x4s", start + len(body), *kind).ljust(68, b"\0")
    head = (head + struct.pack(">iii", 63190, 65536, 54061)).ljust(128, b"\0")
    return head + struct.pack(">I", len(tags)) + table + body


# --- JPEG ---


def turned(orientation: int, kind: str = "JPEG") -> bytes:
    """`corners`, stored so that it is upright once it is turned as its EXIF says."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = corners()
    if orientation in undo:
        image = image.transpose(undo[orientation])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return file_of(image, kind, quality=95, exif=exif)


def adobe_rgb_by_exif() -> bytes:
    """A JPEG whose camera says Adobe RGB in the interoperability index alone (DCF 2.0)."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "a camera"
    inner = exif.get_ifd(ExifTags.IFD.Exif)
    inner[ExifTags.Base.ColorSpace] = 0xFFFF
    inner[ExifTags.IFD.Interop] = {ExifTags.Interop.InteropIndex: "R03"}
    return file_of(flat(RED), "JPEG", quality=98, subsampling=0, exif=exif)


def ultra_hdr() -> bytes:
    """A JPEG with a gain map behind it."""
    xmp = b'<x:xmpmeta xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/" hdrgm:Version="1.0"/>'
    first = file_of(flat(RED), "JPEG", quality=98, subsampling=0, xmp=xmp)
    return first + file_of(flat((128, 128, 128), "L"), "JPEG")


def without_last_scan() -> bytes:
    """A progressive JPEG that ends before its last scan."""
    data = file_of(noise(), "JPEG", quality=90, progressive=True)
    return data[: data.rindex(b"\xff\xda")]
