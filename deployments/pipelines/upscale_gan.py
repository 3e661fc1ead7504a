"""Upscaling with Real-ESRGAN's networks, in overlapping tiles."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from deployments.engine.pipeline import Work
from deployments.errors import ModelCorrupt, ModelFailed
from deployments.pipelines import networks
from deployments.pipelines.area import AreaFilter, Rest, Span
from deployments.pipelines.lanes import Lanes
from deployments.pipelines.nets.rrdb import RRDBNet
from deployments.pipelines.nets.srvgg import SRVGGNetCompact
from deployments.pipelines.pictures import as_asked, require_picture

if TYPE_CHECKING:
    from collections.abc import Generator, Hashable, Sequence
    from pathlib import Path

    from deployments.contract import UpscaleRequest
    from deployments.engine.grouping import GroupLimits
    from deployments.engine.preparation import Preparation
    from deployments.engine.row import Pixels, RowInput
    from deployments.images import Picture
    from deployments.registry import ModelSpec

_UNIT_PX = 32
"""Lengths of windows are multiples of it, so that there are few shapes."""


class Window(NamedTuple):
    """A piece of one side of a picture, in input px: what the network sees, and what is kept.

    Attributes:
        start, length: of what it sees; it may reach beyond the end of a smaller picture.
        first, end: of what is kept.
    """

    start: int
    length: int
    first: int
    end: int


class Tile(NamedTuple):
    """A piece of the input, from top to bottom and from left to right."""

    rows: Window
    columns: Window

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.length, self.columns.length


@dataclass(slots=True)
class Tiling:
    """A row on its way.

    Attributes:
        source: the picture with the network's margin, on the device, `H x W x 3` uint8.
        scale: of the network.
        tiles: all of them, in order.
        area: brings what the network makes down to the size that is wanted.
        rest: what `area` needs of the tiles so far.
        canvas: of the result, `H x W x 3`.
        outputs: what each tile so far completed of the result, `h x w x 3` uint8 on the host; a GPU
            may still be writing them. None once it is on the canvas.
        valid: for each of those, on the device, whether it has no NaN.
    """

    source: torch.Tensor
    scale: int
    tiles: list[Tile]
    area: AreaFilter
    canvas: Pixels
    rest: Rest = field(default_factory=Rest)
    outputs: list[torch.Tensor | None] = field(default_factory=list["torch.Tensor | None"])
    valid: list[torch.Tensor] = field(default_factory=list[torch.Tensor])

    @property
    def next_tile(self) -> Tile:
        return self.tiles[len(self.outputs)]

    def kept(self, tile: Tile) -> tuple[Span, Span]:
        """Rows and columns of the enlarged picture, without its margin, that are kept of a tile."""
        rows, columns = (
            Span(one.first * self.scale, min(one.end * self.scale, axis.source_px))
            for one, axis in zip(tile, (self.area.rows, self.area.columns), strict=True)
        )
        return rows, columns


class UpscaleGan:
    """One step is one tile of each row.

    So a large picture holds up no small one, and stops soon after its client has left.
    """

    def __init__(self, spec: ModelSpec, folder: Path, lanes: Lanes | None = None) -> None:
        config = networks.read_config(spec, folder)
        self._tile_px = spec.tile_px
        self._device = "cpu"
        self._lanes = lanes or Lanes()
        self._dtype = getattr(torch, spec.dtype)
        with networks.building(spec):
            self._net = build(spec, config)
        networks.load_weights(self._net, spec, folder, self._device)

    def fit(self, picture: Picture | None, request: UpscaleRequest) -> Pixels:
        return require_picture(picture).rgb

    def restore(self, output: Pixels, picture: Picture | None, request: UpscaleRequest) -> Picture:
        return as_asked(require_picture(picture), output, request, self._net.scale)

    def to(self, device: str) -> None:
        self._net.to(device)
        self._device = device

    def prepare(self, how: Preparation, request: UpscaleRequest, limits: GroupLimits) -> int:
        return 0  # passes of this network also depend on the margins of their windows

    def work(self, width_px: int, height_px: int, request: UpscaleRequest) -> Work:
        shapes = [tile.shape for tile in self._tiles(height_px, width_px)]
        area_px = sum(height * width for height, width in shapes)
        return Work(len(shapes), area_px // len(shapes), width_px * height_px)

    def cost_px(self, row: RowInput[UpscaleRequest]) -> int:
        height, width = (self._windows(side)[0].length for side in row.pixels.shape[:2])
        return height * width

    def begin(self, row: RowInput[UpscaleRequest]) -> Generator[None, None, Tiling]:
        yield from ()
        height, width = row.pixels.shape[:2]
        tiles = self._tiles(height, width)
        scale = self._net.scale
        width_px, height_px = row.request.result_size(width, height, scale)
        area = AreaFilter((height * scale, width * scale), (height_px, width_px))
        canvas = np.empty((height_px, width_px, 3), np.uint8)
        source = torch.from_numpy(self._with_margin(row.pixels)).to(self._device)
        return Tiling(source, scale, tiles, area, canvas)

    def steps(self, state: Tiling) -> int:
        return len(state.tiles)

    def key(self, state: Tiling) -> Hashable:
        return state.next_tile.shape

    @torch.inference_mode()
    def step(self, states: Sequence[Tiling]) -> None:
        tiles = [state.next_tile for state in states]
        cuts = [_cut(state.source, tile) for state, tile in zip(states, tiles, strict=True)]
        sizes = [(cut.shape[0], cut.shape[1]) for cut in cuts]
        windows = cuts[0].new_zeros((len(states), *tiles[0].shape, 3))
        for window, cut, (height, width) in zip(windows, cuts, sizes, strict=True):
            window[:height, :width] = cut
        x = windows.permute(0, 3, 1, 2).to(self._dtype) / 255
        y = self._lanes.run(lambda part: self._net(x[part], sizes=sizes[part]), len(states)).float()
        valid = y.isfinite().all(dim=3).all(dim=2).all(dim=1)
        windows = (y.clamp(0, 1) * 255).permute(0, 2, 3, 1)
        # All of them before a state changes, so that a failure leaves every state as it was.
        done = [_completed(state, window) for state, window in zip(states, windows, strict=True)]
        for state, (output, rest), ok in zip(states, done, valid, strict=True):
            state.rest = rest
            state.outputs.append(output)
            state.valid.append(ok)

    def preview(self, row: RowInput[UpscaleRequest], state: Tiling) -> Pixels | None:
        return None

    @torch.inference_mode()
    def finish(self, state: Tiling) -> Generator[None, None, Pixels]:
        # Read first: this waits for the device, and so for its copies of the outputs.
        if not torch.stack(state.valid).all().item():
            raise ModelFailed(
                "The model gave no valid picture for this request (NaN).",
                value="NaN",
                remedy="Try another picture.",
            )
        for i, tile in enumerate(state.tiles):
            if (output := state.outputs[i]) is not None:
                state.canvas[state.area.place(*state.kept(tile))] = output.numpy()
                state.outputs[i] = None  # the result is in memory once
            yield
        return state.canvas

    def _with_margin(self, pixels: Pixels) -> Pixels:
        """The picture with sides that the network takes, reflected as in Real-ESRGAN's own code."""
        rest = [(0, -side % self._net.multiple_px) for side in pixels.shape[:2]]
        return np.pad(pixels, (*rest, (0, 0)), mode="reflect") if any(map(any, rest)) else pixels

    def _tiles(self, height_px: int, width_px: int) -> list[Tile]:
        return [Tile(*pair) for pair in product(self._windows(height_px), self._windows(width_px))]

    def _windows(self, side_px: int) -> list[Window]:
        side_px += -side_px % self._net.multiple_px
        return side_windows(side_px, self._tile_px, self._net.tile_overlap_px)


PIPELINE = UpscaleGan


def build(spec: ModelSpec, config: dict[str, Any]) -> RRDBNet | SRVGGNetCompact:
    """The network that `config.json` names.

    Raises:
        ModelCorrupt: an unknown architecture, or another scale than the registry's.
        TypeError, ValueError: it describes no network.
    """
    net = build_net(config)
    if net is None:
        raise ModelCorrupt(
            f"The config.json of {spec.name} names an unknown architecture.",
            value=config.get("architecture"),
            remedy=f"Known: {', '.join(_NETS)}.",
        )
    if net.scale != spec.scale:
        raise ModelCorrupt(
            f"The network of {spec.name} enlarges {net.scale} times, its entry says {spec.scale}.",
            value=f"times: {spec.scale}",
            remedy=f"Write `times: {net.scale}` into its entry in the model registry.",
        )
    return net


def build_net(config: dict[str, Any]) -> RRDBNet | SRVGGNetCompact | None:
    """The network of a `config.json`, with random weights; None for an unknown architecture."""
    net, keys = _NETS.get(str(config.get("architecture")), (None, ()))
    return net and net(**{key: int(config[key]) for key in keys if key in config})


_NETS: dict[str, tuple[type[RRDBNet] | type[SRVGGNetCompact], tuple[str, ...]]] = {
    "srvgg": (SRVGGNetCompact, ("num_feat", "num_conv", "scale")),
    "rrdb": (RRDBNet, ("num_feat", "num_block", "num_grow_ch", "scale")),
}
"""Of each architecture the class, and the keys of `config.json` that are its arguments."""


def side_windows(side_px: int, tile_px: int, overlap_px: int) -> list[Window]:
    """Windows along one side of a picture: as few as possible, and of few lengths.

    Whatever sizes of picture come, the network meets few shapes, because it prepares something for
    each shape and keeps it. A picture shorter than its only window leaves a margin in it. Several
    windows stay inside the picture, and what is kept of each is `overlap_px` away from its cuts.
    """
    around_px = 2 * overlap_px
    count = max(-(-(side_px - around_px) // tile_px), 1)
    lengths = _lengths(side_px + around_px * (count - 1), count, tile_px, tile_px + around_px)
    starts = [0, *accumulate(length - around_px for length in lengths[:-1])]
    # Rounded up, the windows may be too long together: then the last ones start earlier.
    starts = [max(min(start, side_px - n), 0) for start, n in zip(starts, lengths, strict=True)]
    ends = [*(start + overlap_px for start in starts[1:]), side_px]
    firsts = [0, *ends[:-1]]
    return [Window(*values) for values in zip(starts, lengths, firsts, ends, strict=True)]


def _lengths(least_px: int, count: int, tile_px: int, most_px: int) -> list[int]:
    """`count` lengths that add up to at least `least_px`, of two neighbouring allowed values."""
    allowed = [*range(_UNIT_PX, tile_px + 1, _UNIT_PX), most_px]
    i = next(i for i, length in enumerate(allowed) if length * count >= least_px)
    above, below = allowed[i], allowed[i - 1] if i else 0
    shorter = (above * count - least_px) // (above - below)
    return [above] * (count - shorter) + [below] * shorter


def _cut(pixels: torch.Tensor, tile: Tile) -> torch.Tensor:
    rows, columns = (slice(one.start, one.start + one.length) for one in tile)
    return pixels[rows, columns]


def _completed(state: Tiling, window: torch.Tensor) -> tuple[torch.Tensor, Rest]:
    """What a tile completes of the result, and what is left of it for the next ones.

    Args:
        state: of the row, whose next tile it is.
        window: what the network made of the tile, `h x w x 3` in [0, 255].
    """
    tile = state.next_tile
    rows, columns = state.kept(tile)
    top, left = (one.start * state.scale for one in tile)
    piece = window[rows.first - top : rows.end - top, columns.first - left : columns.end - left]
    means, rest = state.area.add(piece, rows, columns, state.rest)
    pixels = means.round().to(torch.uint8)
    return pixels.to("cpu", non_blocking=True), rest  # `finish` waits for it
