"""Image files to pixels, and pixels to image files."""

from __future__ import annotations

import io
import json
import re
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
from numpy.typing import NDArray
from pi_heif import HeifImageFile
from pi_heif import options as heif_options
from PIL import AvifImagePlugin as Avif
from PIL import BmpImagePlugin as Bmp
from PIL import ExifTags, Image
from PIL import GifImagePlugin as Gif
from PIL import JpegImagePlugin as Jpeg
from PIL import PngImagePlugin as Png
from PIL import TiffImagePlugin as Tiff
from PIL import WebPImagePlugin as WebP

from deployments import colour, heif, jpeg, png, provenance, transparency
from deployments.colour import Declared
from deployments.errors import (
    DamagedImage,
    InvalidParameter,
    MalformedRequest,
    TooLarge,
    UnsupportedMedia,
    plain,
)
from deployments.icc import Chromaticities
from deployments.notes import Code, Note, note, trailing_bytes
from deployments.settings import LimitSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from PIL.ImageFile import ImageFile

    from deployments.contract import OutputFormat
    from deployments.provenance import SourceType

Array = NDArray[np.uint8]
"""`H x W x 3` sRGB, or `H x W` grey; uint8."""

# Pillow warns about odd uploads. Set once for the process, because `warnings.catch_warnings` is not
# thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Pillow's readers are called directly: `Image.open` imports forty more, and refuses a large picture
# before it tells the size. An MPO is a JPEG followed by others; the JPEG reader gives the first.
_READERS: Final[dict[str, tuple[bytes, Callable[[io.BytesIO], ImageFile]]]] = {
    "JPEG": (rb"\xff\xd8\xff", Jpeg.JpegImageFile),
    "PNG": (rb"\x89PNG\r\n\x1a\n", Png.PngImageFile),
    "WEBP": (rb"RIFF....WEBP", WebP.WebPImageFile),
    "AVIF": (rb"....ftyp(....)*?avi[fs]", Avif.AvifImageFile),
    "TIFF": (rb"II[*+]\0|MM\0[*+]", Tiff.TiffImageFile),
    "BMP": (rb"BM.{13}\0\0\0", Bmp.BmpImageFile),
    "GIF": (rb"GIF8[79]a", Gif.GifImageFile),
    "HEIC": (rb"....ftyp(....)*?(hei[cxms]|hev[cxms]|mif1|msf1)", HeifImageFile),
}
# Nothing reads the additional pictures of a HEIC.
heif_options.THUMBNAILS = heif_options.DEPTH_IMAGES = False
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAX_SEGMENTS: Final = 2000
_SHOWN: Final = 40
"""Characters of the beginning of a file that an error shows."""
_NAME: Final = re.compile(rb"[ -~]{1,250}\.[A-Za-z]{1,5}")
"""A file's name or path, where the file itself should be."""
_STRIP_ROWS: Final = 256
_ADOBE_RGB: Final = Declared(
    gamma=256 / 563,
    chromaticities=Chromaticities((0.3127, 0.329), (0.64, 0.33), (0.21, 0.71), (0.15, 0.06)),
)
_ADOBE_RGB_MARK: Final = "R03"
"""Of the interoperability index by which cameras say so (DCF 2.0)."""
_MAX_SIDE_PX: Final[Mapping[str, int]] = {"webp": 16383, "jpeg": 65500}
_BITS_PER_SAMPLE: Final = 258
_ASCII: Final = b"ASCII\0\0\0"


CHECKED: Final = LimitSettings(max_body_bytes=2**30, max_input_px=2**30)
"""For what needs no check: results of ours, and uploads that the Ingress has checked."""

_QUALITY = {"jpeg": 92, "webp": 90}
"""Where a request names none."""
_THUMBNAIL_PX = 192


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says about its picture.

    Attributes:
        format: as in `JPEG`. An MPO is a JPEG.
        width_px, height_px: after turning the picture as its EXIF says.
        frames: of an animation, or pages. For a TIFF, 2 stands for several.
    """

    format: str
    width_px: int
    height_px: int
    frames: int


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A decoded picture.

    Attributes:
        rgb: `H x W x 3`, uint8, sRGB; or `H x W` grey. Colours are straight: alpha is not in them.
            Where a decoded picture is clear, the colours around go on.
        alpha: `H x W`, uint8, 255 is opaque; None if all of it is opaque.
        notes: what was lost or chosen on the way from the file.
    """

    rgb: Array
    alpha: Array | None
    notes: tuple[Note, ...] = ()

    @property
    def width_px(self) -> int:
        return self.rgb.shape[1]

    @property
    def height_px(self) -> int:
        return self.rgb.shape[0]

    @property
    def is_grey(self) -> bool:
        """Whether the channels of every pixel are equal."""
        return colour.is_grey(self.rgb)


def read_header(data: bytes, limits: LimitSettings) -> Header:
    """What a file says about its picture, without decoding it.

    Raises:
        MalformedRequest: there are no bytes.
        UnsupportedMedia: it is not an image, or of a format that is not read.
        TooLarge: it has too many bytes or pixels.
        DamagedImage: its header is cut off or contradicts itself.
    """
    image, kind, _ = _open(data, limits)
    with _reading(kind, data):
        width, height = image.size
        # Not `image.getexif()`: a PNG would decode all its pixels to look behind them.
        turned = _orientation(partial(Image.Image.getexif, image)) >= 5
        if turned and not _is_size_turned(image):
            width, height = height, width
        return Header(kind, width, height, _frames(image, kind))


def decode(data: bytes, limits: LimitSettings, *, levels: bool = False) -> Picture:
    """The picture in a file: its first frame, upright, in sRGB.

    Args:
        data: the file.
        limits: of bytes and pixels.
        levels: whether the file's numbers count and not its colours, as in a mask.

    Raises:
        MalformedRequest, UnsupportedMedia, TooLarge: as from `read_header`.
        DamagedImage: the file is cut off, or cannot be decoded.
    """
    image, kind, chunks = _open(data, limits)
    with _reading(kind, data):
        notes = [*_frame_notes(image, kind), *chunks.notes]
        image, end_notes = _loaded(image, kind, data)
        notes += [*end_notes, *_rest_notes(image, kind, data)]
        if _depth(image, kind, data, chunks) > 8:
            told = "The samples have more than 8 bits, and were reduced to 8."
            notes.append(note(Code.DEPTH_REDUCED, told))
        turn = _UPRIGHT.get(_orientation(image.getexif))
        declared = Declared() if levels else _declared(image, kind, data, chunks)
        rgb, alpha, found = colour.to_srgb(image, declared)
        if turn is not None:
            rgb, alpha = rgb.transpose(turn), alpha.transpose(turn) if alpha else None
    # np.array copies. Pillow's own memory is read-only, which makes torch warn.
    notes += found
    if alpha is None:
        return Picture(np.array(rgb), None, tuple(notes))
    cover = np.array(alpha)
    return Picture(transparency.extended(np.asarray(rgb), cover), cover, tuple(notes))


def _frame_notes(image: ImageFile, kind: str) -> list[Note]:
    frames = _frames(image, kind)
    if frames < 2:
        return []
    many = "several" if kind == "TIFF" else frames
    which = "primary" if kind == "HEIC" else "first"
    return [note(Code.FRAMES_DROPPED, f"The {which} of {many} frames was used.")]


def _loaded(image: ImageFile, kind: str, data: bytes) -> tuple[ImageFile, list[Note]]:
    """The decoded image. A JPEG that lacks only its end is one, too.

    Raises:
        Exception: whatever Pillow raises on a file that is damaged.
    """
    if kind != "JPEG" or jpeg.markers(data).end is not None:
        image.load()
        return image, []
    whole, probes = jpeg.ended(data)
    image = Jpeg.JpegImageFile(io.BytesIO(whole))
    image.load()
    if not all(_is_same(image, Jpeg.JpegImageFile(io.BytesIO(probe))) for probe in probes):
        raise OSError("rows are missing")
    told = "The JPEG lacks its end marker; every row was there."
    return image, [note(Code.END_MISSING, told)]


def _is_same(one: ImageFile, other: ImageFile) -> bool:
    """Whether two images have the same pixels. Compared in strips, which take little memory."""
    other.load()
    width, height = one.size
    tops = range(0, height, _STRIP_ROWS)
    boxes = [(0, top, width, min(top + _STRIP_ROWS, height)) for top in tops]
    return one.size == other.size and all(
        one.crop(box).tobytes() == other.crop(box).tobytes() for box in boxes
    )


def _rest_notes(image: ImageFile, kind: str, data: bytes) -> tuple[Note, ...]:
    """What the file holds beside the picture, and was left out."""
    match kind:
        case "JPEG":
            return jpeg.notes_of(data)
        case "HEIC" | "AVIF":
            return heif.notes_of(image, data)
        case "WEBP":
            rest = len(data) - 8 - int.from_bytes(data[4:8], "little")
            return (trailing_bytes(rest),) if rest > 0 else ()
        case _:
            return ()


def _depth(image: ImageFile, kind: str, data: bytes, chunks: png.Chunks) -> int:
    """Bits of a sample in the file."""
    match kind:
        case "PNG":
            return chunks.depth
        case "HEIC" | "AVIF":
            return heif.depth(image, data)
        case "TIFF":
            found: object = cast("Any", image).tag_v2.get(_BITS_PER_SAMPLE, (1,))
            bits = found if isinstance(found, tuple) else (found,)
            return max((one for one in bits if isinstance(one, int)), default=1)
        case _:
            return 8


def _declared(image: ImageFile, kind: str, data: bytes, chunks: png.Chunks) -> Declared:
    """How the file describes its colours."""
    match kind:
        case "PNG":
            return chunks.colours
        case "HEIC" | "AVIF":
            return heif.declared(image, data)
        case _:
            profile: bytes | None = image.info.get("icc_profile")
            if profile is None and _is_adobe_rgb(image.getexif):
                return _ADOBE_RGB
            return Declared(profile=profile)


def _is_adobe_rgb(read_exif: Callable[[], Image.Exif]) -> bool:
    try:
        index: object = read_exif().get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex)
    except Exception:  # As in `_orientation`.
        return False
    return str(index).strip("\0 ") == _ADOBE_RGB_MARK


def _open(data: bytes, limits: LimitSettings) -> tuple[ImageFile, str, png.Chunks]:
    """Read the file's header and check the limits. Nothing is decoded."""
    if not data:
        raise MalformedRequest("The image is empty.", value="0 bytes", remedy="Send a file.")
    if len(data) > limits.max_body_bytes:
        raise TooLarge(
            "The file has too many bytes.",
            value=f"{len(data)} bytes",
            remedy=f"Send at most {limits.max_body_bytes} bytes.",
        )
    kind = _kind(data)
    if _segments(kind, data) > _MAX_SEGMENTS:
        raise DamagedImage(
            f"The {kind} file has too many segments before its picture.",
            value=f"more than {_MAX_SEGMENTS}",
            remedy="Save the picture again, with another program.",
        )
    chunks = png.Chunks(data)
    with _reading(kind, data):
        if kind == "PNG":
            chunks = png.take_apart(data)
        if kind == "HEIC":
            heif.end(data)
        image = _READERS[kind][1](io.BytesIO(chunks.data))
    width, height = image.size
    if width * height > limits.max_input_px:
        raise TooLarge(
            "The picture has too many pixels.",
            value=f"{width} x {height} = {width * height / 1e6:.1f} MP",
            remedy=f"Scale it down to at most {limits.max_input_px / 1e6:.1f} MP.",
        )
    return image, kind, chunks


def _segments(kind: str, data: bytes) -> int:
    """Segments before the picture of a JPEG or PNG; counting stops at too many.

    Pillow reads each segment in Python. A file of empty ones would take a minute and a gigabyte.
    """
    count, at = 0, {"JPEG": 2, "PNG": 8}.get(kind, len(data))
    while at + 8 <= len(data) and count <= _MAX_SEGMENTS:
        if kind == "JPEG":
            if data[at] != 0xFF or data[at + 1] == 0xDA:
                break
            fill = data[at + 1] == 0xFF
            at += 1 if fill else 2 + int.from_bytes(data[at + 2 : at + 4])
        else:
            if data[at + 4 : at + 8] == b"IDAT":
                break
            at += 12 + int.from_bytes(data[at : at + 4])
        count += 1
    return count


def _kind(data: bytes) -> str:
    for kind, (magic, _) in _READERS.items():
        if re.match(magic, data[:64], re.DOTALL):
            return kind
    known = ", ".join(_READERS)
    raise UnsupportedMedia(
        f"The file is not an image of a format that is read: {known}.",
        value=f"a file that starts with {plain(data, _SHOWN)}",
        remedy=f"Send the file itself, not its name; one of: {known}."
        if _NAME.fullmatch(data)
        else f"Send one of: {known}.",
    )


@contextmanager
def _reading(kind: str, data: bytes) -> Generator[None]:
    """Turn what Pillow raises on a hostile file into the client's error."""
    try:
        yield
    except Image.DecompressionBombError as error:
        # Some readers allocate the canvas as they open the file, before we see its size.
        raise TooLarge(
            f"The {kind} picture declares too many pixels.",
            value="more than 178 MP",
            remedy="Scale it down, or crop it.",
        ) from error
    except Exception as error:  # Pillow's readers raise some fifteen unrelated types.
        raise DamagedImage(
            f"The {kind} file is damaged or cut off, or of a variant that cannot be read.",
            value=f"{kind} of {len(data)} bytes",
            remedy="Compare the size with your file's; if equal, save the picture again as PNG.",
        ) from error


def _frames(image: ImageFile, kind: str) -> int:
    # Counting the pages of a TIFF takes quadratic time: hours for a hostile file.
    if kind == "TIFF":
        return 2 if getattr(image, "is_animated", False) else 1
    return int(getattr(image, "n_frames", 1))


def _orientation(read_exif: Callable[[], Image.Exif]) -> int:
    """EXIF orientation, 1 to 8; 1 if the EXIF data is absent or broken."""
    try:
        found: object = read_exif().get(ExifTags.Base.Orientation)
    except Exception:  # Broken EXIF raises many types, and does not matter to the picture.
        return 1
    return found if isinstance(found, int) and found in _UPRIGHT else 1


def _is_size_turned(image: ImageFile) -> bool:
    """Whether Pillow has turned the size: it does by the tag of a TIFF, and not by its XMP."""
    return isinstance(image, Tiff.TiffImageFile) and ExifTags.Base.Orientation in image.tag_v2


def media_type(output_format: OutputFormat) -> str:
    """As in `image/png`."""
    return f"image/{output_format}"


def media_type_of(data: bytes) -> str:
    """The media type of a file that can be read.

    Raises:
        UnsupportedMedia: its format is none that is read.
    """
    return f"image/{_kind(data).lower()}"


def check_encodable(
    output_format: OutputFormat, width_px: int, height_px: int, quality: int | None = None
) -> None:
    """Refuse a size or a quality that the format cannot have, before any work.

    Raises:
        InvalidParameter: a side is longer than the format allows, or a PNG should lose something.
    """
    if output_format == "png" and quality not in (None, 100):
        raise InvalidParameter(
            "A PNG loses nothing, so that its output_compression is 100.",
            value=f"output_compression={quality}, and the result is a PNG",
            remedy="Send output_format=jpeg or webp, or leave output_compression out.",
        )
    longest = _MAX_SIDE_PX.get(output_format)
    if longest is not None and max(width_px, height_px) > longest:
        raise InvalidParameter(
            f"output_format: {output_format} holds at most {longest} px a side.",
            value=f"{width_px} x {height_px}",
            remedy="Send output_format=png, or a smaller picture.",
        )


def fitted(picture: Picture, output_format: OutputFormat) -> Picture:
    """What of a picture the format can hold: a JPEG has no alpha, and shows it on white."""
    if picture.alpha is None or output_format != "jpeg":
        return picture
    told = "JPEG has no transparency: the result lies on white."
    rgb = transparency.laid_over(picture.rgb, picture.alpha, transparency.WHITE)
    return Picture(rgb, None, (*picture.notes, note(Code.ALPHA_DROPPED, told)))


def thumbnail(pixels: Array) -> bytes:
    """A small JPEG of `H x W x 3`: at most 192 px wide and high, about 6 kB."""
    image = Image.fromarray(pixels)
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=70)
    return file.getvalue()


def encode(
    picture: Picture,
    output_format: OutputFormat,
    metadata: Mapping[str, object] | None,
    source_type: SourceType | None = None,
    quality: int | None = None,
) -> bytes:
    """The picture as a file. Nothing of the uploaded file but pixels gets into it.

    Args:
        picture: of three channels, or of one, which is written as grey.
        output_format: png and webp keep alpha; jpeg drops it, see `fitted`.
        metadata: written as JSON of at most 60 kB: in a PNG as the text chunk `imagen`, else as the
            EXIF UserComment. None writes nothing.
        source_type: written as XMP; None writes nothing.
        quality: of a JPEG or a WebP, 0 to 100; None is 92 and 90. A PNG has none.

    Raises:
        InvalidParameter: the picture is too large for the format.
    """
    check_encodable(output_format, picture.width_px, picture.height_px)
    picture = fitted(picture, output_format)
    image = _image_of(picture)
    quality = _QUALITY.get(output_format) if quality is None else quality
    text = "" if metadata is None else json.dumps(metadata, default=str)
    xmp = "" if source_type is None else provenance.packet(source_type)
    file = io.BytesIO()
    match output_format:
        case "png":
            # As small as level 6 of the default strategy on photographs, in a third of the time.
            options = {"compress_level": 1, "compress_type": zlib.Z_RLE}
            image.save(file, "PNG", pnginfo=_text_chunks(text, xmp), **options)
        case "webp":
            # Method 3 and above take twice as long for 2 % fewer bytes.
            options = {"quality": quality, "method": 2, "xmp": xmp.encode()}
            image.save(file, "WEBP", exif=_user_comment(text), **options)
        case "jpeg":
            options = {"quality": quality, "subsampling": "4:4:4", "xmp": xmp.encode()}
            image.save(file, "JPEG", exif=_user_comment(text), **options)
    return file.getvalue()


def _image_of(picture: Picture) -> Image.Image:
    image = Image.fromarray(picture.rgb)
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(picture.alpha))
    return image


def read_metadata(data: bytes) -> dict[str, object]:
    """The metadata that `encode` wrote into a file; empty if there is none.

    The source type is in it as `digital_source_type`, whoever wrote it.

    Raises:
        RequestError: as from `read_header`.
    """
    image, kind, _ = _open(data, CHECKED)
    with _reading(kind, data):
        text = image.info.get("imagen", "")
        if kind != "PNG":
            exif = Image.Image.getexif(image).get_ifd(ExifTags.IFD.Exif)
            comment: object = exif.get(ExifTags.Base.UserComment)
            text = comment.removeprefix(_ASCII) if isinstance(comment, bytes) else ""
        xmp: object = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    packet = xmp.decode(errors="replace") if isinstance(xmp, bytes) else str(xmp)
    source_type = provenance.source_type_of(packet)
    said: dict[str, object] = {"digital_source_type": source_type} if source_type else {}
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError):
        return said
    return cast("dict[str, object]", found) | said if isinstance(found, dict) else said


def _text_chunks(text: str, xmp: str) -> Png.PngInfo:
    chunks = Png.PngInfo()
    if text:
        chunks.add_text("imagen", text)
    if xmp:
        chunks.add_itxt("XML:com.adobe.xmp", xmp)
    return chunks


def _user_comment(text: str) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _ASCII + text.encode("ascii")
    return exif.tobytes() if text else b""
