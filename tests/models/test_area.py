"""The area filter behind upscalers: exact, and the same in pieces as in one."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stock import as_row

from deployments.contract import UpscaleRequest
from deployments.pipelines import upscale_gan
from deployments.pipelines.area import AreaFilter, Rest, Span, shrink

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.engine.pipeline import AnyPipeline
    from deployments.engine.row import Row
    from deployments.images import Picture


@pytest.mark.parametrize(
    ("before", "after"), [((40, 60), (20, 30)), ((12, 20), (9, 15)), ((7, 9), (4, 5))]
)
def test_shrinking_takes_the_mean_of_the_area_that_a_pixel_covers(
    before: tuple[int, int], after: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*before, 3), np.uint8)
    # Repeated until whole pixels fit: the mean over them is exact.
    fine = pixels.repeat(after[0], axis=0).repeat(after[1], axis=1)
    rows = fine.reshape(after[0], before[0], -1, 3).mean(axis=1)
    expected = rows.reshape(after[0], after[1], before[1], 3).mean(axis=2)
    assert np.abs(shrink(pixels, after[1], after[0]) - expected).max() <= 0.51


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 90), st.integers(1, 90))
def test_shrinking_never_leaves_the_range_of_the_picture(
    height: int, width: int, less: int, narrower: int
) -> None:
    pixels = np.full((height, width, 3), (3, 128, 254), np.uint8)
    pixels[0, 0] = (7, 120, 250)
    found = shrink(pixels, min(width, narrower), min(height, less))
    assert found.shape == (min(height, less), min(width, narrower), 3)
    assert (found >= (3, 120, 250)).all()
    assert (found <= (7, 128, 254)).all()


def in_pieces(source: torch.Tensor, size: tuple[int, int], cuts: list[list[int]]) -> torch.Tensor:
    """`source` scaled down, piece by piece: cut at these rows, and at these columns."""
    height, width = source.shape[:2]
    area, rest = AreaFilter((height, width), size), Rest()
    result = torch.full((*size, 3), -1.0)
    rows, columns = (
        [Span(*pair) for pair in pairwise([0, *cut, end])]
        for cut, end in zip(cuts, (height, width), strict=True)
    )
    for row, column in product(rows, columns):
        piece = source[row.first : row.end, column.first : column.end]
        means, rest = area.add(piece, row, column, rest)
        result[area.place(row, column)] = means
    return result


@settings(max_examples=40)
@given(st.data())
def test_pieces_give_the_same_pixels_as_the_whole(data: st.DataObject) -> None:
    sides = [data.draw(st.integers(2, 60)) for _ in range(2)]
    size = [data.draw(st.integers(1, side)) for side in sides]
    cuts = [sorted(data.draw(st.sets(st.integers(1, side - 1), max_size=5))) for side in sides]
    source = torch.rand(*sides, 3, generator=torch.Generator().manual_seed(0)) * 255
    whole = in_pieces(source, (size[0], size[1]), [[], []])
    assert (whole >= 0).all()
    torch.testing.assert_close(in_pieces(source, (size[0], size[1]), cuts), whole)


def test_a_cut_on_the_edge_of_a_pixel_of_the_result_is_exact() -> None:
    """45 of 60 pixels are 39 of 52, where 39 * (60 / 52) rounds to less than 45."""
    source = torch.rand(60, 2, 3, generator=torch.Generator().manual_seed(0)) * 255
    whole = in_pieces(source, (52, 1), [[], []])
    torch.testing.assert_close(in_pieces(source, (52, 1), [[1, 45], []]), whole)


@pytest.mark.parametrize(
    "fields",
    [{"scale": 2}, {"scale": 3}, {"width": 401}, {"width": 210}, {"height": 155}],
)
def test_an_upscale_in_tiles_is_the_whole_picture_of_the_model_shrunk(
    fields: dict[str, int],
    tiny_pipeline: Callable[..., AnyPipeline],
    process: Callable[..., Picture],
) -> None:
    pipeline, picture = tiny_pipeline("srvgg", tile_px=64), tiny.picture(1, 150, 210)
    request = UpscaleRequest.model_validate(fields)
    whole = process(pipeline, picture, UpscaleRequest()).rgb
    expected = shrink(whole, *request.result_size(210, 150, 4)).astype(int)
    assert np.abs(process(pipeline, picture, request).rgb - expected).max() <= 1


def test_memory_follows_the_result_and_not_the_picture_of_the_model(
    tiny_pipeline: Callable[..., AnyPipeline],
    run_together: Callable[..., list[list[Row]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline: Any = tiny_pipeline("srvgg", tile_px=32)
    row = as_row(pipeline, UpscaleRequest(scale=2), tiny.picture(1, 320, 320))
    module: Any = upscale_gan
    held: list[int] = []

    def completed(state: upscale_gan.Tiling, window: torch.Tensor) -> Any:
        output, rest = real(state, window)
        tensors = [one for one in (*state.outputs, output, rest.left) if one is not None]
        tensors += rest.above.values()
        held.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
        return output, rest

    real = module._completed
    monkeypatch.setattr(module, "_completed", completed)
    tracemalloc.start()  # numpy's arrays
    run_together(pipeline, [row])
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    result_bytes = row.future.result().nbytes
    assert result_bytes == 640 * 640 * 3
    assert max(held) <= 1.1 * result_bytes
    assert peak_bytes <= 1.5 * result_bytes
    assert not any(output is not None for output in row.state.outputs)
