"""Latent blending: what of a picture a row keeps while the rest of it is denoised.

Avrahami et al. 2022, "Blended Latent Diffusion" (arXiv:2206.02779), as the inpainting pipelines of
diffusers do it with a UNet of four channels: after every step the kept part is set to what it would
be at that step's level of noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.functional import max_pool2d

if TYPE_CHECKING:
    from deployments.engine.row import Pixels

_MOST_LEFT: Final = 0.5
"""A model starts from noise alone if less than this of a picture's energy is left at the highest
level of noise that it was trained with: 0.005 for Stable Diffusion, and 0.85 or more for models
that learned to change a picture."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The part of a row's picture that stays.

    Attributes:
        mask: `(1, 1, h, w)` float32: 1 is changed, 0 stays.
        clean: `(1, C, h, w)` float32, latents of the picture.
        noise: `(1, C, h, w)` float32, that the row starts with.
    """

    mask: torch.Tensor
    clean: torch.Tensor
    noise: torch.Tensor

    def blended(self, latents: torch.Tensor, of_clean: float, of_noise: float) -> torch.Tensor:
        """The latents where the mask is 1; where it is 0, the picture's own.

        Args:
            latents: `(1, C, h, w)`.
            of_clean, of_noise: factors of both in a picture's latents at this level.
        """
        known = of_clean * self.clean + of_noise * self.noise
        return (1 - self.mask) * known + self.mask * latents


def latent_mask(mask: Pixels, scale: int) -> torch.Tensor:
    """The mask of latents, `(1, 1, h, w)` float32 in [0, 1].

    Each has the share of the first of its pixels, as in diffusers. A dot, or a stroke thinner than
    a latent, may pass between these: where none of the 5 x 5 around shows anything, a latent has
    the largest share of its pixels.

    Args:
        mask: `H x W` uint8.
        scale: pixels on the side of a latent.
    """
    whole = torch.from_numpy(mask)[None, None].float() / 255
    first, largest = whole[:, :, ::scale, ::scale], max_pool2d(whole, scale)
    shows = max_pool2d(first, 5, stride=1, padding=2) > 0
    return torch.where(shows, first, largest)


def starts_from_noise(scheduler: Any) -> bool:
    """Whether a scheduler's model makes pictures from noise alone, at full strength."""
    return float(scheduler.alphas_cumprod[-1]) < _MOST_LEFT
