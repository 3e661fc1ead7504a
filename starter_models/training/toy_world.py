"""The world that the text-to-image starter model learns: scenes, their prompts and their pictures.

Things are one or two flat coloured shapes and where they are; landscapes have a time of day;
textures have two colours. A tenth of the scenes with things is kept out of training, whatever
words describe them: `make quality` asks for those.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

COLOURS = {
    "red": (216, 46, 46),
    "orange": (243, 139, 30),
    "yellow": (250, 212, 50),
    "green": (52, 166, 84),
    "blue": (43, 104, 222),
    "purple": (130, 64, 186),
    "pink": (241, 128, 180),
    "black": (36, 36, 42),
    "white": (252, 252, 252),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "diamond")
SIZES = ("", "small", "large")
PLACES = {
    "": (0.0, 0.0),
    "in the centre": (0.0, 0.0),
    "on the left": (-1.0, 0.0),
    "on the right": (1.0, 0.0),
    "at the top": (0.0, -1.0),
    "at the bottom": (0.0, 1.0),
}
RELATIONS = {
    "to the left of": (-1, 0),
    "left of": (-1, 0),
    "to the right of": (1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "over": (0, -1),
    "below": (0, 1),
    "under": (0, 1),
}
LANDS = ("mountains", "hills", "the sea", "a desert", "a forest")
TIMES = ("at dawn", "at noon", "at sunset", "at night")
TEXTURES = ("horizontal stripes", "vertical stripes", "diagonal stripes", "checks", "dots")
EXTRAS = {"hills": ("a house",), "the sea": ("a boat",)}


@dataclass(frozen=True)
class Thing:
    """One shape.

    Attributes:
        cell: where its middle is: -1, 0 or 1 to the right, and downwards.
        scale: 0 small, 1 usual, 2 large.
    """

    shape: str
    colour: str
    cell: tuple[float, float] = (0.0, 0.0)
    scale: int = 1


@dataclass(frozen=True)
class Scene:
    """What a picture shows and a prompt for it.

    Attributes:
        kind: "things", "land" or "texture".
        background: a colour of `COLOURS`, or "" for any pale one.
        land, time, extra: of a landscape.
        texture, colours: of a texture.
        is_moved: whether its one thing is not in the middle although the prompt names no place.
    """

    kind: str
    prompt: str
    things: tuple[Thing, ...] = field(default=())
    background: str = ""
    land: str = ""
    time: str = ""
    extra: str = ""
    texture: str = ""
    colours: tuple[str, ...] = ()
    is_moved: bool = False

    @property
    def told(self) -> tuple[Thing, ...]:
        """The things where the prompt has them: in the middle if it names no place."""
        return tuple(replace(t, cell=PLACES[""]) if self.is_moved else t for t in self.things)

    @property
    def is_kept_out(self) -> bool:
        """Whether training must not see it: a tenth of the scenes with things."""
        return any(map(self._is_in_tenth, (self.things, self.told)))

    def _is_in_tenth(self, things: tuple[Thing, ...]) -> bool:
        facts = sorted((t.shape, t.colour, t.cell) for t in things)
        return bool(facts) and zlib.crc32(repr((facts, self.background)).encode()) % 10 == 0


def draw_scene(rng: np.random.Generator) -> Scene:
    """A scene of any kind; four in five show things."""
    kind = rng.choice(["one", "two", "land", "texture"], p=[0.38, 0.44, 0.12, 0.06])
    return {"one": one_thing, "two": two_things, "land": landscape, "texture": texture}[kind](rng)


def training_scene(rng: np.random.Generator) -> Scene:
    """A scene that is not kept out; now and then with its thing moved, if the prompt allows it."""
    scene = _perhaps_moved(draw_scene(rng), rng)
    while scene.is_kept_out:
        scene = _perhaps_moved(draw_scene(rng), rng)
    return scene


def _perhaps_moved(scene: Scene, rng: np.random.Generator) -> Scene:
    if len(scene.things) != 1 or any(place in scene.prompt for place in list(PLACES)[1:]):
        return scene
    [thing] = scene.things
    if thing.scale == 2 or rng.random() < 0.6:
        return scene
    cell = PLACES[str(rng.choice(list(PLACES)[2:]))]
    return replace(scene, things=(replace(thing, cell=cell),), is_moved=True)


def kept_out_scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    """Scenes with one thing and with two, in turn, that training never sees."""
    found: list[Scene] = []
    while len(found) < count:
        scene = (one_thing, two_things)[len(found) % 2](rng)
        if scene.is_kept_out and scene.prompt not in {one.prompt for one in found}:
            found.append(scene)
    return found


def one_thing(rng: np.random.Generator) -> Scene:
    """A thing, its colour, and now and then its size, its place and the background."""
    shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
    place = str(rng.choice(list(PLACES), p=[0.4, 0.08, 0.13, 0.13, 0.13, 0.13]))
    # A large thing fills the picture: it has no place but the middle.
    shares = [0.75, 0.25, 0.0] if place else [0.5, 0.2, 0.3]
    size = str(rng.choice(SIZES, p=shares))
    background = _background(rng, colour)
    scale = {"": 1, "small": 0, "large": 2}[size]
    words = [_article(size or colour), size, colour, shape, place]
    prompt = " ".join(word for word in words if word) + _on(background)
    thing = Thing(shape, colour, PLACES[place], scale)
    return Scene("things", prompt, (thing,), background)


def two_things(rng: np.random.Generator) -> Scene:
    """Two things beside each other or one above the other."""
    shapes = [str(rng.choice(SHAPES)) for _ in range(2)]
    colours = [str(c) for c in rng.choice(list(COLOURS), 2, replace=False)]
    words = str(rng.choice(list(RELATIONS)))
    x, y = RELATIONS[words]
    background = _background(rng, *colours)
    first, second = (f"{_article(c)} {c} {s}" for c, s in zip(colours, shapes, strict=True))
    things = (Thing(shapes[0], colours[0], (x, y), 3), Thing(shapes[1], colours[1], (-x, -y), 3))
    return Scene("things", f"{first} {words} {second}{_on(background)}", things, background)


def landscape(rng: np.random.Generator) -> Scene:
    """A kind of land at a time of day."""
    land, time = str(rng.choice(LANDS)), str(rng.choice(TIMES))
    choices = ("", "", *EXTRAS.get(land, ()))
    extra = str(rng.choice(choices))
    prompt = f"{land} with {extra} {time}" if extra else f"{land} {time}"
    return Scene("land", prompt, land=land, time=time, extra=extra)


def texture(rng: np.random.Generator) -> Scene:
    """Stripes, checks or dots of two colours."""
    kind = str(rng.choice(TEXTURES))
    first, second = (str(c) for c in rng.choice(list(COLOURS), 2, replace=False))
    prompt = f"{first} and {second} {kind}"
    if kind == "dots":
        prompt = f"{first} dots on {second}"
    return Scene("texture", prompt, texture=kind, colours=(first, second))


def _background(rng: np.random.Generator, *taken: str) -> str:
    if rng.random() < 0.6:
        return ""
    return str(rng.choice([colour for colour in COLOURS if colour not in taken]))


def _on(background: str) -> str:
    return f" on {_article(background)} {background} background" if background else ""


def _article(word: str) -> str:
    return "an" if word[:1] in "aeiou" else "a"
