"""Cut-outs: edges without the old background, crops, plain pictures, pictures cut out before.

What people report of other services: the old background's colour around hair, a cut-out's alpha
that is replaced, a subject found in an empty picture.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from benchmarks.torture import transparent_files as files
from benchmarks.torture.case import Case, first, limit
from benchmarks.torture.files import file_of
from benchmarks.torture.scenes import BLACK, MAGENTA, WHITE, Colour, Scene, disc, scene
from benchmarks.torture.transparency import all_clear
from deployments.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.torture.case import Judge
    from benchmarks.torture.scenes import Alpha, Pixels

_LIME: Final[Colour] = (0, 255, 0)
_BLUE: Final[Colour] = (30, 60, 200)
_BACKGROUNDS: Final = {
    "magenta": MAGENTA,
    "black": BLACK,
    "white": WHITE,
    "green": _LIME,
    "blue": _BLUE,
}
_MOST_LEFT_PERCENT: Final = 50
"""Of the old background, along the edge."""


@cache
def _scene(background: Colour) -> Scene:
    return scene(background, 384, 512)


def _photo(background: Colour) -> bytes:
    return file_of(Image.fromarray(_scene(background).seen))


def _plain(level: int) -> bytes:
    return file_of(Image.new("L", (300, 300), level))


def _found(truth: Scene, alpha: Alpha) -> str:
    wrong = np.mean((alpha > 127) != (truth.alpha > 127)) * 100
    return limit("the share of pixels on the wrong side of the edge, in percent,", wrong, 5)


def is_gone(background: Colour, rgba: Pixels) -> str:
    """Along the edge, colours are at most half as far from the subject's as the picture's are."""
    truth = _scene(background)
    if wrong := _found(truth, rgba[..., 3]):
        return wrong
    before = truth.edge_error(truth.seen, rgba[..., 3])
    after = truth.edge_error(rgba[..., :3], rgba[..., 3])
    left = after / before * 100
    return limit("what is left of the old background, in percent,", left, _MOST_LEFT_PERCENT)


def nothing_hidden(background: Colour, rgba: Pixels) -> str:
    """Where the cut-out is clear, the file keeps nothing of the old background."""
    clear = rgba[..., :3][rgba[..., 3] == 0].astype(int)
    if not clear.size:
        return "nothing is clear"
    kept = np.mean(np.abs(clear - background).max(axis=1) < 16) * 100
    return limit("the share of clear pixels that keep the background, in percent,", kept, 5)


def lies_on_lime(background: Colour, rgba: Pixels) -> str:
    """The subject keeps its colours, and around it is the new colour alone."""
    truth, rgb = _scene(background), rgba[..., :3].astype(int)
    around = np.abs(rgb[truth.alpha == 0] - _LIME).max(axis=1) > 8
    inside = np.abs(rgb - truth.subject)[truth.alpha == 255].max(axis=1) > 8
    return first(
        limit("pixels around that are not of the new colour, in percent,", around.mean() * 100, 5),
        limit("pixels of the subject that changed, in percent,", inside.mean() * 100, 5),
    )


def tight(rgba: Pixels) -> str:
    """A crop is smaller than the picture, and has the subject at all its sides."""
    alpha = rgba[..., 3]
    if alpha.size >= 384 * 512:
        return "nothing was cropped"
    sides = (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1])
    return limit("sides without the subject", sum(side.max() < 5 for side in sides), 0)


def nothing_found(rgba: Pixels) -> str:
    """The mask is uniform."""
    return limit("the range of the mask, in levels,", float(np.ptp(rgba[..., :3])), 0)


def no_more_opaque(rgba: Pixels) -> str:
    """A picture that was cut out before keeps its clear parts clear, and its edge's colour."""
    alpha, rgb = rgba[..., 3].astype(int), rgba[..., :3]
    visible = rgb[alpha > 25].astype(int)
    red = float(visible[:, 0].max()) if visible.size else 0.0
    return first(
        limit("alpha that was added, in levels,", float((alpha - disc()).max()), 0),
        limit("red in the green disc", red, 40),
    )


def mask_is_grey(rgba: Pixels) -> str:
    """A mask has one channel's worth of information, and the picture's size."""
    rgb = rgba[..., :3].astype(int)
    wrong = "" if rgb.shape[:2] == (384, 512) else "the mask has another size"
    return first(wrong, limit("colour in the mask", float(np.ptp(rgb, axis=2).max()), 0))


def _case(
    name: str, make: Callable[[], bytes], judge: Judge, note: str = "", **fields: str
) -> Case:
    task = Task.BACKGROUND
    return Case(f"{task}, {name}", make(), note=note, task=task, fields=fields, judge=judge)


_ON_MAGENTA: Final = partial(_photo, MAGENTA)
CASES: Final = (
    *(
        _case(f"edge before {name}", partial(_photo, colour), partial(is_gone, colour))
        for name, colour in _BACKGROUNDS.items()
    ),
    _case("nothing hidden", _ON_MAGENTA, partial(nothing_hidden, MAGENTA)),
    _case("WebP", _ON_MAGENTA, partial(is_gone, MAGENTA), output_format="webp"),
    _case("on lime", _ON_MAGENTA, partial(lies_on_lime, MAGENTA), output="color", color="#00ff00"),
    _case("mask", _ON_MAGENTA, mask_is_grey, output="mask"),
    _case("crop", _ON_MAGENTA, tight, crop="subject"),
    *(
        _case(
            f"plain {name}", partial(_plain, level), nothing_found, "no_foreground", output="mask"
        )
        for name, level in {"white": 255, "grey": 128, "black": 0}.items()
    ),
    *(
        _case(f"cut out before, {name} below", partial(files.soft_disc, colour), no_more_opaque)
        for name, colour in {"green": None, "magenta": MAGENTA}.items()
    ),
    _case("invisible", files.invisible, all_clear, "no_foreground"),
    Case(
        "background, transparent JPEG",
        _photo(MAGENTA),
        refused=True,
        task=Task.BACKGROUND,
        fields={"output_format": "jpeg"},
    ),
)
