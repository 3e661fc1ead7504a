"""Whether a picture shows what its prompt says, by plain image processing.

The judge reads a prompt such as "a red star to the left of a blue ring on a green background",
finds what stands out from the picture's margin, and compares colour (hue, saturation, value),
shape (overlap with an ideal outline of the same width and height) and place (middles). It knows
nothing of the model, and shares no code with its training.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage
from skimage import color, draw, transform

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from starter_models.training.data import Picture

    Mask = NDArray[np.bool_]

PROMPTS = Path(__file__).with_name("judging") / "prompts.txt"
# What stands out: distance from the margin in CIELAB, and share of the picture.
_DISTANCE = 12.0
_SMALLEST = 0.006
_MARGIN = 0.02
_GRID = 96
_LEAST_OVERLAP = 0.75
# Upper ends of the hues in degrees; red goes on from 346.
_HUES = (
    (14, "red"), (43, "orange"), (68, "yellow"), (170, "green"),
    (247, "blue"), (296, "purple"), (346, "pink"), (360, "red"),
)  # fmt: skip
_PLACES = {
    "in the centre": (0, 0),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
_RELATIONS = {
    "to the left of": (-1, 0),
    "left of": (-1, 0),
    "to the right of": (1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "over": (0, -1),
    "below": (0, 1),
    "under": (0, 1),
}
_THING = r"an? (?:small |large )?(\w+) (\w+)"
_PROMPT = re.compile(
    rf"{_THING}(?: ({'|'.join(_PLACES)}))?(?: ({'|'.join(_RELATIONS)}) {_THING})?"
    r"(?: on an? (\w+) background)?"
)


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for.

    Attributes:
        things: colour and shape of each, in the prompt's order.
        place: of a single thing, -1 to 1 to the right and downwards; None if it may be anywhere.
        relation: where the first of two things is from the second.
        background: its colour, or "" for any.
    """

    things: tuple[tuple[str, str], ...]
    place: tuple[int, int] | None
    relation: tuple[int, int] | None
    background: str


@dataclass(frozen=True)
class Found:
    """One thing in a picture; its middle in shares of width and height."""

    colour: str
    shape: str
    x: float
    y: float


@dataclass(frozen=True)
class Verdict:
    """What is right; a picture is right if everything is."""

    count: bool
    colours: bool
    shapes: bool
    places: bool
    background: bool

    @property
    def right(self) -> bool:
        return all((self.count, self.colours, self.shapes, self.places, self.background))


def read(prompt: str) -> Asked:
    """Raises: ValueError: the prompt is not of the kind that this judge reads."""
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"The judge cannot read this prompt: {prompt!r}.")
    colour, shape, place, relation, other_colour, other_shape, background = match.groups()
    things = ((colour, shape), (other_colour, other_shape)) if relation else ((colour, shape),)
    return Asked(things, _PLACES.get(place), _RELATIONS.get(relation), background or "")


def judge(prompt: str, picture: Picture) -> Verdict:
    """Whether the picture, `H x W x 3` in [0, 1], shows what the prompt asks for."""
    asked, found = read(prompt), find(picture)
    background = not asked.background or asked.background == _named(_margin_colour(picture), 0.05)
    if len(found) != len(asked.things):
        return Verdict(False, False, False, False, background)
    ordered = _in_order(asked, found)
    return Verdict(
        count=True,
        colours=[one.colour for one in ordered] == [colour for colour, _ in asked.things],
        shapes=[one.shape for one in ordered] == [shape for _, shape in asked.things],
        places=_are_placed(asked, ordered),
        background=background,
    )


def find(picture: Picture) -> list[Found]:
    """Everything that stands out from the margin and is not tiny."""
    height, width = picture.shape[:2]
    masks = _masks(picture)
    found: list[Found] = []
    for mask in masks:
        inner = ndimage.binary_erosion(mask, iterations=3)
        rgb = np.median(picture[inner if inner.any() else mask], axis=0)
        y, x = ndimage.center_of_mass(ndimage.binary_fill_holes(mask))
        found.append(Found(_named(rgb, 0.12), _shape(mask), x / width, y / height))
    return found


def _masks(picture: Picture) -> list[Mask]:
    lab = color.rgb2lab(picture)
    side = max(round(picture.shape[1] * _MARGIN), 1)
    margin = np.concatenate([lab[:, :side], lab[:, -side:]], axis=1)
    behind = np.median(margin, axis=1)[:, None]
    # Shadows differ in lightness alone, and little: it counts for less than hue does.
    apart = (lab - behind) * np.array([0.6, 1.0, 1.0])
    stands_out = np.linalg.norm(apart, axis=2) > _DISTANCE
    stands_out = ndimage.binary_opening(stands_out, iterations=2)
    labels, count = ndimage.label(stands_out)
    masks = [labels == k for k in range(1, count + 1)]
    return [mask for mask in masks if mask.mean() >= _SMALLEST]


def _margin_colour(picture: Picture) -> NDArray[np.float32]:
    side = max(round(picture.shape[1] * _MARGIN), 1)
    return np.median(picture[:, :side].reshape(-1, 3), axis=0)


def _named(rgb: NDArray[np.float32], least_saturation: float) -> str:
    hue, saturation, value = color.rgb2hsv(rgb[None, None])[0, 0]
    if value < 0.36 and saturation < 0.4:
        return "black"
    if saturation < least_saturation:
        return "white" if value > 0.85 else "grey"
    return next(name for end, name in _HUES if hue * 360 <= end)


def _shape(mask: Mask) -> str:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    seen = transform.resize(box.astype(float), (_GRID, _GRID)) > 0.5
    overlaps = {
        name: float((seen & ideal).sum() / (seen | ideal).sum()) for name, ideal in _IDEALS.items()
    }
    best = max(overlaps, key=lambda name: overlaps[name])
    return best if overlaps[best] >= _LEAST_OVERLAP else "unknown"


def _in_order(asked: Asked, found: list[Found]) -> list[Found]:
    """The found things as the prompt names them: by their place if there are two."""
    if asked.relation is None:
        return found
    x, y = asked.relation
    return sorted(found, key=lambda one: -(one.x * x + one.y * y))


def _are_placed(asked: Asked, found: list[Found]) -> bool:
    if asked.relation is not None:
        first, second = found
        along = (first.x - second.x, first.y - second.y)
        x, y = asked.relation
        return along[0] * x + along[1] * y > 0.2 and abs(along[0] * y) + abs(along[1] * x) < 0.15
    if asked.place is None:
        return True
    return all(
        abs(at - 0.5) < 0.1 if not side else (at - 0.5) * side > 0.05
        for at, side in zip((found[0].x, found[0].y), asked.place, strict=True)
    )


def _polygon(x: list[float], y: list[float]) -> Mask:
    """The polygon, stretched to fill the grid."""
    columns, rows = (np.interp(v, (min(v), max(v)), (0, _GRID - 1)) for v in (x, y))
    return draw.polygon2mask((_GRID, _GRID), np.stack([rows, columns], 1))


def _ideals() -> dict[str, Mask]:
    middle = (_GRID - 1) / 2
    far = np.hypot(*(np.mgrid[:_GRID, :_GRID] - middle)) / (_GRID / 2)
    turns = np.linspace(0, 2 * np.pi, 11)[:-1]
    points = np.where(np.arange(10) % 2, 0.44, 1.0)
    heart = np.linspace(0, 2 * np.pi, 100)
    return {
        "circle": far <= 1,
        "ring": (far <= 1) & (far >= 0.55),
        "square": np.ones((_GRID, _GRID), bool),
        "triangle": _polygon([0.5, 1, 0], [0, 1, 1]),
        "diamond": _polygon([0.5, 1, 0.5, 0], [0, 0.5, 1, 0.5]),
        "star": _polygon(list(points * np.sin(turns)), list(-points * np.cos(turns))),
        "heart": _polygon(
            list(np.sin(heart) ** 3),
            list(
                -13 * np.cos(heart)
                + 5 * np.cos(2 * heart)
                + 2 * np.cos(3 * heart)
                + np.cos(4 * heart)
            ),
        ),
    }


_IDEALS = _ideals()
