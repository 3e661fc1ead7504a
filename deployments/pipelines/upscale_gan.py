"""4x upscaling with Real-ESRGAN's networks, in overlapping tiles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from deployments.buckets import resize
from deployments.errors import ModelCorrupt, ModelFailed
from deployments.images import Picture
from deployments.pipelines import networks
from deployments.pipelines.base import Work
from deployments.pipelines.lanes import Lanes
from deployments.pipelines.nets.rrdb import RRDBNet
from deployments.pipelines.nets.srvgg import SRVGGNetCompact

if TYPE_CHECKING:
    from collections.abc import Generator, Hashable, Sequence
    from pathlib import Path

    from torch import nn

    from deployments.contract import TaskRequest
    from deployments.pipelines.base import Pixels, Row
    from deployments.registry import ModelSpec

SCALE = 4


@dataclass(frozen=True, slots=True)
class Tile:
    """A piece of the input: what the network sees, and the part of it that is kept.

    Attributes:
        top, left, height, width: of the kept part, in input px.
        outer: the same with its overlap, as (top, left, bottom, right).
    """

    top: int
    left: int
    height: int
    width: int
    outer: tuple[int, int, int, int]

    @property
    def shape(self) -> tuple[int, int]:
        top, left, bottom, right = self.outer
        return bottom - top, right - left


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

    def fit(self, picture: Picture, request: TaskRequest) -> Pixels:
        return picture.rgb

    def to(self, device: str) -> None:
        self._net.to(device)
        self._device = device

    def work(self, width_px: int, height_px: int, request: TaskRequest) -> Work:
        tiles = plan_tiles(height_px, width_px, self._tile_px, self._overlap_px)
        areas_px = [height * width for height, width in (tile.shape for tile in tiles)]
        return Work(len(tiles), sum(areas_px) // len(tiles), width_px * height_px)

    def cost_px(self, row: Row) -> int:
        sides = [
            min(side, _even(side, self._tile_px) + 2 * self._overlap_px)
            for side in row.pixels.shape[:2]
        ]
        return sides[0] * sides[1]

    def begin(self, row: Row) -> Generator[None, None, None]:
        height, width = row.pixels.shape[:2]
        tiles = plan_tiles(height, width, self._tile_px, self._overlap_px)
        row.state = _Progress(torch.from_numpy(row.pixels).to(self._device), tiles)
        row.steps_left = len(tiles)
        yield from ()

    def key(self, row: Row) -> Hashable:
        progress = cast("_Progress", row.state)
        return progress.tiles[len(progress.outputs)].shape

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> None:
        progresses = [cast("_Progress", row.state) for row in rows]
        cuts = [_cut(one.source, one.tiles[len(one.outputs)]) for one in progresses]
        x = torch.stack(cuts).permute(0, 3, 1, 2).to(self._dtype) / 255
        y = self._lanes.run(lambda part: self._net(x[part]), len(rows)).float()
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
                remedy="Try another picture.",
            )
        height, width = row.pixels.shape[:2]
        canvas = np.empty((height * SCALE, width * SCALE, 3), np.uint8)
        for tile, output in zip(progress.tiles, progress.outputs, strict=True):
            _paste(canvas, output.numpy(), tile)
            yield
        progress.outputs.clear()
        return canvas

    def restore(self, output: Pixels, picture: Picture, request: TaskRequest) -> Picture:
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


def plan_tiles(height: int, width: int, tile_px: int, overlap_px: int) -> list[Tile]:
    """Tiles of at most `tile_px` that cover a picture once, each with `overlap_px` around it.

    All about alike, since a narrow rest at the edge would cost nearly as much as a whole tile.
    """
    tiles: list[Tile] = []
    tile_height, tile_width = _even(height, tile_px), _even(width, tile_px)
    for top in range(0, height, tile_height):
        for left in range(0, width, tile_width):
            inner_height = min(tile_height, height - top)
            inner_width = min(tile_width, width - left)
            outer = (
                max(top - overlap_px, 0),
                max(left - overlap_px, 0),
                min(top + inner_height + overlap_px, height),
                min(left + inner_width + overlap_px, width),
            )
            tiles.append(Tile(top, left, inner_height, inner_width, outer))
    return tiles


def _even(side_px: int, most_px: int) -> int:
    """Of as few equal parts of a side as are at most so long."""
    parts = -(-side_px // most_px)
    return -(-side_px // parts)


def _cut(pixels: torch.Tensor, tile: Tile) -> torch.Tensor:
    top, left, bottom, right = tile.outer
    return pixels[top:bottom, left:right]


def _paste(canvas: Pixels, out: Pixels, tile: Tile) -> None:
    y, x = (tile.top - tile.outer[0]) * SCALE, (tile.left - tile.outer[1]) * SCALE
    height, width = tile.height * SCALE, tile.width * SCALE
    top, left = tile.top * SCALE, tile.left * SCALE
    canvas[top : top + height, left : left + width] = out[y : y + height, x : x + width]
