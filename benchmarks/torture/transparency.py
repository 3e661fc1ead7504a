"""Transparent pictures: edges without fringes, alpha without halos, erased parts that stay erased.

What people report of other services: white or black fringes around logos and cut-outs, alpha that
is lost or counted twice, rings around enlarged edges, and colours below clear pixels that return.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from benchmarks.torture import transparent_files as files
from benchmarks.torture.case import Case, first, limit
from benchmarks.torture.scenes import BLACK, MAGENTA, WHITE, disc
from deployments.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.torture.case import Judge
    from benchmarks.torture.scenes import Alpha, Pixels

_FRINGE: Final = 12
"""Levels of a fringe that people see."""
_MODELS: Final = (Task.UPSCALE, Task.ENHANCE, Task.COMIC, Task.AGED)
_SOFT: Final = (
    ("WebP", partial(files.soft_disc, kind="WEBP", lossless=True, exact=True), ""),
    ("TIFF", partial(files.soft_disc, kind="TIFF"), ""),
    ("premultiplied TIFF", files.premultiplied_tiff, ""),
    ("PNG of 16 bits", files.deep_png, "depth_reduced"),
    ("grey PNG", files.grey_png, "grey_kept"),
)
_HARD: Final = (
    ("palette PNG", partial(files.palette_square, "PNG")),
    ("GIF", partial(files.palette_square, "GIF")),
    ("PNG with a clear colour", files.keyed_square),
)


def no_fringe(rgba: Pixels) -> str:
    """Laid on black, the edge shows the picture's own colour, as much as its alpha says."""
    rgb, share = rgba[..., :3].astype(float), rgba[..., 3:] / 255
    opaque, edge = share[..., 0] == 1, (share[..., 0] > 0.2) & (share[..., 0] < 0.8)
    if not opaque.any() or not edge.any():
        return "the alpha has no soft edge any more"
    own = rgb[opaque].mean(0)
    apart = np.abs((rgb * share)[edge].mean(0) - own * share[edge].mean()).max()
    return limit("a fringe on black, in levels,", float(apart), _FRINGE)


def alpha_of(expected: Alpha, rgba: Pixels) -> str:
    """The alpha is the picture's own, to the last bit."""
    if rgba.shape[:2] != expected.shape:
        return f"the size is {rgba.shape[1::-1]} instead of {expected.shape[::-1]}"
    apart = np.abs(rgba[..., 3].astype(int) - expected).max()
    return limit("the largest change of alpha, in levels,", float(apart), 0)


def no_ring(rgba: Pixels) -> str:
    """A hard square, enlarged four times, is opaque well inside and clear well outside."""
    alpha, reach = rgba[..., 3], 8  # two pixels of the input
    start, end = alpha.shape[0] // 4, alpha.shape[0] - alpha.shape[0] // 4
    inside = alpha[start + reach : end - reach, start + reach : end - reach]
    outside = alpha.copy()
    outside[start - reach : end + reach, start - reach : end + reach] = 0
    return first(
        limit("a see-through ring inside the edge, in levels,", 255.0 - inside.min(), 0),
        limit("a ring outside the edge, in levels,", float(outside.max()), 0),
        limit("the change of the area, in percent,", abs(alpha.mean() / 255 * 4 - 1) * 100, 3),
    )


def enlarged(scale: int, rgba: Pixels) -> str:
    """A disc of 64 px, enlarged as often as asked, without a fringe."""
    side = len(rgba)
    wrong = "" if side == 64 * scale else f"the side is {side} px instead of {64 * scale}"
    return first(wrong, no_fringe(rgba))


def clean_square(rgba: Pixels) -> str:
    """As `no_ring`, and nothing of the magenta that the file has around the green square."""
    red = rgba[..., 0][rgba[..., 3] > 25]
    return first(no_ring(rgba), limit("red in the green square", float(red.max()), 40))


def stripes_are_gone(rgba: Pixels) -> str:
    """Where the file hides stripes below alpha 0, the result is smooth."""
    top = rgba[: rgba.shape[0] // 8]
    contrast = top[..., :3].astype(float).std(axis=1).max()
    return first(
        limit("the alpha of an erased part", float(top[..., 3].max()), 0),
        limit("the contrast of what was erased, in levels,", float(contrast), 10),
    )


def on_white(rgba: Pixels) -> str:
    """A disc in a file without alpha lies on white."""
    rgb, side = rgba[..., :3].astype(float), len(rgba)
    middle = slice(side // 2 - side // 8, side // 2 + side // 8)
    own = rgb[middle, middle].mean((0, 1))
    share = np.asarray(Image.fromarray(disc()).resize((side, side)), float)[..., None] / 255
    apart = np.abs(rgb - (own * share + 255 * (1 - share))).mean()
    return limit("the mean distance from the picture on white, in levels,", float(apart), 6)


def all_clear(rgba: Pixels) -> str:
    """An invisible picture stays invisible."""
    return limit("the largest alpha", float(rgba[..., 3].max()), 0)


def all_opaque(rgba: Pixels) -> str:
    """A picture with an alpha of 255 throughout stays opaque."""
    return limit("the largest transparency, in levels,", 255.0 - rgba[..., 3].min(), 0)


def _case(
    name: str, task: Task, make: Callable[[], bytes], judge: Judge, note: str = "", **fields: str
) -> Case:
    seed = {} if task == Task.UPSCALE else {"seed": "7"}
    return Case(
        f"{task}, {name}", make(), note=note, task=task, fields={**seed, **fields}, judge=judge
    )


CASES: Final = (
    *(_case("soft edge", task, files.soft_disc, no_fringe) for task in _MODELS),
    *(
        _case(f"{name} below clear pixels", task, partial(files.soft_disc, colour), no_fringe)
        for name, colour in {"black": BLACK, "white": WHITE, "magenta": MAGENTA}.items()
        for task in (Task.UPSCALE, Task.COMIC)
    ),
    *(
        _case(f"soft edge of a {kind}", Task.ENHANCE, make, no_fringe, note)
        for kind, make, note in _SOFT
    ),
    *(_case(f"square of a {kind}", Task.UPSCALE, make, clean_square) for kind, make in _HARD),
    *(
        _case("alpha is the picture's", task, files.soft_disc, partial(alpha_of, disc()))
        for task in _MODELS[1:]
    ),
    _case("hard edge", Task.UPSCALE, files.hard_square, no_ring),
    *(_case("erased stripes", task, files.erased_stripes, stripes_are_gone) for task in _MODELS),
    *(
        _case(
            "JPEG of a soft edge",
            task,
            files.soft_disc,
            on_white,
            "alpha_dropped",
            output_format="jpeg",
        )
        for task in (Task.UPSCALE, Task.ENHANCE)
    ),
    _case("WebP of a soft edge", Task.ENHANCE, files.soft_disc, no_fringe, output_format="webp"),
    *(
        _case(
            f"{scale} times",
            Task.UPSCALE,
            files.soft_disc,
            partial(enlarged, scale),
            scale=str(scale),
        )
        for scale in (2, 3)
    ),
    _case("invisible", Task.ENHANCE, files.invisible, all_clear),
    _case("invisible, 1 x 1", Task.UPSCALE, partial(files.invisible, 1, 1), all_clear),
    _case("opaque alpha channel", Task.ENHANCE, files.opaque, all_opaque),
    _case(
        "turned by EXIF", Task.ENHANCE, files.half_disc_turned, partial(alpha_of, files.half_disc())
    ),
)
