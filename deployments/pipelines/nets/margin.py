"""Pictures that do not fill the window they share a pass in."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Margin:
    """The parts of a batch right of and below its pictures.

    A convolution pads the edge of a picture with zeros, at every layer. Zeros in the margin of each
    layer's output let it see the same inside a larger window, so that a picture's pixels do not
    depend on the window's size.

    Args:
        x: `(B, C, H, W)`, each picture at the top left.
        sizes: height and width of each picture; None where all fill the window.
    """

    def __init__(self, x: Tensor, sizes: Sequence[tuple[int, int]] | None) -> None:
        window = tuple(x.shape[2:])
        self._rows = [(i, size) for i, size in enumerate(sizes or ()) if size != window]

    def clear(self, hidden: Tensor, scale: int = 1) -> Tensor:
        """`hidden` with zeros in the margin, in place; `scale` times as high and wide as `x`."""
        for i, (height, width) in self._rows:
            hidden[i, :, height * scale :] = 0
            hidden[i, :, :, width * scale :] = 0
        return hidden
