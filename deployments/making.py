"""A result in the making: one row of the engine, or a row for each tile of a large picture."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from deployments.engine.row import Place, Row, RowInput, Whole
from deployments.tiling import Blend

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from deployments.engine.pipeline import AnyPipeline
    from deployments.engine.row import Pixels
    from deployments.tiling import Grid

    Put = Callable[[Row], Awaitable[None]]
    OnPool = Callable[..., Awaitable[Any]]

_PREVIEW_PX = 384


class Making:
    """One result on its way through the engine.

    Args:
        one: what the engine is given of it; `pixels` and `mask` are of the whole picture if there
            are tiles. Its `whole` is of the request, where that has several results.
        grid: its tiles; None for one row.
        steps: passes of a row, as far as can be told before; 0 if nothing can.

    Attributes:
        rows: for the engine. A tile of which nothing may change has none.
    """

    def __init__(self, one: RowInput[Any], grid: Grid | None = None, steps: int = 0) -> None:
        self._whole = one.whole or Whole(time.monotonic())
        self.input = replace(one, whole=self._whole)
        self._grid = grid
        self._blend: Blend | None = None
        if grid is None:
            self.rows = [Row(self.input)]
        else:
            self._tiles = [(corner, self._tile(grid, *corner)) for corner in grid.corners]
            self.rows = [row for _, row in self._tiles if row is not None]
        self._whole.rows += len(self.rows)
        self._whole.waiting += len(self.rows)
        for row in self.rows:
            row.progress.steps = row.progress.steps_left = steps

    def _tile(self, grid: Grid, left: int, top: int) -> Row | None:
        """The row of a tile, which is cut only when the engine gets it; None if nothing changes."""
        mask = self.input.mask
        if mask is not None and not grid.cut(mask, left, top).max():
            return None
        return Row(replace(self.input, place=Place(left, top)))

    async def output(self, put: Put, ahead: int, on_pool: OnPool) -> Pixels:
        """The pixels that the model makes.

        Tiles go to the engine a few at a time and in order, so that few of them are in memory.

        Args:
            put: hands a row to the engine.
            ahead: tiles that the engine has at a time.
            on_pool: calls a function with arguments on another thread.

        Raises:
            Whatever a row's future does.
        """
        if self._grid is None:
            self._whole.waiting -= 1
            await put(self.rows[0])
            return await asyncio.wrap_future(self.rows[0].future)
        grid, one = self._grid, self.input
        blend = self._blend = await on_pool(Blend, grid, one.pixels)
        waiting, inside = iter(self.rows), 0
        for corner, row in self._tiles:
            for begun in islice(waiting, ahead - inside):
                inside += 1
                self._whole.waiting -= 1
                begun.input = await on_pool(_cut, begun.input, grid)
                await put(begun)
            if row is None:
                await on_pool(blend.add, await on_pool(grid.cut, one.pixels, *corner))
                continue
            await on_pool(blend.add, await asyncio.wrap_future(row.future))
            inside -= 1
            row.forget()
            row.input = replace(row.input, pixels=one.pixels, mask=one.mask)  # lets go of the tile
        return blend.canvas

    def cancel(self) -> None:
        """Give it up: the engine drops its rows before their next step."""
        for row in self.rows:
            row.cancel()

    def forget(self) -> None:
        """Let go of what the model made, once it was used."""
        self._blend = None
        for row in self.rows:
            row.forget()

    def preview(self, pipeline: AnyPipeline) -> Pixels | None:
        """A small picture of how far it is; None if there is none."""
        # Read once, because another thread may let go of it meanwhile.
        if (blend := self._blend) is not None:
            apart = max(max(blend.canvas.shape[:2]) // _PREVIEW_PX, 1)
            return blend.canvas[::apart, ::apart].copy()
        if self._grid is not None or (state := self.rows[0].state) is None:
            return None
        return pipeline.preview(self.rows[0].input, state)

    # --- what it cost ---

    @property
    def steps(self) -> int:
        """Passes of all its rows; 0 until they are known."""
        return sum(row.progress.steps for row in self.rows)

    @property
    def steps_left(self) -> int:
        """Passes still to come."""
        return sum(row.progress.steps_left for row in self.rows)

    @property
    def batch_size(self) -> int:
        """Rows of its passes so far, its own among them: the mean, rounded."""
        passes = max(self.steps - self.steps_left, 1)
        return round(sum(row.progress.pass_rows for row in self.rows) / passes)

    @property
    def compute_s(self) -> float:
        """Its share of the passes, and all that came before and after them."""
        return sum(row.progress.compute_s for row in self.rows)

    def stages_s(self, engine_s: float) -> dict[str, float]:
        """Seconds by stage: queue, denoise, vae.

        Of tiles they are added up. Their stages overlap, so that they may be more than `engine_s`.

        Args:
            engine_s: that passed until its result since it could have gone to the engine.
        """
        staging_s = sum(row.progress.staging_s for row in self.rows)
        in_tiles = self._grid is not None
        denoise_s = self.compute_s - staging_s if in_tiles else self.rows[0].progress.stepping_s
        queue_s = max(engine_s - denoise_s - staging_s, 0.0)
        return {"queue": queue_s, "denoise": denoise_s, "vae": staging_s}


def _cut(one: RowInput[Any], grid: Grid) -> RowInput[Any]:
    """A tile's own part of its picture, and of the mask."""
    left, top = cast("Place", one.place)
    mask = None if one.mask is None else grid.cut(one.mask, left, top)
    return replace(one, pixels=grid.cut(one.pixels, left, top), mask=mask)


def left_s(rows: list[Row], done: int, steps: int) -> float | None:
    """About how long rows still take, from their own steps; None before the first one."""
    begun = [row.progress for row in rows if row.progress.arrived_s]
    if not done or not begun:
        return None
    # The end takes about what the start took.
    staging_s = max(progress.staging_s for progress in begun)
    stepped_s = time.monotonic() - min(progress.arrived_s for progress in begun) - staging_s
    return stepped_s / done * (steps - done) + staging_s
