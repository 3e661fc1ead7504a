"""What a code value should look like in sRGB, by plain arithmetic on published formulas.

Nothing here shares code with the decoder that it judges.
"""

from __future__ import annotations

Colour = tuple[int, int, int]

P3_TO_SRGB = (
    (1.2249, -0.2247, 0.0),
    (-0.0420, 1.0419, 0.0),
    (-0.0197, -0.0786, 1.0979),
)
"""Linear Display P3 to linear sRGB."""
ADOBE_TO_SRGB = ((1.3984, -0.3984, 0.0), (0.0, 1.0, 0.0), (0.0, -0.0429, 1.0429))
"""Linear Adobe RGB (1998) to linear sRGB."""
_WHITE_NITS = 203


def encoded(light: float) -> int:
    """The sRGB level of light from 0 to 1 (IEC 61966-2-1)."""
    light = min(max(light, 0.0), 1.0)
    value = 12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055
    return round(255 * value)


def decoded(level: int) -> float:
    """Light of an sRGB level."""
    value = level / 255
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def by_gamma(level: int, gamma: float) -> Colour:
    """Grey of a level that stands for `light = value ** (1 / gamma)`."""
    return grey(encoded((level / 255) ** (1 / gamma)))


def grey(level: int) -> Colour:
    """Three equal channels."""
    return level, level, level


def by_matrix(light: tuple[float, ...], matrix: tuple[tuple[float, ...], ...]) -> Colour:
    """SRGB levels of linear light in other primaries."""
    red, green, blue = (
        encoded(sum(a * b for a, b in zip(row, light, strict=True))) for row in matrix
    )
    return red, green, blue


def by_pq(level: int) -> Colour:
    """Grey of a dark PQ level (SMPTE ST 2084), which no tone-mapping changes."""
    root = (level / 255) ** (1 / 78.84375)
    nits = 10_000 * (max(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (
        1 / 0.1593017578125
    )
    return grey(encoded(nits / _WHITE_NITS))


def by_hlg(level: int) -> Colour:
    """Grey of a dark HLG level (ITU-R BT.2100) on a display of 1000 cd/m2."""
    return grey(encoded(1000 * ((level / 255) ** 2 / 3) ** 1.2 / _WHITE_NITS))
