"""Full detail or the working size: what a request gets that leaves the choice to the service."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from deployments.notes import Code, Note, note
from deployments.tiling import tiles_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.contract import ImageRequest
    from deployments.estimate import Size
    from deployments.registry import ModelSpec
    from deployments.tiling import Grid

RequestT = TypeVar("RequestT", bound="ImageRequest")


def settled(
    request: RequestT, size: Size, spec: ModelSpec, why_late: Callable[[RequestT], str]
) -> tuple[RequestT, tuple[Note, ...]]:
    """A complete request whose client did not ask for detail: at full detail if that fits.

    Args:
        request: complete.
        size: of its picture.
        spec: of the model.
        why_late: why a request would not end in time; empty if it would.

    Returns:
        The request, at the working size if full detail takes too many tiles or too long, and a note
        that says so.
    """
    grid = tiles_of(request, *size, spec.buckets)
    if grid is None:
        return request, ()
    why = f"more than the {spec.max_tiles} allowed"
    if grid.count <= spec.max_tiles and not (why := why_late(request)):
        return request, ()
    told = f"Full detail would take {grid.count} tiles: {why}. The working size was used."
    reduced = note(Code.DETAIL_REDUCED, told)
    return request.model_copy(update={"detail": "working"}), (reduced,)


def tiled_note(grid: Grid, tiles: int) -> Note:
    """The note of a picture that was worked on in tiles.

    Args:
        grid: of all tiles.
        tiles: how many of them a mask left.
    """
    width, height = grid.tile
    which = f"{tiles}" if tiles == grid.count else f"the {tiles} of {grid.count}"
    where = "" if tiles == grid.count else " that the mask reaches"
    told = f"The model worked on every pixel, in {which} tiles of {width} x {height} px{where}."
    return note(Code.TILED, told)
