"""The cases: a file or a way of sending it, and what should come back."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from benchmarks.torture import arithmetic, cutouts, heic, transparency
from benchmarks.torture.case import Case, Patch
from benchmarks.torture.files import (
    END,
    GREY,
    P3_CHUNK,
    RED,
    SIDE_PX,
    adobe_rgb_by_exif,
    chunk,
    code_points,
    corners,
    file_of,
    flat,
    gamma,
    long_text,
    noise,
    p3_profile,
    sixteen_bits,
    spoilt,
    srgb_profile,
    turned,
    ultra_hdr,
    with_chunk,
    without_last_scan,
)
from deployments.tasks import Task

if TYPE_CHECKING:
    from benchmarks.torture.arithmetic import Colour


def _all(colour: Colour) -> tuple[Patch, ...]:
    return (Patch(0.5, 0.5, colour),)


def _corners() -> tuple[Patch, ...]:
    return (
        Patch(0.25, 0.25, (200, 30, 30)),
        Patch(0.75, 0.25, (30, 200, 30)),
        Patch(0.25, 0.75, (30, 30, 200)),
        Patch(0.75, 0.75, (255, 255, 255)),
    )


def _p3(colour: Colour) -> Colour:
    light = tuple((level / 255) ** 2.2 for level in colour)
    return arithmetic.by_matrix(light, arithmetic.P3_TO_SRGB)


def _p3_srgb_curve(colour: Colour) -> Colour:
    light = tuple(arithmetic.decoded(level) for level in colour)
    return arithmetic.by_matrix(light, arithmetic.P3_TO_SRGB)


def _adobe(colour: Colour) -> Colour:
    light = tuple((level / 255) ** 2.2 for level in colour)
    return arithmetic.by_matrix(light, arithmetic.ADOBE_TO_SRGB)


def _sound_pngs() -> list[Case]:
    png, tail = file_of(flat()), b"not a picture"
    icc = file_of(flat(), icc_profile=p3_profile())
    ancillary = {
        b"iCCP": spoilt(icc, b"iCCP"),
        **{
            name: with_chunk(chunk(name, body, is_sound=False))
            for name, body in (
                (b"gAMA", struct.pack(">I", 100_000)),
                (b"sRGB", b"\0"),
                (b"pHYs", bytes(9)),
                (b"tEXt", b"Comment\0text"),
                (b"eXIf", b"MM\0*"),
                (b"zzZz", b"of a program nobody knows"),
            )
        },
    }
    return [
        Case("PNG with 1.3 MB of packed text", long_text(packed=True), _all(GREY)),
        Case("PNG with 1.3 MB of text", long_text(packed=False), _all(GREY)),
        Case(
            "PNG with a profile of 2 MB",
            file_of(flat(RED), icc_profile=p3_profile(2_000_000)),
            _all(_p3(RED)),
            "profile_converted",
        ),
        *(
            Case(f"PNG with a damaged {name.decode()}", data, _all(GREY), "chunk_dropped")
            for name, data in ancillary.items()
        ),
        Case("PNG without IEND", png.removesuffix(END), _all(GREY), "end_missing"),
        Case("PNG cut within IEND", png[:-7], _all(GREY), "end_missing"),
        Case("PNG with bytes behind it", png + tail, _all(GREY), "trailing_bytes"),
        Case("PNG with a damaged IDAT", spoilt(png, b"IDAT"), refused=True),
        Case("PNG with a damaged IHDR", spoilt(png, b"IHDR"), refused=True),
        Case(
            "PNG with a damaged PLTE",
            spoilt(file_of(flat().convert("P")), b"PLTE"),
            refused=True,
        ),
        Case("PNG with missing rows", file_of(noise())[:4000], refused=True),
    ]


def _other_sound_files() -> list[Case]:
    jpeg = file_of(flat(RED), "JPEG", quality=98, subsampling=0)
    busy = file_of(noise(), "JPEG", quality=90)
    steps = file_of(flat(RED), "JPEG", quality=98, subsampling=0, progressive=True)
    webp = file_of(flat(RED), "WEBP", lossless=True)
    tail = b"a film, say"
    return [
        Case("JPEG without its end marker", jpeg[:-2], _all(RED), "end_missing"),
        Case("JPEG with half an end marker", jpeg[:-1], _all(RED), "end_missing"),
        Case("progressive JPEG without its end marker", steps[:-2], _all(RED), "end_missing"),
        Case("JPEG with bytes behind it", jpeg + tail, _all(RED), "trailing_bytes"),
        Case("WebP with bytes behind it", webp + tail, _all(RED), "trailing_bytes"),
        Case(
            "JPEG with a damaged EXIF",
            file_of(flat(RED), "JPEG", quality=98, exif=_BAD_EXIF),
            _all(RED),
        ),
        Case(
            "JPEG with a damaged profile",
            file_of(flat(RED), "JPEG", quality=98, icc_profile=b"no profile"),
            _all(RED),
            "profile_ignored",
        ),
        Case("JPEG with missing rows", busy[: len(busy) * 9 // 10], refused=True),
        Case("JPEG whose last kilobyte is zero", busy[:-1024] + bytes(1024), refused=True),
        Case("progressive JPEG without its last scan", without_last_scan(), refused=True),
        Case("HEIC with missing rows", heic.COLOUR[:-200], refused=True),
    ]


_BAD_EXIF = b"Exif\0\0MM\0*\xff\xff\xff\xff"


def _colours() -> list[Case]:
    cmyk = Image.merge("CMYK", [Image.new("L", (SIDE_PX, SIDE_PX), k) for k in (0, 255, 255, 0)])
    p3 = code_points(12, 13)
    by_numbers = "profile_converted"
    return [
        Case(
            "PNG of gamma 1.0",
            with_chunk(gamma(1.0)),
            _all(arithmetic.by_gamma(55, 1.0)),
            by_numbers,
        ),
        Case(
            "PNG of gamma 1/1.8",
            with_chunk(gamma(1 / 1.8)),
            _all(arithmetic.by_gamma(55, 1 / 1.8)),
            by_numbers,
        ),
        Case("PNG of gamma 1/2.2", with_chunk(gamma(0.45455)), _all(GREY)),
        Case("PNG of gamma 0", with_chunk(gamma(0)), _all(GREY), "profile_ignored"),
        Case(
            "PNG of gamma 1.0 that says sRGB",
            with_chunk(gamma(1.0), chunk(b"sRGB", b"\0")),
            _all(GREY),
        ),
        Case(
            "PNG of P3 primaries",
            with_chunk(P3_CHUNK, image=flat(RED)),
            _all(_p3_srgb_curve(RED)),
            by_numbers,
        ),
        Case(
            "PNG of P3 by cICP",
            with_chunk(p3, image=flat(RED)),
            _all(_p3_srgb_curve(RED)),
            by_numbers,
        ),
        Case(
            "PNG in PQ",
            with_chunk(code_points(9, 16)),
            _all(arithmetic.by_pq(55)),
            "hdr_tone_mapped",
        ),
        Case(
            "PNG in HLG",
            with_chunk(code_points(9, 18)),
            _all(arithmetic.by_hlg(55)),
            "hdr_tone_mapped",
        ),
        Case("PNG with an sRGB profile", file_of(flat(RED), icc_profile=srgb_profile()), _all(RED)),
        Case(
            "JPEG with a P3 profile",
            file_of(flat(RED), "JPEG", quality=98, subsampling=0, icc_profile=p3_profile()),
            _all(_p3(RED)),
            by_numbers,
        ),
        Case("JPEG in Adobe RGB by EXIF", adobe_rgb_by_exif(), _all(_adobe(RED)), by_numbers),
        Case(
            "grey JPEG with a colour profile",
            file_of(flat(mode="L"), "JPEG", quality=98, icc_profile=p3_profile()),
            is_grey=True,
        ),
        Case("grey picture", file_of(flat(mode="L")), _all(GREY), "grey_kept", is_grey=True),
        Case(
            "grey picture to enhance",
            file_of(flat(mode="L")),
            note="grey_kept",
            is_grey=True,
            task=Task.ENHANCE,
        ),
        Case(
            "JPEG of inks", file_of(cmyk, "JPEG", quality=98), _all((255, 0, 0)), "profile_missing"
        ),
        Case("JPEG with a gain map", ultra_hdr(), _all(RED), "gain_map_dropped"),
    ]


def _formats() -> list[Case]:
    frames = [flat(RED), flat((30, 200, 30)), flat((30, 30, 200))]
    animated = {"save_all": True, "append_images": frames[1:]}
    levels = np.full((SIDE_PX, SIDE_PX), 55 * 257, np.uint16)
    dropped = "frames_dropped"
    ramp = tuple(Patch(0.5, y, arithmetic.grey(round(255 * y))) for y in (0.25, 0.5, 0.75))
    colours = tuple(
        Patch(x, y, (round(255 * y), round(255 * x), round(255 * (1 - y))))
        for x in (0.2, 0.8)
        for y in (0.2, 0.8)
    )
    return [
        *(Case(f"JPEG with EXIF orientation {n}", turned(n), _corners()) for n in range(1, 9)),
        Case("PNG with EXIF orientation 6", turned(6, "PNG"), _corners()),
        Case("WebP with EXIF orientation 8", turned(8, "WEBP"), _corners()),
        Case("TIFF", file_of(corners(), "TIFF"), _corners()),
        Case("BMP", file_of(corners(), "BMP"), _corners()),
        Case("AVIF", file_of(corners(), "AVIF", quality=95), _corners()),
        Case("HEIC", heic.COLOUR, colours),
        Case("HEIC of 10 bits", heic.GREY_10_BIT, ramp, "depth_reduced", is_grey=True),
        Case("GIF of 3 frames", file_of(frames[0], "GIF", **animated), _all(RED), dropped),
        Case("PNG of 3 frames", file_of(frames[0], "PNG", **animated), _all(RED), dropped),
        Case(
            "WebP of 3 frames",
            file_of(frames[0], "WEBP", lossless=True, **animated),
            _all(RED),
            dropped,
        ),
        Case("TIFF of 3 pages", file_of(frames[0], "TIFF", **animated), _all(RED), dropped),
        Case("PNG of 16 bits", sixteen_bits(RED), _all(RED), "depth_reduced"),
        Case(
            "grey TIFF of 16 bits",
            file_of(Image.fromarray(levels), "TIFF"),
            _all(GREY),
            "depth_reduced",
        ),
        Case("PNG of one bit", file_of(flat((255, 255, 255), "1")), _all((255, 255, 255))),
    ]


def _habits() -> list[Case]:
    png = file_of(flat(RED))
    cut_out = {"output": "color", "output_format": "png"}
    return [
        Case(
            "output_format=jpg",
            png,
            _all(RED),
            fields={"output_format": "jpg"},
            media_type="image/jpeg",
        ),
        Case("seed=-1", png, note="seed_drawn", task=Task.COMIC, fields={"seed": "-1"}),
        Case(
            "seed=2^63-1",
            png,
            note="seed_shortened",
            task=Task.COMIC,
            fields={"seed": str(2**63 - 1)},
        ),
        Case("color=#fff", png, task=Task.BACKGROUND, fields={"color": "#fff", **cut_out}),
        Case(
            "color=rebeccapurple",
            png,
            task=Task.BACKGROUND,
            fields={"color": "rebeccapurple", **cut_out},
        ),
        Case("a field named image[]", png, _all(RED), form="image[]"),
        Case("a preamble before the form", png, _all(RED), form="preamble"),
        Case("blanks behind the boundary", png, _all(RED), form="padded"),
        Case(
            "a prompt for a model without one",
            png,
            _all(RED),
            "parameter_unused",
            fields={"prompt": "sharp", "guidance_scale": "7"},
        ),
        Case(
            "the same with strict=true",
            png,
            refused=True,
            fields={"prompt": "sharp", "strict": "true"},
        ),
        Case(
            "a prompt of 200 words",
            png,
            note="prompt_cut|parameter_unused",
            task=Task.COMIC,
            fields={"prompt": "cat " * 200},
        ),
        Case(
            "a negative prompt without guidance",
            png,
            note="negative_prompt_unused|parameter_unused",
            task=Task.COMIC,
            fields={"negative_prompt": "blur", "guidance_scale": "1"},
        ),
        Case(
            "a picture of another size than the model's", png, note="working_size", task=Task.COMIC
        ),
        Case(
            "a transparent picture as JPEG",
            file_of(flat(RED, "RGBA").resize((20, 20))),
            fields={"output_format": "jpeg"},
        ),
    ]


CASES: tuple[Case, ...] = (
    *_sound_pngs(),
    *_other_sound_files(),
    *_colours(),
    *_formats(),
    *_habits(),
    *transparency.CASES,
    *cutouts.CASES,
)
