"""Pictures of the scenes in `toy_world`: 256 x 256 x 3, uint8, sRGB, drawn at twice the size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from starter_models.training.toy_world import COLOURS, Scene, Thing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Colour = tuple[int, ...]
    Points = list[tuple[float, float]]

SIZE_PX = 256
_CANVAS = 2 * SIZE_PX
# Radii and distances in pixels of the finished picture.
_RADII = {0: (36,), 1: (56, 64), 2: (84,), 3: (44,)}
_APART = {0: 64, 1: 48, 2: 24, 3: 62}
_PALE = {
    "red": (247, 196, 192),
    "orange": (252, 217, 178),
    "yellow": (253, 240, 182),
    "green": (192, 229, 200),
    "blue": (186, 210, 247),
    "purple": (218, 199, 238),
    "pink": (250, 218, 233),
    "black": (70, 72, 80),
    "white": (244, 243, 240),
}
_ANY = ((233, 226, 214), (214, 224, 232), (222, 232, 220), (232, 222, 232))
# Sky above, sky at the horizon, sun or moon, its height, and the light on the land.
_LIGHTS = {
    "at dawn": ((148, 190, 232), (255, 214, 190), (255, 240, 206), 0.42, 0.92),
    "at noon": ((74, 156, 232), (190, 226, 250), (255, 236, 130), 0.16, 1.0),
    "at sunset": ((92, 62, 140), (252, 140, 72), (255, 206, 92), 0.46, 0.72),
    "at night": ((12, 18, 52), (38, 54, 104), (244, 240, 218), 0.18, 0.34),
}


def draw(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A picture of the scene; what its prompt leaves open is drawn from `rng`."""
    painters = {"things": _things, "land": _land, "texture": _texture}
    image = painters[scene.kind](scene, rng)
    return np.asarray(image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX))


def _things(scene: Scene, rng: np.random.Generator) -> Image.Image:
    pale = _PALE[scene.background] if scene.background else _ANY[rng.integers(len(_ANY))]
    if not scene.background and any(thing.colour == "white" for thing in scene.things):
        pale = (150, 168, 186)
    image = _fade(_times(pale, 1.03), _times(pale, 0.94))
    for thing in scene.things:
        _put(image, thing, rng)
    return image


def _put(image: Image.Image, thing: Thing, rng: np.random.Generator) -> None:
    radius = rng.choice(_RADII[thing.scale]) * 2
    x, y = (_CANVAS / 2 + 2 * _APART[thing.scale] * c for c in thing.cell)
    mask = _outline(thing.shape, x, y, radius)
    shadow = mask.filter(ImageFilter.GaussianBlur(10)).point(lambda v: v * 0.28)
    image.paste((30, 34, 50), (4, 12), shadow)
    base = COLOURS[thing.colour]
    image.paste(_fade(_lift(base, 0.1), _times(base, 0.94)), (0, 0), mask)


def _outline(shape: str, x: float, y: float, radius: float) -> Image.Image:
    mask = Image.new("L", (_CANVAS, _CANVAS), 0)
    pen = ImageDraw.Draw(mask)
    if shape in {"circle", "ring"}:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if shape == "ring":
            hole = radius * 0.55
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    else:
        pen.polygon([(x + radius * a, y + radius * b) for a, b in _CORNERS[shape]], fill=255)
    return mask


def _star() -> Points:
    turns = [math.pi * k / 5 for k in range(10)]
    reach = [1.12, 0.5] * 5
    return [(r * math.sin(t), -r * math.cos(t) + 0.08) for r, t in zip(reach, turns, strict=True)]


def _heart() -> Points:
    turns = np.linspace(0, 2 * math.pi, 80)
    x = 16 * np.sin(turns) ** 3
    y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
    return [(float(a) / 16, -float(b + 2.5) / 15) for a, b in zip(x, y, strict=True)]


_CORNERS: dict[str, Points] = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -0.98), (1.06, 0.84), (-1.06, 0.84)],
    "diamond": [(0, -1.12), (0.86, 0), (0, 1.12), (-0.86, 0)],
    "star": _star(),
    "heart": _heart(),
}


def _land(scene: Scene, rng: np.random.Generator) -> Image.Image:
    above, horizon, sun, height, light = _LIGHTS[scene.time]
    image = _fade(above, horizon, until=0.62)
    pen = ImageDraw.Draw(image)
    if scene.time == "at night":
        for x, y in rng.uniform(0, 1, (26, 2)):
            _disc(pen, x * _CANVAS, y * 0.45 * _CANVAS, 2.4, (236, 236, 246))
    middle = rng.choice([0.3, 0.7]) * _CANVAS
    _disc(pen, middle, height * _CANVAS, 44 if height > 0.3 else 34, sun)
    painter = {"mountains": _mountains, "hills": _hills, "the sea": _sea,
               "a desert": _desert, "a forest": _forest}[scene.land]  # fmt: skip
    painter(pen, rng, light, sun)
    if scene.extra == "a house":
        _house(pen, light)
    if scene.extra == "a boat":
        _boat(pen, light)
    return image


def _mountains(pen: ImageDraw.ImageDraw, rng: np.random.Generator, light: float, _: Colour) -> None:
    peaks = ((0.2, 0.46, 0.36), (0.8, 0.42, 0.4), (0.5, 0.3, 0.42))
    for k, (x, top, half) in enumerate(peaks):
        x, top = x + rng.uniform(-0.04, 0.04), top + rng.uniform(-0.03, 0.03)
        left, right, bottom = x - half, x + half, 0.86
        shade = _times((104, 116, 148), light * (0.84 + 0.12 * k))
        _shape(pen, [(x, top), (right, bottom), (left, bottom)], shade)
        _shape(pen, [(x, top), (right, bottom), (x + 0.06, bottom)], _times(shade, 0.84))
        snow = 0.24
        edge = top + snow * (bottom - top)
        tip = [(x, top), (x + snow * half, edge), (x + 0.02, edge - 0.03), (x - snow * half, edge)]
        _shape(pen, tip, _times((250, 250, 255), max(light, 0.5)))
    _shape(pen, [(0, 0.8), (1, 0.8), (1, 1), (0, 1)], _times((88, 140, 84), light))


def _hills(pen: ImageDraw.ImageDraw, rng: np.random.Generator, light: float, _: Colour) -> None:
    for k, (level, colour) in enumerate(
        [(0.58, (150, 192, 120)), (0.68, (112, 172, 96)), (0.8, (74, 140, 78))]
    ):
        shift = rng.uniform(-0.4, 0.4) + 2.1 * k
        _wave(pen, level, 0.05, shift, _times(colour, light))


def _desert(pen: ImageDraw.ImageDraw, rng: np.random.Generator, light: float, _: Colour) -> None:
    for k, (level, colour) in enumerate(
        [(0.6, (238, 204, 140)), (0.7, (228, 184, 112)), (0.83, (206, 154, 84))]
    ):
        _wave(pen, level, 0.035, rng.uniform(-0.4, 0.4) + 1.7 * k, _times(colour, light))
    x = 0.22 * _CANVAS
    green = _times((64, 130, 84), light)
    for left, top, right, bottom in ((-12, 250, 12, 400), (-44, 300, -26, 344), (26, 280, 44, 330)):
        pen.rounded_rectangle((x + left, top, x + right, bottom), 10, fill=green)
    for left, top, right, bottom in ((-44, 330, 0, 348), (0, 314, 44, 332)):
        pen.rounded_rectangle((x + left, top, x + right, bottom), 8, fill=green)


def _sea(pen: ImageDraw.ImageDraw, rng: np.random.Generator, light: float, sun: Colour) -> None:
    top = 0.56
    for k in range(12):
        level = top + k * (1 - top) / 12
        colour = _times((44 + 3 * k, 132 - 4 * k, 190 - 6 * k), light)
        _shape(pen, [(0, level), (1, level), (1, 1), (0, 1)], colour)
    glint = tuple(
        round((a + b) / 2) for a, b in zip(sun, _times((60, 130, 180), light), strict=True)
    )
    for k in range(5):
        y = (top + 0.05 + 0.07 * k) * _CANVAS
        half = (30 + 14 * k) * rng.uniform(0.9, 1.1)
        pen.rounded_rectangle((_CANVAS / 2 - half, y, _CANVAS / 2 + half, y + 7), 3, fill=glint)


def _forest(pen: ImageDraw.ImageDraw, rng: np.random.Generator, light: float, _: Colour) -> None:
    _shape(pen, [(0, 0.74), (1, 0.74), (1, 1), (0, 1)], _times((86, 136, 74), light))
    rows = (0.74, 7, 0.3, (78, 142, 96)), (0.9, 6, 0.36, (46, 112, 70))
    for row, (foot, count, tall, colour) in enumerate(rows):
        for k in range(count):
            x = (k + 0.5 - 0.4 * row) / (count - 0.8 * row)
            high = tall * rng.uniform(0.92, 1.08)
            _fir(pen, x, foot, high, _times(colour, light), _times((104, 74, 52), light))


def _fir(
    pen: ImageDraw.ImageDraw, x: float, foot: float, tall: float, leaf: Colour, wood: Colour
) -> None:
    _shape(pen, [(x - 0.012, foot - 0.05), (x + 0.012, foot - 0.05), (x + 0.012, foot),
                 (x - 0.012, foot)], wood)  # fmt: skip
    for k in range(3):
        top = foot - tall + k * tall * 0.24
        half = tall * (0.16 + 0.07 * k)
        low = top + tall * 0.44
        _shape(pen, [(x, top), (x + half, low), (x - half, low)], leaf)


def _house(pen: ImageDraw.ImageDraw, light: float) -> None:
    wall, roof, door = (246, 238, 222), (196, 70, 56), (124, 82, 58)
    _shape(pen, [(0.56, 0.6), (0.78, 0.6), (0.78, 0.78), (0.56, 0.78)], _times(wall, light))
    _shape(pen, [(0.53, 0.61), (0.67, 0.48), (0.81, 0.61)], _times(roof, light))
    _shape(pen, [(0.64, 0.68), (0.7, 0.68), (0.7, 0.78), (0.64, 0.78)], _times(door, light))
    window = (255, 214, 110) if light < 0.8 else (126, 178, 214)
    _shape(pen, [(0.585, 0.655), (0.625, 0.655), (0.625, 0.7), (0.585, 0.7)], window)
    _shape(pen, [(0.715, 0.655), (0.755, 0.655), (0.755, 0.7), (0.715, 0.7)], window)


def _boat(pen: ImageDraw.ImageDraw, light: float) -> None:
    light = max(light, 0.5)
    _shape(pen, [(0.3, 0.72), (0.66, 0.72), (0.6, 0.8), (0.36, 0.8)], _times((170, 64, 52), light))
    _shape(pen, [(0.475, 0.38), (0.485, 0.38), (0.485, 0.72), (0.475, 0.72)],
           _times((96, 70, 52), light))  # fmt: skip
    _shape(pen, [(0.495, 0.4), (0.65, 0.69), (0.495, 0.69)], _times((252, 250, 244), light))
    _shape(pen, [(0.465, 0.46), (0.465, 0.69), (0.34, 0.69)], _times((238, 230, 214), light))


def _texture(scene: Scene, _: np.random.Generator) -> Image.Image:
    first, second = (np.array(COLOURS[colour], np.uint8) for colour in scene.colours)
    y, x = np.mgrid[0:_CANVAS, 0:_CANVAS]
    cell = _CANVAS // 8
    if scene.texture == "dots":
        far = np.hypot(x % (2 * cell) - cell, y % (2 * cell) - cell)
        inside = far < 0.58 * cell
    elif scene.texture == "checks":
        inside = (x // cell + y // cell) % 2 == 0
    else:
        way = {"horizontal stripes": y, "vertical stripes": x, "diagonal stripes": x + y}
        inside = way[scene.texture] // cell % 2 == 0
    return Image.fromarray(np.where(inside[..., None], first, second))


def _fade(top: Colour, bottom: Colour, until: float = 1.0) -> Image.Image:
    share = np.clip(np.linspace(0, 1 / until, _CANVAS), 0, 1)[:, None]
    rows = np.array(top) * (1 - share) + np.array(bottom) * share
    rows = np.clip(rows, 0, 255).astype(np.uint8)
    return Image.fromarray(np.repeat(rows[:, None], _CANVAS, axis=1))


def _wave(
    pen: ImageDraw.ImageDraw, level: float, high: float, shift: float, colour: Colour
) -> None:
    xs = np.linspace(0, 1, 65)
    edge = [(float(x), level + high * math.sin(5 * x + shift)) for x in xs]
    _shape(pen, [*edge, (1, 1), (0, 1)], colour)


def _shape(pen: ImageDraw.ImageDraw, points: Points, colour: Colour) -> None:
    pen.polygon([(x * _CANVAS, y * _CANVAS) for x, y in points], fill=colour)


def _disc(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: Colour) -> None:
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _times(colour: Colour, factor: float) -> Colour:
    return tuple(min(round(value * factor), 255) for value in colour)


def _lift(colour: Colour, share: float) -> Colour:
    return tuple(round(value + (255 - value) * share) for value in colour)
