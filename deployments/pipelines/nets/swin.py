"""Swin Transformer, the encoder of BiRefNet: attention within windows.

Every other block shifts its windows by half of their size, so that what one block keeps apart the
next one brings together. Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer
using Shifted Windows", ICCV 2021. Module names equal those of its published weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

_PATCH_PX = 4
_APART = -100.0
"""Added to the logit of two places that must not see each other: their share is 0 in any dtype."""


class Attention(nn.Module):
    """Attention among the places of each window, with a learnt bias for each relative position.

    Raises:
        ValueError: the heads do not divide the channels.
    """

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"{heads} heads do not divide {channels} channels")
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", _relative_positions(window))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, apart: Tensor | None) -> Tensor:
        """One step of attention.

        Args:
            x: `(B, windows, places, channels)`.
            apart: `(windows, places, places)`, what is added to the logit of two places; None is 0.
        """
        rows, windows, places, channels = x.shape
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        # Each head of each window is one head of all places: a mask that no row has to copy.
        bias = bias.expand(windows, -1, -1, -1) if apart is None else bias + apart[:, None]
        shape = (rows, windows, places, 3, self.heads, channels // self.heads)
        parts = self.qkv(x).view(shape).permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
        q, k, v = parts.unbind()
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.flatten(0, 1)[None])
        mixed = mixed.unflatten(1, (windows, self.heads)).transpose(2, 3)
        return self.proj(mixed.flatten(3))


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention within windows, then a layer for each place; both are added to their input."""

    def __init__(self, channels: int, heads: int, window: int, *, shifted: bool) -> None:
        super().__init__()
        self.window = window
        self.shift = window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(channels)
        self.attn = Attention(channels, heads, window)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels)

    def forward(self, x: Tensor, apart: Tensor) -> Tensor:
        """One block.

        Args:
            x: `(B, H, W, channels)`.
            apart: `regions_apart` of that size.
        """
        x = x + self._attended(self.norm1(x), apart if self.shift else None)
        return x + self.mlp(self.norm2(x))

    def _attended(self, x: Tensor, apart: Tensor | None) -> Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window, 0, -height % self.window))
        down = x.shape[1] // self.window
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = _merged(self.attn(_split(x, self.window), apart), self.window, down)
        x = torch.roll(x, (self.shift, self.shift), (1, 2))
        return x[:, :height, :width]


class Merging(nn.Module):
    """Half the height and width: four neighbours become one place of twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        four = (x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2])
        return self.reduction(self.norm(torch.cat(four, -1)))


class Stage(nn.Module):
    """Blocks of one size, then half of it for the next stage."""

    def __init__(self, channels: int, depth: int, heads: int, window: int, *, last: bool) -> None:
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(
            Block(channels, heads, window, shifted=i % 2 == 1) for i in range(depth)
        )
        self.downsample = None if last else Merging(channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the blocks make of `x`, and what the next stage takes."""
        apart = regions_apart(x, self.window)
        for block in self.blocks:
            x = block(x, apart)
        return x, x if self.downsample is None else self.downsample(x)


class PatchEmbedding(nn.Module):
    """4 x 4 pixels become one place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, _PATCH_PX, stride=_PATCH_PX)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Swin(nn.Module):
    """A picture to features at 1/4, 1/8, 1/16 and 1/32 of its size.

    Args:
        channels: at 1/4; each further stage has twice as many.
        depths: blocks of each stage.
        heads: attention heads of each stage.
        window: height and width of a window, in places.
    """

    def __init__(
        self, channels: int, depths: Sequence[int], heads: Sequence[int], window: int
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(channels)
        self.layers = nn.ModuleList()
        for i, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            last = i == len(depths) - 1
            self.layers.append(Stage(channels << i, depth, count, window, last=last))
            self.add_module(f"norm{i}", nn.LayerNorm(channels << i))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features, finest first.

        Args:
            x: `(B, 3, H, W)`; sides are multiples of 4.

        Returns:
            A tensor `(B, channels, H', W')` for each stage; odd sides are rounded up when halved.
        """
        x = self.patch_embed(x)
        features = list[Tensor]()
        for i, stage in enumerate(self.layers):
            found, x = stage(x)
            features.append(self.get_submodule(f"norm{i}")(found).permute(0, 3, 1, 2))
        return features


def regions_apart(x: Tensor, window: int) -> Tensor:
    """What keeps regions apart that only the shift has brought into one window.

    Args:
        x: `(B, H, W, channels)`, what is shifted.
        window: height and width of a window.

    Returns:
        `(windows, places, places)` in the dtype of `x`: 0 for two places of one region.
    """

    def bands(side: int) -> Tensor:
        side += -side % window
        place = torch.arange(side, device=x.device)
        return (place >= side - window).long() + (place >= side - window // 2)

    regions = 3 * bands(x.shape[1])[:, None] + bands(x.shape[2])
    regions = _split(regions[None, :, :, None], window)[0, :, :, 0]
    together = regions[:, :, None] == regions[:, None]
    return (~together).to(x.dtype) * _APART


def _relative_positions(window: int) -> Tensor:
    """`(places, places)`: which row of the table has the bias between two places of a window."""
    place = torch.arange(window)
    down, across = (side.flatten() for side in torch.meshgrid(place, place, indexing="ij"))
    down = down[:, None] - down + window - 1
    across = across[:, None] - across + window - 1
    return down * (2 * window - 1) + across


def _split(x: Tensor, window: int) -> Tensor:
    """`(B, H, W, C)` to `(B, windows, places, C)`."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _merged(x: Tensor, window: int, down: int) -> Tensor:
    """Undo `_split` of a picture that has `down` windows from top to bottom."""
    x = x.unflatten(2, (window, window)).unflatten(1, (down, -1))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
