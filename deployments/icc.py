"""ICC profiles for files that describe their colours by numbers instead: gAMA and cHRM, cICP, nclx.

Pillow hands the profile to Little CMS, which does the arithmetic.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Curve = NDArray[np.float64]

_SAMPLES: Final = 4096
_MAX_BYTES: Final = 2**22
_MAX_TAGS: Final = 100
_D50: Final = (0.9642, 1.0, 0.8249)
_BRADFORD: Final = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
WHITE_NITS: Final = 203.0
"""Diffuse white in HDR (ITU-R BT.2408)."""
PEAK_NITS: Final = 1000.0
"""The brightest light that is told apart; most HDR pictures are graded for it."""


class Chromaticities(NamedTuple):
    """CIE x and y of white and the three primaries, in the order of a PNG's cHRM chunk."""

    white: tuple[float, float]
    red: tuple[float, float]
    green: tuple[float, float]
    blue: tuple[float, float]


_D65: Final = (0.3127, 0.3290)
BT709: Final = Chromaticities(_D65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
_C: Final = (0.310, 0.316)
PRIMARIES: Final[dict[int, Chromaticities]] = {
    1: BT709,
    4: Chromaticities(_C, (0.67, 0.33), (0.21, 0.71), (0.14, 0.08)),
    5: Chromaticities(_D65, (0.64, 0.33), (0.29, 0.60), (0.15, 0.06)),
    6: Chromaticities(_D65, (0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    7: Chromaticities(_D65, (0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    8: Chromaticities(_C, (0.681, 0.319), (0.243, 0.692), (0.145, 0.049)),
    9: Chromaticities(_D65, (0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    11: Chromaticities((0.314, 0.351), (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    12: Chromaticities(_D65, (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
"""By code point of ITU-T H.273, `ColourPrimaries`."""
SRGB, PQ, HLG = 13, 16, 18
"""Code points of H.273, `TransferCharacteristics`."""
UNLIKE_SRGB: Final = frozenset({4, 5, 8, PQ, HLG})
"""Those whose curve `transfer` knows to be another one."""


def without_elements(data: bytes) -> bytes:
    """A profile without its multi-process elements (type mpet), which pictures do not need.

    A table of elements may name one element a million times, and Little CMS would read it as often.

    Raises:
        ValueError: the profile is too large, or has too many tags.
    """
    count = int.from_bytes(data[128:132])
    if len(data) > _MAX_BYTES or count > _MAX_TAGS:
        raise ValueError("the profile is too large")
    kept = bytearray(data)
    for i in range(count):
        tag = 132 + 12 * i
        offset = int.from_bytes(data[tag + 4 : tag + 8])
        if data[offset : offset + 4] == b"mpet":
            kept[tag : tag + 4] = b"x%03d" % i  # names of tags must differ
    return bytes(kept)


def transfer(code: int) -> Curve:
    """Samples of the curve from code values to light, both 0 to 1.

    PQ and HLG are tone-mapped to SDR. The curves of BT.709, BT.601 and BT.2020 count as sRGB's,
    as browsers show pictures of these encodings.

    Args:
        code: code point of H.273; an unknown one counts as sRGB's.
    """
    values = np.linspace(0.0, 1.0, _SAMPLES)
    match code:
        case 4:
            return values**2.2
        case 5:
            return values**2.8
        case 8:
            return values
        case 16:
            return _to_sdr(_pq_to_nits(values))
        case 18:
            return _to_sdr(_hlg_to_nits(values))
        case _:
            return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def power(exponent: float) -> Curve:
    """Samples of the curve `light = value ** exponent`.

    Raises:
        ValueError: the exponent is none of a picture's.
    """
    if not 0.1 <= exponent <= 10:
        raise ValueError("the gamma is out of range")
    return np.linspace(0.0, 1.0, _SAMPLES) ** exponent


def profile(colours: Chromaticities, curve: Curve) -> bytes:
    """An RGB profile of three primaries and one curve (ICC.1:2001, matrix and tone curves).

    Args:
        colours: white is adapted to D50 by the Bradford transform.
        curve: samples of the curve from code values to light, both 0 to 1.

    Raises:
        ValueError: the primaries are no triangle, or white lies outside.
    """
    columns = _adapted(colours).T
    samples = np.rint(curve.clip(0, 1) * 65535).astype(">u2").tobytes()
    tone = b"curv\0\0\0\0" + struct.pack(">I", len(curve)) + samples
    text = b"desc\0\0\0\0" + struct.pack(">I", 7) + b"imagen\0" + bytes(79)
    tags = [(b"desc", text), (b"wtpt", _xyz(_D50))]
    tags += [(name, _xyz(column)) for name, column in zip(_COLORANTS, columns, strict=True)]
    table, body, start = b"", b"", 128 + 4 + 12 * (len(tags) + 3)
    for name, value in tags:
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    for name in (b"rTRC", b"gTRC", b"bTRC"):  # one curve serves all three
        table += name + struct.pack(">II", start + len(body), len(tone))
    body += tone
    kind = (b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    head = struct.pack(">I4sI4s4s4s12x4s", start + len(body), *kind).ljust(68, b"\0")
    head = (head + _xyz(_D50)[8:]).ljust(128, b"\0")
    return head + struct.pack(">I", len(tags) + 3) + table + body


_COLORANTS: Final = (b"rXYZ", b"gXYZ", b"bXYZ")


def _adapted(colours: Chromaticities) -> NDArray[np.float64]:
    """The matrix from linear RGB to XYZ under D50; a column for each primary."""
    if any(not (y > 1e-4 and x >= 0 and x + y <= 1.0001) for x, y in colours):
        raise ValueError("a chromaticity is out of range")
    white, *primaries = (np.array([x / y, 1.0, (1 - x - y) / y]) for x, y in colours)
    matrix = np.stack(primaries, axis=1)
    if abs(np.linalg.det(matrix)) < 1e-3:
        raise ValueError("the primaries are no triangle")
    shares = np.linalg.solve(matrix, white)
    if shares.min() <= 0:
        raise ValueError("white lies outside the primaries")
    cones = (_BRADFORD @ np.array(_D50)) / (_BRADFORD @ white)
    return np.linalg.inv(_BRADFORD) @ np.diag(cones) @ _BRADFORD @ (matrix * shares)


def _xyz(values: NDArray[np.float64] | tuple[float, float, float]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(v) * 65536) for v in values))


# --- HDR ---


def _pq_to_nits(values: Curve) -> Curve:
    """Light in cd/m2 of PQ code values (SMPTE ST 2084)."""
    root = values ** (32 / 2523)
    light = np.maximum(root - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * root)
    return 10_000 * light ** (8192 / 1305)


def _nits_to_pq(nits: Curve | float) -> Curve:
    light = np.asarray(nits, dtype=np.float64) / 10_000
    power = light ** (1305 / 8192)
    return ((107 / 128 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def _hlg_to_nits(values: Curve) -> Curve:
    """Light in cd/m2 of HLG code values on a display of 1000 cd/m2 (ITU-R BT.2100), by channel."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(values <= 0.5, values**2 / 3, (np.exp((values - c) / a) + b) / 12)
    return PEAK_NITS * scene**1.2


def _to_sdr(nits: Curve) -> Curve:
    """Light of HDR as light of SDR, whose 1 is diffuse white; by channel.

    The roll-off of ITU-R BT.2390 (section 5.4.1): what is darker than its knee, some 90 cd/m2, is
    kept, and what lies between the knee and `PEAK_NITS` is compressed.
    """
    peak, white = float(_nits_to_pq(PEAK_NITS)), float(_nits_to_pq(WHITE_NITS))
    value = np.minimum(_nits_to_pq(nits) / peak, 1)
    most = white / peak
    knee = 1.5 * most - 0.5
    t = (value - knee) / (1 - knee)
    rolled = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (-2 * t**3 + 3 * t**2) * most
    )
    return _pq_to_nits(np.where(value < knee, value, rolled) * peak) / WHITE_NITS
