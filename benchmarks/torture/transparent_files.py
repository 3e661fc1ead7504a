"""Transparent files of many kinds. What Pillow does not write is written by the book."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image

from benchmarks.torture.files import END, chunk, file_of
from benchmarks.torture.scenes import GREEN, MAGENTA, Colour, disc, square

if TYPE_CHECKING:
    from benchmarks.torture.scenes import Alpha, Pixels

_GREY: Colour = (120, 120, 120)


def _file(picture: Pixels | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    return file_of(image, kind, **options)


def filled(colour: Colour, alpha: Alpha, hidden: Colour | None = None) -> Pixels:
    """`H x W x 4` of one colour, and perhaps of another where nobody can see it."""
    rgb = np.full((*alpha.shape, 3), colour, np.uint8)
    if hidden is not None:
        rgb[alpha == 0] = hidden
    return np.dstack([rgb, alpha])


def soft_disc(hidden: Colour | None = None, kind: str = "PNG", **options: Any) -> bytes:
    """A green disc with a soft edge, and perhaps another colour where it is clear."""
    return _file(filled(GREEN, disc(), hidden), kind, **options)


def hard_square() -> bytes:
    """A green square with a hard edge."""
    return _file(filled(GREEN, square()))


def erased_stripes() -> bytes:
    """Black and white stripes that somebody erased: they are still in the file, below alpha 0."""
    rgba = filled(GREEN, square(), (255, 255, 255))
    rgba[:, ::4, :3] = np.where(rgba[:, ::4, 3:] == 0, 0, rgba[:, ::4, :3])
    return _file(rgba)


def invisible(width_px: int = 40, height_px: int = 24) -> bytes:
    """Nothing can be seen; the file keeps magenta there."""
    return _file(filled(MAGENTA, np.zeros((height_px, width_px), np.uint8)))


def opaque() -> bytes:
    """An alpha channel of 255 throughout."""
    return _file(filled(GREEN, np.full((40, 64), 255, np.uint8)))


def grey_png() -> bytes:
    """Grey and alpha, two channels."""
    rgba = filled(_GREY, disc())
    return _file(Image.fromarray(rgba).convert("LA"))


def palette_square(kind: str) -> bytes:
    """A palette whose first colour, magenta, is declared clear."""
    image = Image.fromarray((square() // 255).astype(np.uint8), "L").convert("P")
    image.putdata((square() // 255).ravel().tolist())
    image.putpalette([*MAGENTA, *GREEN])
    return _file(image, kind, transparency=0)


def keyed_square() -> bytes:
    """A PNG without alpha that declares magenta clear (tRNS)."""
    return _file(filled(GREEN, square(), MAGENTA)[..., :3], transparency=MAGENTA)


def half_disc_turned() -> bytes:
    """Half a disc, stored lying on its side (EXIF orientation 6)."""
    rgba = filled(GREEN, half_disc())
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return _file(np.ascontiguousarray(np.rot90(rgba)), exif=exif.tobytes())


def half_disc() -> Alpha:
    """Alpha of the lower half of a disc."""
    alpha = disc()
    alpha[:32] = 0
    return alpha


def deep_png() -> bytes:
    """16 bits a channel, which Pillow does not write."""
    deep = filled(GREEN, disc()).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    head = struct.pack(">IIBBBBB", 64, 64, 16, 6, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + parts + END


def premultiplied_tiff() -> bytes:
    """ExtraSamples is 1: colours are stored multiplied by alpha (TIFF 6.0, page 77)."""
    rgba = filled(GREEN, disc())
    rgba[..., :3] = np.rint(rgba[..., :3] * (rgba[..., 3:] / 255))
    data = rgba.tobytes()
    short, long, after = 3, 4, 8 + 2 + 11 * 12 + 4
    tags = (
        (256, short, 1, 64), (257, short, 1, 64), (258, short, 4, after), (259, short, 1, 1),
        (262, short, 1, 2), (273, long, 1, after + 8), (277, short, 1, 4), (278, short, 1, 64),
        (279, long, 1, len(data)), (284, short, 1, 1), (338, short, 1, 1),
    )  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<4H", 8, 8, 8, 8) + data
