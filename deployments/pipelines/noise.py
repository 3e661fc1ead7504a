"""A row's own noise: from its seed alone, and always in the same order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from deployments.registry import NoisePrecision

_SQUARE = 64
"""Side of the squares of a noise field, in latents."""


class Noise:
    """Normal noise from the generator of one row.

    The order is that of the stock pipelines: the autoencoder, the start, then each step.

    Args:
        seed: of the row.
        precision: float32 draws in float32 and rounds, so that a seed means the same in every
            dtype; model draws in the dtype that is asked for, as stock pipelines do. What torch
            draws then depends on its version: 2.13 gives the same values for nearly all shapes.
    """

    def __init__(self, seed: int, precision: NoisePrecision = "float32") -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._precision: NoisePrecision = precision

    def draw(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
    ) -> torch.Tensor:
        """The next values. The processor draws them, whatever the device."""
        drawn = torch.float32 if self._precision == "float32" else dtype
        return randn_tensor(tuple(shape), self._generator, torch.device(device), drawn).to(dtype)

    def draw_steps(
        self, count: int, like: torch.Tensor, dtype: torch.dtype
    ) -> Generator[None, None, tuple[torch.Tensor, ...]]:
        """Noise for `count` steps, each of the shape and on the device of the latents `like`.

        Yields before each draw.
        """
        drawn: list[torch.Tensor] = []
        for _ in range(count):
            yield
            drawn.append(self.draw(like.shape, dtype, "cpu"))
        return torch.cat(drawn).to(like.device).split(1) if drawn else ()


class NoiseField(Noise):
    """The noise of a tile: a part of one field for the whole picture, so that its tiles agree.

    The field is made of squares, each from a generator of its own. So a tile's noise depends on the
    seed and on where the tile lies, and the field never exists as a whole.

    Args:
        seed: of the picture.
        precision: see `Noise`.
        left, top: of the tile, in latents.
    """

    def __init__(self, seed: int, precision: NoisePrecision, left: int, top: int) -> None:
        super().__init__(seed, precision)
        self._seed = seed % 2**32  # as torch's generator takes it
        self._left, self._top = left, top
        self._drawn = 0

    def draw(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
    ) -> torch.Tensor:
        """The tile's part of the next field, `(1, C, h, w)`."""
        field, self._drawn = self._drawn, self._drawn + 1
        channels, height, width = shape[1:]
        drawn = torch.empty(tuple(shape), dtype=dtype)
        for row in range(self._top // _SQUARE, (self._top + height - 1) // _SQUARE + 1):
            for column in range(self._left // _SQUARE, (self._left + width - 1) // _SQUARE + 1):
                words = np.random.SeedSequence((self._seed, field, row, column)).generate_state(1)
                one = Noise(int(words[0]), self._precision)
                square = one.draw((1, channels, _SQUARE, _SQUARE), dtype, "cpu")
                y, rows = _overlap(row * _SQUARE, self._top, height)
                x, columns = _overlap(column * _SQUARE, self._left, width)
                drawn[:, :, y, x] = square[:, :, rows, columns]
        return drawn.to(device)


def _overlap(first: int, start: int, length: int) -> tuple[slice, slice]:
    """Where a square that begins at `first` meets a tile: in the tile, and in the square."""
    low, high = max(first, start), min(first + _SQUARE, start + length)
    return slice(low - start, high - start), slice(low - first, high - first)
