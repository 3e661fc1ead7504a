"""The autoencoder between pixels and latents, in bounded pieces of work."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from deployments.engine.passes import Passes
from deployments.errors import ModelFailed

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from deployments.engine.passes import Tensors
    from deployments.engine.preparation import Preparation
    from deployments.engine.row import Pixels
    from deployments.pipelines.noise import Noise

_SKETCH = 32
"""Most latents on a side of a small picture."""


class Autoencoder:
    """Wraps a diffusers AutoencoderKL or AutoencoderTiny, for one thread at a time.

    A decode is a generator that yields after each tile. Between two tiles the caller may decode
    tiles of other rows or give this one up; nothing large is alive then.

    Args:
        vae: on its device, and in float32 if float16 would overflow.
        tile_px: edge of the tiles in which a larger picture is decoded, output px. Tiles overlap by
            a quarter and are blended there, as in diffusers. None decodes any picture as one tile,
            for models whose buckets bound its size.

    Attributes:
        scale: pixels on the side of a latent.
    """

    def __init__(self, vae: Any, tile_px: int | None = None) -> None:
        self.vae = vae
        self.scale = 2 ** (len(vae.config.block_out_channels) - 1)
        self._tile = None if tile_px is None else tile_px // self.scale
        self.encodes = Passes(self._call_encoder)
        self.decodes = Passes(self._call_decoder)

    @torch.inference_mode()
    def encode(self, pixels: Pixels, noise: Noise) -> torch.Tensor:
        """Scaled latents `(1, C, h, w)` of `H x W x 3` pixels, drawn with `noise`."""
        image = image_tensor(pixels).to(self.vae.device, self.vae.dtype)
        return self._sampled(self.encodes({"image": image}), noise) * self.vae.config.scaling_factor

    def skip_draw(self, latents: torch.Tensor, noise: Noise) -> None:
        """Draw what encoding another picture, of these latents' shape, would have drawn."""
        if self._draws:
            noise.draw(latents.shape, self.vae.dtype, "cpu")

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> Generator[None, None, Pixels]:
        """`H x W x 3` pixels of scaled latents `(1, C, h, w)`.

        Raises:
            ModelFailed: the latents or the result hold NaN or infinity.
        """
        z = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        tile = self._tile
        if tile is None or max(z.shape[2:]) <= tile:
            return _pixels(self._decode(z))
        return (yield from self._decode_tiles(z, tile))

    @torch.inference_mode()
    def sketch(self, latents: torch.Tensor) -> Pixels:
        """A small picture of scaled latents `(1, C, h, w)`, shrunk before they are decoded."""
        height, width = latents.shape[2:]
        factor = math.ceil(max(height, width) / _SKETCH)
        small = torch.nn.functional.avg_pool2d(latents, factor) if factor > 1 else latents
        z = (small / self.vae.config.scaling_factor).to(self.vae.dtype)
        return _pixels(self._call_decoder({"latents": z}))

    @torch.inference_mode()
    def prepare(self, how: Preparation, sizes: Sequence[tuple[int, int]]) -> None:
        """Compile for pictures of the first of these widths and heights, px.

        No CUDA graphs: they gained 3 % of a decode on an H100, and would hold its memory.
        """
        tile_px = None if self._tile is None else self._tile * self.scale
        decoded = sizes if tile_px is None else [(tile_px, tile_px)]
        if how.recorder is not None:
            largest = max(decoded, key=math.prod)
            how.recorder.reserve(lambda: self._call_decoder(self._latents_of(largest)))
        images = [self._image_of(size) for size in sizes[: how.sizes]]
        latents = [self._latents_of(size) for size in decoded[: how.sizes]]
        if encoder := how.compiled(self.vae, self._call_encoder):
            self.encodes.prepare(images, [1], forward=encoder)
        if decoder := how.compiled(self.vae, self._call_decoder):
            self.decodes.prepare(latents, [1], forward=decoder)

    def _image_of(self, size: tuple[int, int]) -> Tensors:
        width, height = size
        image = torch.zeros(1, 3, height, width, device=self.vae.device, dtype=self.vae.dtype)
        return {"image": image}

    def _latents_of(self, size: tuple[int, int]) -> Tensors:
        width, height = (side // self.scale for side in size)
        shape = (1, self.vae.config.latent_channels, height, width)
        return {"latents": torch.zeros(shape, device=self.vae.device, dtype=self.vae.dtype)}

    def clear(self) -> None:
        """Run plain again, because the weights move."""
        self.encodes.clear()
        self.decodes.clear()

    @property
    def _draws(self) -> bool:
        """Whether an encoder's output is a distribution; AutoencoderTiny's is the latents."""
        return hasattr(self.vae, "quant_conv")

    def _sampled(self, encoded: torch.Tensor, noise: Noise) -> torch.Tensor:
        if not self._draws:
            return encoded
        drawn = DiagonalGaussianDistribution(encoded)
        shape, dtype, device = drawn.mean.shape, drawn.mean.dtype, drawn.mean.device
        return drawn.mean + drawn.std * noise.draw(shape, dtype, device)

    def _call_encoder(self, tensors: Tensors) -> torch.Tensor:
        encoded = self.vae.encode(tensors["image"])
        return encoded.latent_dist.parameters if self._draws else encoded.latents

    def _call_decoder(self, tensors: Tensors) -> torch.Tensor:
        return self.vae.decode(tensors["latents"], return_dict=False)[0]

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decodes({"latents": z})

    def _decode_tiles(self, z: torch.Tensor, tile: int) -> Generator[None, None, Pixels]:
        overlap = tile // 4
        stride = tile - overlap
        overlap_px, kept_px = overlap * self.scale, stride * self.scale
        height, width = (side * self.scale for side in z.shape[2:])
        canvas = np.empty((height, width, 3), np.uint8)
        above: list[torch.Tensor] = []
        for i, top in enumerate(range(0, z.shape[2], stride)):
            row: list[torch.Tensor] = []
            for j, left in enumerate(range(0, z.shape[3], stride)):
                piece = z[:, :, top : top + tile, left : left + tile]
                image = self._decode(piece)
                if above:
                    _blend(above[j], image, overlap_px, dim=2)
                if row:
                    _blend(row[-1], image, overlap_px, dim=3)
                row.append(image)
                y, x = i * kept_px, j * kept_px
                part = _pixels(image[:, :, :kept_px, :kept_px])
                canvas[y : y + part.shape[0], x : x + part.shape[1]] = part
                yield
            above = row
        return canvas


def image_tensor(pixels: Pixels) -> torch.Tensor:
    """Pixels as `(1, 3, H, W)`, float32 in [-1, 1].

    Channels stay last in memory, as in the tensor that a stock pipeline makes of a PIL image, so
    that both add up in the same order.
    """
    return torch.from_numpy(pixels)[None].permute(0, 3, 1, 2).float() / 255 * 2 - 1


def _pixels(image: torch.Tensor) -> Pixels:
    image = image[0].float()
    if not image.isfinite().all().item():
        raise ModelFailed(
            "The model gave no valid picture for this request (NaN).",
            value="NaN",
            remedy="Try another seed, fewer steps or a lower guidance_scale.",
        )
    levels = (image / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return levels.permute(1, 2, 0).contiguous().cpu().numpy()


def _blend(former: torch.Tensor, image: torch.Tensor, overlap_px: int, dim: int) -> None:
    """Fade from the end of `former` into the start of `image`, in place."""
    length = min(former.shape[dim], image.shape[dim], overlap_px)
    share = torch.arange(length, device=image.device, dtype=image.dtype) / length
    share = share.view((-1, 1) if dim == 2 else (1, -1))
    end = former.narrow(dim, former.shape[dim] - length, length)
    start = image.narrow(dim, 0, length)
    start.copy_(end * (1 - share) + start * share)
