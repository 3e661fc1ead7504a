"""A row's own noise: from its seed alone, and always in the same order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers.utils.torch_utils import randn_tensor

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from deployments.registry import NoisePrecision


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
        self._precision = precision

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
