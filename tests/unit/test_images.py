"""Every kind of upload becomes the right pixels or a clear refusal, and results carry no more."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from benchmarks.torture import heic
from deployments import icc, images
from deployments.errors import (
    DamagedImage,
    ImagenError,
    InvalidParameter,
    MalformedRequest,
    TooLarge,
    UnsupportedMedia,
)
from deployments.images import Picture
from deployments.settings import LimitSettings

if TYPE_CHECKING:
    from deployments.contract import OutputFormat

# As `images` sets on import; pytest puts its own filters before it.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")

LIMITS = LimitSettings()
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
OUTPUTS: tuple[OutputFormat, ...] = ("png", "webp", "jpeg")


def scene(width: int = 96, height: int = 64) -> images.Array:
    """A smooth picture whose four corners differ, so that any turn shows."""
    across, down = np.linspace(0, 255, width), np.linspace(0, 255, height)
    red, green = np.meshgrid(across, down)
    return np.dstack([red, green, 255 - red]).astype(np.uint8)


def file_of(image: Image.Image | images.Array, kind: str = "PNG", **options: object) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rgb_of(data: bytes) -> images.Array:
    return images.decode(data, LIMITS).rgb


def told(picture: Picture) -> dict[str, str]:
    """The notes of a picture: sentences by code."""
    return dict(picture.notes)


def distance(left: images.Array, right: images.Array) -> float:
    """Mean absolute difference, in levels of 255."""
    assert left.shape == right.shape
    return float(np.abs(left.astype(int) - right.astype(int)).mean())


def chunk(name: bytes, body: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + body))
    return struct.pack(">I", len(body)) + name + body + checksum


def png_of(width: int, height: int, depth: int, colour_type: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"".join((b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *chunks, chunk(b"IEND", b"")))


def display_p3() -> bytes:
    """An ICC profile of the primaries that phones use, gamma 2.2."""
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
        b"wtpt": (0.96420, 1.00000, 0.82491),
    }
    fixed = {
        name: b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)
        for name, values in primaries.items()
    }
    gamma = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(2.2 * 256), 0)
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(78)
    tags = {**fixed, b"rTRC": gamma, b"gTRC": gamma, b"bTRC": gamma, b"desc": text + bytes(2)}
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        padded = value + bytes(-len(value) % 4)
        table += name + struct.pack(">II", start + len(body), len(value))
        body += padded
    head = struct.pack(
        ">I4sI4s4s4s12x4s",
        start + len(body),
        b"lcms",
        0x02400000,
        b"mntr",
        b"RGB ",
        b"XYZ ",
        b"acsp",
    )
    white = struct.pack(">iii", 63190, 65536, 54061)
    head = head.ljust(68, b"\0") + white
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def srgb_profile() -> bytes:
    cms: Any = ImageCms  # Pillow leaves `createProfile` without a type.
    return cms.ImageCmsProfile(cms.createProfile("sRGB")).tobytes()


# Formats


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 90}, 3),
        ("JPEG", {"quality": 95, "subsampling": 0}, 2),
        ("AVIF", {"quality": 90}, 3),
        ("GIF", {}, 12),
    ],
)
def test_every_format_decodes_to_the_pixels_it_was_made_of(
    kind: str, options: dict[str, object], tolerance: float
) -> None:
    data = file_of(scene(), kind, **options)
    picture = images.decode(data, LIMITS)
    header = images.read_header(data, LIMITS)
    assert distance(picture.rgb, scene()) <= tolerance
    assert picture.alpha is None
    assert picture.notes == ()
    assert (picture.width_px, picture.height_px) == (96, 64)
    assert header == images.Header(kind, 96, 64, 1)


def test_decoded_arrays_may_be_written_to() -> None:
    assert rgb_of(file_of(scene())).flags.writeable


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "WEBP", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_gives_the_same_upright_picture(kind: str, orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = Image.fromarray(scene())
    if orientation in undo:
        stored = stored.transpose(undo[orientation])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = file_of(stored, kind, exif=exif, quality=95)
    header = images.read_header(data, LIMITS)
    assert (header.width_px, header.height_px) == (96, 64)
    assert distance(rgb_of(data), scene()) < 5


@pytest.mark.parametrize(("tag", "size"), [(None, (64, 96)), (1, (96, 64)), (6, (64, 96))])
def test_the_header_and_the_pixels_of_a_tiff_agree_on_its_orientation(
    tag: int | None, size: tuple[int, int]
) -> None:
    """Only XMP says 6: it counts where the tag is missing."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[700] = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    if tag is not None:
        tags[ExifTags.Base.Orientation] = tag
    data = file_of(scene(), "TIFF", tiffinfo=tags)
    header, picture = images.read_header(data, LIMITS), images.decode(data, LIMITS)
    assert (header.width_px, header.height_px) == size
    assert (picture.width_px, picture.height_px) == size


def test_the_levels_of_a_mask_are_those_of_its_file() -> None:
    grey = Image.fromarray(np.full((8, 8), 128, np.uint8))
    data = file_of(grey)
    at = data.index(b"IDAT") - 4
    linear = data[:at] + chunk(b"gAMA", (100_000).to_bytes(4, "big")) + data[at:]
    assert images.decode(linear, LIMITS).rgb[0, 0, 0] > 180
    found = images.decode(linear, LIMITS, levels=True)
    assert (found.rgb == 128).all()
    assert not found.notes


def test_a_png_whose_exif_follows_its_pixels_is_turned() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    plain = file_of(scene())
    end = plain.index(b"IEND") - 4
    turned = plain[:end] + chunk(b"eXIf", exif.tobytes()) + plain[end:]
    assert distance(rgb_of(turned), scene()[::-1, ::-1]) == 0


def test_broken_exif_does_not_spoil_a_picture() -> None:
    data = file_of(scene(), "JPEG", quality=95, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert distance(rgb_of(data), scene()) < 5
    assert images.read_header(data, LIMITS).width_px == 96


@pytest.mark.parametrize(
    ("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})]
)
def test_of_an_animation_the_first_frame_is_used_and_said(
    kind: str, options: dict[str, object]
) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    picture = images.decode(data, LIMITS)
    assert picture.rgb[4, 4].tolist() == [255, 0, 0]
    assert told(picture) == {"frames_dropped": "The first of 3 frames was used."}
    assert images.read_header(data, LIMITS).frames == 3


def test_of_a_tiff_of_several_pages_the_first_is_used_and_said() -> None:
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = file_of(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    picture = images.decode(data, LIMITS)
    assert picture.rgb[4, 4].tolist() == [255, 0, 0]
    assert told(picture) == {"frames_dropped": "The first of several frames was used."}


def test_the_further_pictures_of_a_phones_jpeg_are_left_out_and_said() -> None:
    depth = Image.new("RGB", (24, 16))
    data = file_of(
        Image.fromarray(scene()), "MPO", save_all=True, append_images=[depth], quality=95
    )
    picture = images.decode(data, LIMITS)
    assert distance(picture.rgb, scene()) < 5
    assert list(told(picture)) == ["auxiliary_dropped"]
    assert images.read_header(data, LIMITS).format == "JPEG"


# Colours


def test_a_wide_gamut_picture_is_brought_into_srgb() -> None:
    orange = np.full((8, 8, 3), (200, 120, 60), np.uint8)
    wide = rgb_of(file_of(orange, icc_profile=display_p3()))[0, 0].astype(int)
    assert wide[0] > 205
    assert wide[2] < 55
    grey = np.full((8, 8, 3), 128, np.uint8)
    assert distance(rgb_of(file_of(grey, icc_profile=display_p3())), grey) < 2


@pytest.mark.parametrize("profile", [srgb_profile(), b"not a profile", display_p3()[:200]])
def test_an_srgb_or_broken_profile_changes_nothing(profile: bytes) -> None:
    assert distance(rgb_of(file_of(scene(), icc_profile=profile)), scene()) == 0


def test_alpha_is_not_touched_by_a_profile() -> None:
    alpha = scene()[..., 0]
    image = Image.fromarray(scene())
    image.putalpha(Image.fromarray(alpha))
    picture = images.decode(file_of(image, icc_profile=display_p3()), LIMITS)
    assert picture.alpha is not None
    assert distance(picture.alpha, alpha) == 0


def test_a_grey_picture_with_the_profile_of_a_colour_camera_stays_grey() -> None:
    grey = Image.fromarray(scene()[..., 0])
    rgb = rgb_of(file_of(grey, icc_profile=display_p3())).astype(int)
    assert np.ptp(rgb, axis=2).max() <= 2


@pytest.mark.parametrize("profile", [None, display_p3(), b"broken"])
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_the_colours_that_were_printed(kind: str, profile: bytes | None) -> None:
    inks = Image.merge("CMYK", [Image.new("L", (8, 8), ink) for ink in (0, 255, 255, 0)])
    data = file_of(inks, kind, icc_profile=profile)
    assert distance(rgb_of(data), np.full((8, 8, 3), (255, 0, 0), np.uint8)) < 3


def test_a_lab_tiff_becomes_its_colours() -> None:
    lab = Image.new("RGB", (8, 8), (220, 40, 40)).convert("LAB")
    assert distance(rgb_of(file_of(lab, "TIFF")), np.full((8, 8, 3), (220, 40, 40), np.uint8)) < 4


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("<u2", "PNG"), ("<u2", "TIFF"), (">u2", "TIFF"), ("<i4", "TIFF")],
)
def test_sixteen_bit_grey_is_scaled_and_not_clipped(dtype: str, kind: str) -> None:
    levels = np.array([[0, 256, 32768, 65535]], dtype=dtype)
    assert rgb_of(file_of(Image.fromarray(levels), kind))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([0.0, 0.5, 1.0, np.nan], [0, 128, 255, 0]),
        ([0.0, 100.0, 255.0, -7.0], [0, 100, 255, 0]),
        ([0.0, 500.0, 1000.0, np.inf], [0, 128, 255, 255]),
        ([np.nan, np.nan, np.nan, np.nan], [0, 0, 0, 0]),
    ],
)
def test_float_grey_is_scaled_by_its_range(levels: list[float], expected: list[int]) -> None:
    data = file_of(Image.fromarray(np.array([levels], np.float32)), "TIFF")
    assert rgb_of(data)[0, :, 0].tolist() == expected


def test_one_bit_pictures_are_black_and_white() -> None:
    bits = Image.fromarray(np.array([[0, 255, 0, 255]], np.uint8)).convert("1")
    assert rgb_of(file_of(bits))[0, :, 0].tolist() == [0, 255, 0, 255]


# Transparency


def test_colours_are_straight_and_those_hidden_are_replaced() -> None:
    pixels = np.array([[[255, 0, 0, 255], [255, 0, 0, 128], [0, 99, 255, 0]]], np.uint8)
    picture = images.decode(file_of(pixels), LIMITS)
    assert picture.alpha is not None
    assert picture.alpha.tolist() == [[255, 128, 0]]
    assert picture.rgb[0].tolist() == [[255, 0, 0]] * 3


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_alpha_that_is_opaque_throughout_is_none(mode: str) -> None:
    assert images.decode(file_of(Image.fromarray(scene()).convert(mode)), LIMITS).alpha is None


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_palette_transparency_becomes_alpha(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    picture = images.decode(file_of(image, transparency=transparency), LIMITS)
    assert picture.alpha is not None
    assert picture.alpha.tolist() == [[255, 0]]
    assert picture.rgb[0].tolist() == [[10, 20, 30]] * 2


def test_a_colour_declared_transparent_becomes_alpha() -> None:
    pixels = np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8)
    picture = images.decode(file_of(pixels, transparency=(9, 9, 9)), LIMITS)
    assert picture.alpha is not None
    assert picture.alpha.tolist() == [[255, 0]]


@pytest.mark.parametrize("depth", [1, 8, 16])
def test_a_grey_level_declared_transparent_becomes_alpha(depth: int) -> None:
    row = {1: b"\x40", 8: b"\x00\x01", 16: b"\x00\x00\x00\x01"}[depth]
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    data = png_of(2, 1, depth, 0, chunk(b"tRNS", b"\x00\x01"), pixels)
    picture = images.decode(data, LIMITS)
    assert picture.alpha is not None
    assert picture.alpha.tolist() == [[255, 0]]


@pytest.mark.parametrize("orientation", [1, 6])
def test_alpha_is_turned_with_the_picture(orientation: int) -> None:
    image = Image.fromarray(np.zeros((4, 6, 4), np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = images.decode(file_of(image, exif=exif), LIMITS)
    assert picture.alpha is not None
    assert picture.alpha.shape == picture.rgb.shape[:2]


# Refusals


def refused(data: bytes, limits: LimitSettings = LIMITS) -> ImagenError:
    """The error both readers agree on."""
    with pytest.raises(ImagenError) as header:
        images.read_header(data, limits)
    with pytest.raises(type(header.value)) as whole:
        images.decode(data, limits)
    assert str(whole.value) == str(header.value)
    well_said(header.value)
    return header.value


def well_said(error: ImagenError) -> None:
    assert error.message
    assert error.value
    assert error.remedy
    assert not any(leak in str(error) for leak in ("Traceback", "/usr", "/home", ".py", "0x"))


def test_no_bytes_is_a_malformed_request() -> None:
    assert isinstance(refused(b""), MalformedRequest)


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"BMW is a car maker",
        b"<!doctype html><script>alert(1)</script>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7\n",
        b"P6 2 2 255 " + bytes(12),
        random.Random(0).randbytes(4096),
    ],
)
def test_what_is_no_image_is_refused_with_the_list_of_formats(data: bytes) -> None:
    error = refused(data)
    assert isinstance(error, UnsupportedMedia)
    assert "JPEG, PNG, WEBP, AVIF, TIFF, BMP, GIF" in error.message


@pytest.mark.parametrize("brands", [b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic"])
def test_a_heic_without_a_picture_is_damaged(brands: bytes) -> None:
    data = struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands
    with pytest.raises(DamagedImage, match="HEIC") as caught:
        images.decode(data, LIMITS)
    well_said(caught.value)


def test_too_many_bytes_are_refused() -> None:
    data = file_of(scene(), "BMP")
    assert isinstance(refused(data, LimitSettings(max_body_bytes=len(data) - 1)), TooLarge)
    assert images.read_header(data, LimitSettings(max_body_bytes=len(data))).width_px == 96


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF"])
def test_too_many_pixels_are_refused_in_every_format(kind: str) -> None:
    error = refused(file_of(scene(), kind), LimitSettings(max_input_px=96 * 64 - 1))
    assert isinstance(error, TooLarge)
    assert error.value == "96 x 64 = 0.0 MP"


def test_a_decompression_bomb_is_refused_before_it_unfolds() -> None:
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(3751)) for _ in range(30000)) + packer.flush()
    data = png_of(30000, 30000, 1, 0, chunk(b"IDAT", packed))
    assert len(data) < 130_000
    tracemalloc.start()
    error = refused(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(error, TooLarge)
    assert error.value == "30000 x 30000 = 900.0 MP"
    assert "50.0 MP" in error.remedy
    assert peak < 20 * 2**20


def test_a_canvas_that_a_reader_would_allocate_at_once_is_refused() -> None:
    gif = bytearray(file_of(Image.new("L", (1, 1)), "GIF"))
    frame = gif.rindex(b",\0\0\0\0")
    gif[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    assert isinstance(refused(bytes(gif)), TooLarge)
    webp = file_of(Image.new("RGBA", (1, 1), (1, 2, 3, 4)), "WEBP")
    assert webp[12:16] == b"VP8X"
    assert isinstance(refused(webp[:24] + b"\xfe\x3f\0\xfe\x3f\0" + webp[30:]), TooLarge)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_a_file_cut_off_is_damaged(kind: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3)).astype(np.uint8)
    data = file_of(noise, kind)
    with pytest.raises(DamagedImage) as caught:
        images.decode(data[: int(len(data) * kept)], LIMITS)
    well_said(caught.value)
    assert kind in caught.value.message


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "AVIF", "TIFF", "GIF"])
def test_a_file_cut_off_in_its_header_is_damaged(kind: str) -> None:
    assert isinstance(refused(file_of(scene(), kind)[:24]), DamagedImage)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF"])
def test_no_broken_file_raises_anything_but_our_own_errors(kind: str) -> None:
    chance = random.Random(kind)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    options = {} if kind in {"GIF", "BMP"} else {"exif": exif, "icc_profile": display_p3()}
    sound = file_of(scene(24, 16), kind, **options)
    small = LimitSettings(max_input_px=10**6)
    for _ in range(300):
        broken = bytearray(sound)
        for _ in range(chance.randint(1, 8)):
            broken[chance.randrange(min(len(broken), chance.choice([64, 10**6])))] = chance.choice(
                [0, 1, 127, 255, chance.randrange(256)]
            )
        data = bytes(broken[: chance.choice([len(broken), chance.randrange(1, len(broken))])])
        for read in (images.read_header, images.decode):
            try:
                read(data, small)
            except ImagenError as error:
                well_said(error)
        try:
            images.read_metadata(data)
        except ImagenError as error:
            well_said(error)


# Results


@pytest.mark.parametrize("output_format", OUTPUTS)
def test_an_encoded_picture_reads_back(output_format: OutputFormat) -> None:
    data = images.encode(Picture(scene(), None), output_format, None)
    tolerance = 0 if output_format == "png" else 3
    assert distance(rgb_of(data), scene()) <= tolerance
    header = images.read_header(data, LIMITS)
    assert images.media_type(output_format) == f"image/{header.format.lower()}"


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_more_quality_takes_more_bytes_and_comes_nearer(output_format: OutputFormat) -> None:
    pictures = [
        images.encode(Picture(scene(), None), output_format, None, quality=quality)
        for quality in (0, 60, None, 100)
    ]
    sizes = [len(data) for data in pictures]
    distances = [distance(rgb_of(data), scene()) for data in pictures]
    assert sizes == sorted(set(sizes))
    assert distances[0] > distances[1] > distances[-1]


@pytest.mark.parametrize(
    ("output_format", "kept"), [("png", True), ("webp", True), ("jpeg", False)]
)
def test_alpha_is_kept_where_the_format_has_it(output_format: OutputFormat, kept: bool) -> None:
    alpha = scene()[..., 0]
    result = images.decode(images.encode(Picture(scene(), alpha), output_format, None), LIMITS)
    assert (result.alpha is not None) == kept
    if result.alpha is not None:
        assert distance(result.alpha, alpha) == 0


def test_a_format_without_alpha_shows_the_picture_on_white() -> None:
    green = np.full((16, 16, 3), (0, 160, 0), np.uint8)
    alpha = np.repeat(np.array([[0], [51], [255], [255]], np.uint8), 16, axis=1).repeat(4, axis=0)
    shown = rgb_of(images.encode(Picture(green, alpha), "jpeg", None))
    expected = np.array([[255, 255, 255], [204, 236, 204], [0, 160, 0]])
    assert np.abs(shown[[1, 6, 12], 8].astype(int) - expected).max() <= 6


@pytest.mark.parametrize("output_format", OUTPUTS)
def test_a_mask_is_encoded_as_grey(output_format: OutputFormat) -> None:
    mask = scene()[..., 0]
    data = images.encode(Picture(mask, None), output_format, None)
    assert distance(rgb_of(data)[..., 0], mask) < 2
    if output_format != "webp":
        assert Image.open(io.BytesIO(data)).mode == "L"


@pytest.mark.parametrize("output_format", OUTPUTS)
def test_metadata_reads_back(output_format: OutputFormat) -> None:
    metadata = {
        "prompt": "café, 雪の猫 🐈\nline two",
        "seed": 4_294_967_295,
        "guidance_scale": 5.5,
        "nested": {"steps": [1, 2]},
    }
    data = images.encode(Picture(scene(), scene()[..., 0]), output_format, metadata)
    assert images.read_metadata(data) == metadata


@pytest.mark.parametrize("output_format", OUTPUTS)
def test_the_longest_prompts_fit_into_every_format(output_format: OutputFormat) -> None:
    metadata = {"prompt": "🐈" * 2000, "negative_prompt": "🐕" * 2000}
    data = images.encode(Picture(scene(), None), output_format, metadata)
    assert images.read_metadata(data) == metadata


@pytest.mark.parametrize("output_format", OUTPUTS)
def test_without_metadata_nothing_is_written(output_format: OutputFormat) -> None:
    data = images.encode(Picture(scene(), None), output_format, None)
    assert images.read_metadata(data) == {}
    traces = (b"imagen", b"Exif", b"EXIF", b"ASCII", b"tEXt", b"iTXt", b"eXIf", b"XMP", b"ICC")
    assert not any(trace in data for trace in traces)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_a_result_says_of_its_origin_what_other_programs_read(output_format: OutputFormat) -> None:
    """IPTC's term, in a well-formed XMP packet, with and without metadata of our own."""
    kind = "compositeWithTrainedAlgorithmicMedia"
    for metadata in (None, {"seed": 1}):
        data = images.encode(Picture(scene(), None), output_format, metadata, kind)
        assert images.read_metadata(data) == (metadata or {}) | {"digital_source_type": kind}
        info = Image.open(io.BytesIO(data)).info
        packet = info.get("xmp") or info["XML:com.adobe.xmp"]
        text = packet.decode() if isinstance(packet, bytes) else packet
        (description,) = ElementTree.fromstring(text).iter(f"{{{RDF}}}Description")
        assert description.attrib[f"{{{IPTC}}}DigitalSourceType"] == (
            f"http://cv.iptc.org/newscodes/digitalsourcetype/{kind}"
        )
        same = images.decode(data, LIMITS)
        assert same.rgb.shape == scene().shape


@pytest.mark.parametrize("comment", [b"ASCII\0\0\0hello", b"ASCII\0\0\0[1]", b"\xff\xfe\xfd"])
def test_a_comment_of_another_program_is_no_metadata(comment: bytes) -> None:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    assert images.read_metadata(file_of(scene(), "JPEG", exif=exif)) == {}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("output_format", OUTPUTS)
def test_nothing_private_in_the_upload_reaches_the_result(
    kind: str, output_format: OutputFormat
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "SECRET-camera"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSMapDatum] = "SECRET-place"
    text = PngInfo()
    text.add_text("Comment", "SECRET-text")
    data = file_of(
        scene(),
        kind,
        exif=exif,
        xmp=b"<x:xmpmeta>SECRET-xmp</x:xmpmeta>",
        icc_profile=display_p3(),
        comment=b"SECRET-comment",
        pnginfo=text,
    )
    assert b"SECRET" in data
    result = images.encode(images.decode(data, LIMITS), output_format, {"seed": 1})
    traces = (b"SECRET", b"wide", b"acsp", b"xmpmeta", b"Comment\0")
    assert not any(trace in result for trace in traces)


def test_a_file_that_is_also_a_page_leaves_only_its_pixels() -> None:
    payload = b"<html><script>alert(1)</script></html>"
    gif = file_of(Image.new("RGB", (4, 4), "red"), "GIF", comment=payload) + payload
    assert payload in gif
    result = images.encode(images.decode(gif, LIMITS), "png", None)
    assert b"script" not in result
    assert distance(rgb_of(result), np.full((4, 4, 3), (255, 0, 0), np.uint8)) == 0


@pytest.mark.parametrize(
    ("output_format", "longest"), [("webp", 16383), ("jpeg", 65500), ("png", None)]
)
def test_a_side_too_long_for_the_format_is_refused_before_any_work(
    output_format: OutputFormat, longest: int | None
) -> None:
    images.check_encodable(output_format, longest or 10**6, 1)
    if longest is None:
        return
    strip = Picture(np.zeros((2, longest, 3), np.uint8), None)
    assert images.read_header(images.encode(strip, output_format, None), LIMITS).width_px == longest
    with pytest.raises(InvalidParameter) as caught:
        images.check_encodable(output_format, 1, longest + 1)
    well_said(caught.value)
    assert f"{longest + 1}" in caught.value.value
    assert "png" in caught.value.remedy


@pytest.mark.parametrize(
    ("kind", "filler"),
    [
        ("JPEG", b"\xff\xe5\x00\x02"),
        ("JPEG", b"\xff"),
        ("PNG", b"\0\0\0\0tEXt" + zlib.crc32(b"tEXt").to_bytes(4)),
    ],
)
def test_a_flood_of_empty_segments_is_refused_unread(kind: str, filler: bytes) -> None:
    head = 2 if kind == "JPEG" else 8 + 25
    data = file_of(scene(), kind)
    with pytest.raises(DamagedImage) as caught:
        images.read_header(data[:head] + filler * 100_000 + data[head:], LIMITS)
    well_said(caught.value)
    assert "segments" in caught.value.message


def flood(kind: str) -> bytes:
    """A file that would keep a careless reader busy for minutes."""
    png, jpeg = file_of(scene()), file_of(scene(), "JPEG")
    bomb = zlib.compress(bytes(2**24 - 1))
    match kind:
        case "profiles":
            return png[:33] + chunk(b"iCCP", b"a\0\0" + bomb) * 1000 + png[33:]
        case "texts":
            text = chunk(b"zTXt", b"Raw profile type exif\0\0" + bomb)
            return png[:33] + text * 1000 + png[33:]
        case "damaged chunks":
            names = (
                bytes([97 + n // 676, 97 + n // 26 % 26, 65 + n % 26, 97]) for n in range(1500)
            )
            return png[:33] + b"".join(bytes(4) + name + bytes(4) for name in names) + png[33:]
        case "chunks behind the pixels":
            return png[:-12] + chunk(b"tEXt", b"") * 60_000 + png[-12:]
        case "fill bytes":
            return jpeg[:-2] + b"\xff" * 5_000_000 + b"\0" + jpeg[-2:]
        case "segments behind the pixels":
            return jpeg[:-2] + b"\xff\xe5\0\x02" * 1_000_000 + jpeg[-2:]
        case _:
            return heic.COLOUR + b"\0\0\0\x08free" * 1_000_000


@pytest.mark.parametrize(
    "kind",
    [
        "profiles",
        "texts",
        "damaged chunks",
        "chunks behind the pixels",
        "fill bytes",
        "segments behind the pixels",
        "boxes",
    ],
)
def test_a_flood_takes_little_memory_and_few_words(kind: str) -> None:
    data = flood(kind)
    tracemalloc.start()
    try:
        assert len(images.decode(data, LIMITS).notes) < 5
    except DamagedImage as error:
        well_said(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 * 2**20


def test_a_result_larger_than_any_upload_still_tells_its_metadata() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3600, 3600, 3), np.uint8)
    data = images.encode(Picture(noise, None), "png", {"seed": 1})
    assert len(data) > LIMITS.max_body_bytes
    assert images.read_metadata(data) == {"seed": 1}


# Small files that would take long


def test_a_profile_of_elements_is_read_without_them() -> None:
    """A table may name one element a million times, and Little CMS would read each."""
    data = icc.profile(icc.BT709, icc.power(2.0))
    at = int.from_bytes(data[136:140])
    hostile = bytearray(data)
    hostile[132:136], hostile[at : at + 4] = b"D2B0", b"mpet"
    kept = icc.without_elements(bytes(hostile))
    assert b"D2B0" not in kept
    assert len(kept) == len(data)
    assert icc.without_elements(data) == data
    tags = (101).to_bytes(4)
    for crafted in (data[:128] + tags + data[132:], data + bytes(2**22)):
        picture = images.decode(file_of(scene(), "PNG", icc_profile=crafted), LIMITS)
        assert [one.code for one in picture.notes] == ["profile_ignored"]


def test_a_jpeg_of_endless_scans_is_refused_before_it_is_decoded() -> None:
    data = file_of(scene(), "JPEG", progressive=True)
    scan = b"\xff\xda" + (8).to_bytes(2) + bytes([1, 1, 0, 1, 63, 0x10]) + b"\0\0"
    with pytest.raises(DamagedImage):
        images.decode(data[:-2] + 201 * scan + data[-2:], LIMITS)


def test_an_orientation_behind_the_pixels_counts_for_the_size_too() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = file_of(np.zeros((50, 100, 3), np.uint8), "PNG")
    turned = data[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + data[-12:]
    header, picture = images.read_header(turned, LIMITS), images.decode(turned, LIMITS)
    assert (header.width_px, header.height_px) == (picture.width_px, picture.height_px) == (50, 100)
