"""4x upscaling with Real-ESRGAN's networks, in overlapping tiles."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch

from deployments.buckets import resize
from deployments.engine.pipeline import Work
from deployments.errors import ModelCorrupt, ModelFailed
from deployments.images import Picture
from deployments.pipelines import networks
from deployments.pipelines.lanes import Lanes
from deployments.pipelines.nets.rrdb import RRDBNet
from deployments.pipelines.nets.srvgg import SRVGGNetCompact

if TYPE_CHECKING:
    from collections.abc import Generator, Hashable, Sequence
    from pathlib import Path

    from torch import nn

    from deployments.contract import ImageRequest
    from deployments.engine.row import Pixels, Row
    from deployments.registry import ModelSpec

SCALE = 4
_UNIT_PX = 32
"""Windows are multiples of it long, so that they have few shapes."""


class Window(NamedTuple):
    """A piece of one side of a picture, in input px: what the network sees, and what is kept.

    Attributes:
        start, length: of what it sees. It reaches beyond the end of a picture that is smaller.
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
class _Progress:
    """A row under way.

    Attributes:
        source: the picture on the device, `H x W x 3` uint8.
        tiles: all, in order.
        outputs: of the tiles done so far, `h x w x 3` uint8 on the host; from a GPU they may still
            be on their way.
        valid: for each of these, on the device, whether no NaN was seen.
    """

    source: torch.Tensor
    tiles: list[Tile]
    outputs: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    valid: list[torch.Tensor] = field(default_factory=list[torch.Tensor])


class UpscaleGan:
    """A step is one tile of each row, so that a large picture neither blocks small ones nor
    outlives its client.
    """

    def __init__(
        self, spec: ModelSpec, folder: Path, device: str, lanes: Lanes | None = None
    ) -> None:
        config = networks.read_config(spec, folder)
        self._tile_px = spec.tile_px
        self._device = device
        self._lanes = lanes or Lanes()
        self._dtype = getattr(torch, spec.dtype)
        with networks.building(spec):
            self._net, self._overlap_px = build(spec, config)
        networks.load_weights(self._net, spec, folder, device)

    def fit(self, picture: Picture, request: ImageRequest) -> Pixels:
        return picture.rgb

    def to(self, device: str) -> None:
        self._net.to(device)
        self._device = device

    def work(self, width_px: int, height_px: int, request: ImageRequest) -> Work:
        shapes = [tile.shape for tile in self._tiles(height_px, width_px)]
        area_px = sum(height * width for height, width in shapes)
        return Work(len(shapes), area_px // len(shapes), width_px * height_px)

    def cost_px(self, row: Row) -> int:
        height, width = (self._windows(side)[0].length for side in row.pixels.shape[:2])
        return height * width

    def begin(self, row: Row) -> Generator[None, None, None]:
        height, width = row.pixels.shape[:2]
        tiles = self._tiles(height, width)
        row.state = _Progress(torch.from_numpy(row.pixels).to(self._device), tiles)
        row.steps_left = len(tiles)
        yield from ()

    def _tiles(self, height: int, width: int) -> list[Tile]:
        return [Tile(*pair) for pair in product(self._windows(height), self._windows(width))]

    def _windows(self, side_px: int) -> list[Window]:
        return plan_side(side_px, self._tile_px, self._overlap_px)

    def key(self, row: Row) -> Hashable:
        progress = cast("_Progress", row.state)
        return progress.tiles[len(progress.outputs)].shape

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> None:
        progresses = [cast("_Progress", row.state) for row in rows]
        tiles = [one.tiles[len(one.outputs)] for one in progresses]
        cuts = [_cut(one.source, tile) for one, tile in zip(progresses, tiles, strict=True)]
        sizes = [(cut.shape[0], cut.shape[1]) for cut in cuts]
        windows = cuts[0].new_zeros((len(rows), *tiles[0].shape, 3))
        for window, cut, (height, width) in zip(windows, cuts, sizes, strict=True):
            window[:height, :width] = cut
        x = windows.permute(0, 3, 1, 2).to(self._dtype) / 255
        y = self._lanes.run(lambda part: self._net(x[part], sizes=sizes[part]), len(rows)).float()
        valid = y.isfinite().all(dim=3).all(dim=2).all(dim=1)
        pixels = (y.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        pixels = pixels.to("cpu", non_blocking=True)  # nobody waits for it before `finish`
        for progress, output, ok in zip(progresses, pixels, valid, strict=True):
            progress.outputs.append(output)
            progress.valid.append(ok)

    @torch.inference_mode()
    def finish(self, row: Row) -> Generator[None, None, Pixels]:
        progress = cast("_Progress", row.state)
        # Read first: that waits for the device, and so for the copies it makes of the outputs.
        if not torch.stack(progress.valid).all().item():
            raise ModelFailed(
                "The model gave no valid picture for this request (NaN).",
                value="NaN",
                remedy="Try another picture.",
            )
        height, width = row.pixels.shape[:2]
        canvas = np.empty((height * SCALE, width * SCALE, 3), np.uint8)
        for tile, output in zip(progress.tiles, progress.outputs, strict=True):
            _paste(canvas, output.numpy(), tile)
            yield
        progress.outputs.clear()
        return canvas

    def restore(self, output: Pixels, picture: Picture, request: ImageRequest) -> Picture:
        alpha = picture.alpha
        if alpha is not None:
            alpha = resize(alpha, output.shape[1], output.shape[0])
        return Picture(output, alpha, picture.notes)


def build(spec: ModelSpec, config: dict[str, Any]) -> tuple[nn.Module, int]:
    """The network that `config.json` names, and the tile overlap it needs, in px.

    Raises:
        ModelCorrupt: an unknown architecture.
    """
    name = config.get("architecture")
    if name == "srvgg":
        net = SRVGGNetCompact(int(config["num_feat"]), int(config["num_conv"]))
        return net, net.receptive_field_px
    if name == "rrdb":
        return RRDBNet(num_block=int(config.get("num_block", 23))), RRDBNet.tile_overlap_px
    raise ModelCorrupt(
        f"The config.json of {spec.name} names an unknown architecture.",
        value=name,
        remedy="Known: srvgg, rrdb.",
    )


def plan_side(side_px: int, tile_px: int, overlap_px: int) -> list[Window]:
    """Windows along one side of a picture, as few and as alike as can be.

    However many sizes of picture come, the network meets few lengths: for each shape it prepares
    anew, and keeps that. A picture shorter than its only window leaves a margin in it. Several
    windows stay inside the picture; what is kept of each lies `overlap_px` from where it was cut.
    """
    around_px = 2 * overlap_px
    count = max(-(-(side_px - around_px) // tile_px), 1)
    lengths = _lengths(side_px + around_px * (count - 1), count, tile_px, tile_px + around_px)
    starts = [0, *accumulate(length - around_px for length in lengths[:-1])]
    # Rounded up, they may be too long together: the last ones then begin earlier.
    starts = [max(min(start, side_px - n), 0) for start, n in zip(starts, lengths, strict=True)]
    ends = [*(start + overlap_px for start in starts[1:]), side_px]
    firsts = [0, *ends[:-1]]
    return [Window(*found) for found in zip(starts, lengths, firsts, ends, strict=True)]


def _lengths(least_px: int, count: int, tile_px: int, most_px: int) -> list[int]:
    """So many lengths that add up to `least_px` at least, of two neighbours among those allowed."""
    allowed = [*range(_UNIT_PX, tile_px + 1, _UNIT_PX), most_px]
    i = next(i for i, length in enumerate(allowed) if length * count >= least_px)
    above, below = allowed[i], allowed[i - 1] if i else 0
    shorter = (above * count - least_px) // (above - below)
    return [above] * (count - shorter) + [below] * shorter


def _cut(pixels: torch.Tensor, tile: Tile) -> torch.Tensor:
    rows, columns = (slice(one.start, one.start + one.length) for one in tile)
    return pixels[rows, columns]


def _paste(canvas: Pixels, out: Pixels, tile: Tile) -> None:
    to = tuple(slice(one.first * SCALE, one.end * SCALE) for one in tile)
    of = tuple(
        slice((one.first - one.start) * SCALE, (one.end - one.start) * SCALE) for one in tile
    )
    canvas[to] = out[of]


PIPELINE = UpscaleGan
