"""BiRefNet, for fine structures at high resolution; the network behind ZhengPeng7/BiRefNet.

Source: Zheng et al., "Bilateral Reference for High-Resolution Dichotomous Image Segmentation",
CAAI Artificial Intelligence Research 2024. Module names equal those of the published weights, those
that only training used too, so that a strict load needs no key mapping and no remote code.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deployments.pipelines.nets.deformable import DeformableConv
from deployments.pipelines.nets.swin import Swin

if TYPE_CHECKING:
    from collections.abc import Sequence

PatchOrder = Literal["columns", "channels"]
_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)
_INNER, _BRANCH, _GRADIENT = 64, 256, 16
"""Channels within a decoder block, of each of its branches, and before a gate."""
_SIDES = 4


@dataclass(frozen=True)
class BiRefNetWidths:
    """Sizes of the encoder; the decoder's follow. The defaults are ZhengPeng7/BiRefNet's (Swin-L).

    Attributes:
        channels, depths, heads, window: see `Swin`.
    """

    channels: int = 192
    depths: Sequence[int] = (2, 2, 18, 2)
    heads: Sequence[int] = (6, 12, 24, 48)
    window: int = 12


class Branch(nn.Module):
    """Deformable convolution, batch norm, ReLU."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.atrous_conv = DeformableConv(_INNER, _BRANCH, kernel)
        self.bn = nn.BatchNorm2d(_BRANCH)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.atrous_conv(x)))


class Pyramid(nn.Module):
    """Branches of several reaches beside the mean of the whole picture, joined."""

    _KERNELS = (1, 3, 7)

    def __init__(self) -> None:
        super().__init__()
        self.aspp1 = Branch(1)
        self.aspp_deforms = nn.ModuleList(Branch(kernel) for kernel in self._KERNELS)
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(_INNER, _BRANCH, 1, bias=False),
            nn.BatchNorm2d(_BRANCH),
            nn.ReLU(),
        )
        self.conv1 = nn.Conv2d(_BRANCH * (2 + len(self._KERNELS)), _INNER, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_INNER)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.aspp1(x), *(branch(x) for branch in self.aspp_deforms)]
        mean = self.global_avg_pool(x).expand_as(branches[0])
        return F.relu(self.bn1(self.conv1(torch.cat((*branches, mean), 1))))


class DecoderBlock(nn.Module):
    """Two 3x3 convolutions around a pyramid; keeps height and width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, _INNER, 3, padding=1)
        self.bn_in = nn.BatchNorm2d(_INNER)
        self.dec_att = Pyramid()
        self.conv_out = nn.Conv2d(_INNER, outputs, 3, padding=1)
        self.bn_out = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.bn_in(self.conv_in(x)))
        return self.bn_out(self.conv_out(self.dec_att(hidden)))


def _look(inputs: int, outputs: int) -> nn.Sequential:
    """What a level sees of the picture itself: two 3x3 convolutions."""
    first = nn.Conv2d(inputs, _INNER, 3, padding=1)
    last = nn.Conv2d(_INNER, outputs, 3, padding=1)
    return nn.Sequential(OrderedDict[str, nn.Module](conv1=first, conv_out=last))


class Decoder(nn.Module):
    """Features to logits, from level 4 at 1/32 of the picture's size to level 1 at 1/4.

    `gdt_convs_pred_*` and, unless side outputs are asked for, `conv_ms_spvn_*` serve training
    alone.

    Args:
        channels: of the features, coarsest first.
        patch_order: see `BiRefNet`.
    """

    def __init__(self, channels: Sequence[int], patch_order: PatchOrder) -> None:
        super().__init__()
        self._patch_order: PatchOrder = patch_order
        outputs = (*channels[1:], channels[3] // 2)
        seen = [count // 8 for count in (channels[0], *channels)]
        for i, level in enumerate((4, 3, 2, 1)):
            block = DecoderBlock(channels[i] + seen[i], outputs[i])
            self.add_module(f"decoder_block{level}", block)
            self.add_module(f"ipt_blk{level + 1}", _look(3 * 4 ** (level + 1), seen[i]))
            if level > 1:
                self._add_gate(level, outputs[i])
        self.ipt_blk1 = _look(3, seen[4])
        self.conv_out1 = nn.Sequential(nn.Conv2d(outputs[3] + seen[4], 1, 1))

    def _add_gate(self, level: int, channels: int) -> None:
        lateral = OrderedDict[str, nn.Module](conv=nn.Conv2d(channels, channels, 1))
        self.add_module(f"lateral_block{level}", nn.Sequential(lateral))
        self.add_module(f"conv_ms_spvn_{level}", nn.Conv2d(channels, 1, 1))
        gradients = nn.Conv2d(channels, _GRADIENT, 3, padding=1)
        gate = nn.Sequential(gradients, nn.BatchNorm2d(_GRADIENT), nn.ReLU())
        self.add_module(f"gdt_convs_{level}", gate)
        for use in ("pred", "attn"):
            last = nn.Sequential(nn.Conv2d(_GRADIENT, 1, 1))
            self.add_module(f"gdt_convs_{use}_{level}", last)

    def forward(self, x: Tensor, features: Sequence[Tensor], sides: int) -> list[Tensor]:
        """Logits, finest first: 1 channel at the picture's size, then at 1/8, 1/16 and 1/32.

        Args:
            x: the picture, `(B, 3, H, W)`; sides are multiples of 32.
            features: finest first.
            sides: how many of them, 1 to 4.
        """
        hidden, coarse = features[3], list[Tensor]()
        for level in (4, 3, 2):
            hidden = self._decoded(level, hidden, x)
            if sides >= level:
                coarse.insert(0, self.get_submodule(f"conv_ms_spvn_{level}")(hidden))
            gradients = self.get_submodule(f"gdt_convs_{level}")(hidden)
            hidden = hidden * self.get_submodule(f"gdt_convs_attn_{level}")(gradients).sigmoid()
            skip = features[level - 2]
            lateral = self.get_submodule(f"lateral_block{level}")(skip)
            hidden = resized(hidden, skip) + lateral
        return [self._answer(self._decoded(1, hidden, x), x), *coarse]

    def _decoded(self, level: int, hidden: Tensor, x: Tensor) -> Tensor:
        patches = picture_patches(x, 2 ** (level + 1), self._patch_order)
        seen = self.get_submodule(f"ipt_blk{level + 1}")(patches)
        return self.get_submodule(f"decoder_block{level}")(torch.cat((hidden, seen), 1))

    def _answer(self, hidden: Tensor, x: Tensor) -> Tensor:
        """`conv_out1` of `hidden` at the picture's size beside what it sees of the picture."""
        weight, bias = (self.conv_out1.get_parameter(f"0.{one}") for one in ("weight", "bias"))
        channels = hidden.shape[1]
        # Narrow before the enlargement: the same result at a fraction of the memory.
        coarse = F.conv2d(hidden, weight[:, :channels])
        return resized(coarse, x) + F.conv2d(self.ipt_blk1(x), weight[:, channels:], bias)


class BiRefNet(nn.Module):
    """RGB to foreground logits.

    Args:
        widths: sizes; the defaults build ZhengPeng7/BiRefNet (220,176,498 parameters).
        patch_order: how the decoder stacks the patches of the picture, which no shape tells.
            `columns` goes column by column, each patch with its three colours: weights of before
            November 2024, such as ZhengPeng7/BiRefNet and BiRefNet_lite, were trained with it.
            `channels` goes row by row, colour by colour, as later ones were.
    """

    input_px = 1024
    """Height and width it was published for."""
    STRIDE = 32

    def __init__(
        self, widths: BiRefNetWidths | None = None, patch_order: PatchOrder = "columns"
    ) -> None:
        super().__init__()
        w = widths or BiRefNetWidths()
        if len(w.depths) != len(w.heads) or len(w.depths) != _SIDES:
            raise ValueError("depths and heads must have four values each")
        if patch_order not in ("columns", "channels"):
            raise ValueError(f"patch_order {patch_order} is neither columns nor channels")
        self.patch_order: PatchOrder = patch_order
        self.bb = Swin(w.channels, w.depths, w.heads, w.window)
        channels = [2 * w.channels << i for i in (3, 2, 1, 0)]
        self.squeeze_module = nn.Sequential(DecoderBlock(sum(channels), channels[0]))
        self.decoder = Decoder(channels, patch_order)

    @staticmethod
    def normalised(pixels: Tensor) -> Tensor:
        """Pixels from 0 to 255, `(B, 3, H, W)`, as the network takes them: ImageNet's mean and
        deviation are taken out.
        """
        mean, deviation = (pixels.new_tensor(v).reshape(3, 1, 1) for v in (_MEAN, _DEVIATION))
        return (pixels / 255 - mean) / deviation

    def forward(self, x: Tensor, sides: int = _SIDES) -> list[Tensor]:
        """Logits, finest first.

        Args:
            x: `(B, 3, H, W)` float, from `normalised`; sides are multiples of STRIDE.
            sides: how many of them, 1 to 4.

        Returns:
            As many tensors: `(B, 1, H, W)`, the answer, then at 1/8, 1/16 and 1/32 of the size
            what serves training.
        """
        features = self._encoded(x)
        joined = [*(resized(one, features[3]) for one in features[:3]), features[3]]
        features[3] = self.squeeze_module(torch.cat(joined, 1))
        return self.decoder(x, features, sides)

    def _encoded(self, x: Tensor) -> list[Tensor]:
        """Features of the picture and of half of it, joined at each size; finest first."""
        size = (x.shape[2] // 2, x.shape[3] // 2)
        half = self.bb(F.interpolate(x, size=size, mode="bilinear", align_corners=True))
        return [
            torch.cat((one, resized(other, one)), 1)
            for one, other in zip(self.bb(x), half, strict=True)
        ]


def picture_patches(x: Tensor, grid: int, order: PatchOrder) -> Tensor:
    """`(B, C, grid H, grid W)` to `(B, C grid grid, H, W)`: the patches of a picture as channels.

    Args:
        x: the picture.
        grid: patches in each direction.
        order: see `BiRefNet`.
    """
    rows, channels, height, width = x.shape
    patches = x.view(rows, channels, grid, height // grid, grid, width // grid)
    places = (0, 4, 2, 1, 3, 5) if order == "columns" else (0, 1, 2, 4, 3, 5)
    return patches.permute(places).flatten(1, 3)


def resized(x: Tensor, like: Tensor) -> Tensor:
    """`x` at the height and width of `like`, bilinearly; corners stay on corners."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=True)
