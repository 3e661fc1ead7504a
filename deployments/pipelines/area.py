"""Scaling down by an exact area filter, piece by piece, so that the large picture never exists."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from deployments.engine.row import Pixels

_STRIP_ROWS = 256


class Span(NamedTuple):
    """Rows or columns from `first` up to, but without, `end`."""

    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Rest:
    """What of the pieces so far the pieces beside and below them still need.

    Attributes:
        left: the last columns of the latest piece; None before there is one.
        above: the last rows of the pieces above, by their first column.
    """

    left: torch.Tensor | None = None
    above: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])


@dataclass(frozen=True, slots=True)
class Axis:
    """The rows, or the columns, of a picture that shrinks from `source_px` to `result_px`.

    A pixel of the result covers `source_px / result_px` pixels, whole and parts of them.
    """

    source_px: int
    result_px: int

    def done(self, end: int) -> int:
        """Pixels of the result that the first `end` pixels of the source cover whole."""
        return end * self.result_px // self.source_px

    def needed(self, end: int) -> int:
        """The first of the source's pixels that the result still needs, once it has `end`."""
        return self.done(end) * self.source_px // self.result_px

    def means(self, values: torch.Tensor, span: Span, dim: int) -> torch.Tensor:
        """Means over the pixels of the result that the source's pixels up to `span.end` complete.

        Args:
            values: the source from `needed(span.first)` up to `span.end` along `dim`.
            span: of the source, that is new.
            dim: of the axis.
        """
        if self.source_px == self.result_px:
            return values
        # In steps of 1 / result_px of a source pixel: whole numbers, so that no edge is rounded.
        step, width = self.result_px, self.source_px
        begin = np.arange(self.done(span.first), self.done(span.end)) * width
        begin -= self.needed(span.first) * step
        shape = [-1 if i == dim else 1 for i in range(values.dim())]
        total = torch.zeros_like(values.narrow(dim, 0, 1)).repeat_interleave(len(begin), dim)
        for tap in range(math.ceil(width / step) + 1):
            place = begin // step + tap
            share = np.minimum((place + 1) * step, begin + width) - np.maximum(place * step, begin)
            share = torch.from_numpy((share.clip(0) / width).astype(np.float32))
            # A place beyond the end has no share.
            at = torch.from_numpy(np.minimum(place, values.shape[dim] - 1))
            total += share.to(values.device).view(shape) * values.index_select(
                dim, at.to(values.device)
            )
        return total


class AreaFilter:
    """Scales a picture down. Each pixel is the mean of the area that it covers.

    So nothing rings and no level shifts. Pieces come row by row, from left to right. Together they
    give the same pixels as the whole picture.

    Args:
        source_px, result_px: height and width; those of the result are at most the source's.
    """

    def __init__(self, source_px: tuple[int, int], result_px: tuple[int, int]) -> None:
        self.rows, self.columns = (Axis(*px) for px in zip(source_px, result_px, strict=True))

    def add(
        self, piece: torch.Tensor, rows: Span, columns: Span, rest: Rest
    ) -> tuple[torch.Tensor, Rest]:
        """The pixels of the result that a piece completes, and what is left for the next pieces.

        Args:
            piece: `h x w x 3`, floating.
            rows, columns: of the source, where it lies.
            rest: of the pieces before; not changed.
        """
        up, back = self.rows.needed(rows.first), self.columns.needed(columns.first)
        block, above = piece, dict(rest.above)
        if rows.first > up:
            block = torch.cat([above[columns.first], block])
        if columns.first > back and rest.left is not None:
            block = torch.cat([rest.left, block], dim=1)
        kept = self.rows.needed(rows.end) - up
        above[columns.first] = block[kept:, columns.first - back :].clone()
        left = block[:, self.columns.needed(columns.end) - back :].clone()
        means = self.columns.means(self.rows.means(block, rows, dim=0), columns, dim=1)
        return means, Rest(left, above)

    def place(self, rows: Span, columns: Span) -> tuple[slice, slice]:
        """Where in the result the pixels lie that a piece completes."""
        return (
            slice(self.rows.done(rows.first), self.rows.done(rows.end)),
            slice(self.columns.done(columns.first), self.columns.done(columns.end)),
        )


def shrink(pixels: Pixels, width_px: int, height_px: int) -> Pixels:
    """`pixels`, `H x W x 3`, scaled down by an exact area filter.

    Args:
        pixels: returned as they are if they have the size.
        width_px, height_px: at most those of `pixels`.
    """
    height, width = pixels.shape[:2]
    if (height, width) == (height_px, width_px):
        return pixels
    area, rest = AreaFilter((height, width), (height_px, width_px)), Rest()
    result = np.empty((height_px, width_px, 3), np.uint8)
    columns = Span(0, width)
    for first in range(0, height, _STRIP_ROWS):
        rows = Span(first, min(first + _STRIP_ROWS, height))
        piece = torch.from_numpy(pixels[rows.first : rows.end]).float()
        means, rest = area.add(piece, rows, columns, rest)
        result[area.place(rows, columns)] = means.round().to(torch.uint8).numpy()
    return result
