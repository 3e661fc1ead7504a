"""Our networks have the published weights' names and shapes, and compute what they should."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from deployments.pipelines.nets.isnet import ISNet, ISNetWidths
from deployments.pipelines.nets.margin import Margin
from deployments.pipelines.nets.rrdb import RRDB, RRDBNet
from deployments.pipelines.nets.srvgg import SRVGGNetCompact

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NARROW = ISNetWidths(
    stem=4,
    middle=(2, 2, 2, 4, 4, 4),
    out=(4, 4, 4, 8, 8, 8),
    decoder_middle=(4, 4, 2, 2, 2),
    decoder_out=(8, 8, 4, 4, 4),
)


def small_rrdb() -> RRDBNet:
    return RRDBNet(num_feat=8, num_block=2, num_grow_ch=4)


def small_srvgg() -> SRVGGNetCompact:
    return SRVGGNetCompact(num_feat=8, num_conv=3)


def small_isnet() -> ISNet:
    return ISNet(NARROW)


@pytest.mark.parametrize(
    ("build", "keys", "parameters"),
    [
        pytest.param(ISNet, 798, 44_046_790, id="RMBG-1.4"),
        pytest.param(RRDBNet, 702, 16_697_987, id="RealESRGAN_x4plus"),
        pytest.param(SRVGGNetCompact, 101, 1_213_296, id="realesr-general-x4v3"),
    ],
)
def test_default_size_is_the_published_one(
    build: Callable[[], nn.Module], keys: int, parameters: int
) -> None:
    with torch.device("meta"):
        net = build()
    assert len(net.state_dict()) == keys
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        pytest.param(
            RRDBNet,
            {
                "conv_first.weight": (64, 3, 3, 3),
                "body.0.rdb1.conv1.weight": (32, 64, 3, 3),
                "body.0.rdb1.conv4.bias": (32,),
                "body.11.rdb2.conv5.weight": (64, 192, 3, 3),
                "body.22.rdb3.conv2.weight": (32, 96, 3, 3),
                "conv_body.weight": (64, 64, 3, 3),
                "conv_up1.weight": (64, 64, 3, 3),
                "conv_up2.bias": (64,),
                "conv_hr.weight": (64, 64, 3, 3),
                "conv_last.weight": (3, 64, 3, 3),
            },
            id="rrdb",
        ),
        pytest.param(
            SRVGGNetCompact,
            {
                "body.0.weight": (64, 3, 3, 3),
                "body.0.bias": (64,),
                "body.1.weight": (64,),
                "body.2.weight": (64, 64, 3, 3),
                "body.65.weight": (64,),
                "body.66.weight": (48, 64, 3, 3),
                "body.66.bias": (48,),
            },
            id="srvgg",
        ),
        pytest.param(
            ISNet,
            {
                "conv_in.weight": (64, 3, 3, 3),
                "stage1.rebnconvin.conv_s1.weight": (64, 64, 3, 3),
                "stage1.rebnconv7.bn_s1.running_var": (32,),
                "stage5d.rebnconv1d.conv_s1.weight": (512, 512, 3, 3),
                "side1.weight": (1, 64, 3, 3),
            },
            id="isnet",
        ),
    ],
)
def test_published_keys_have_their_shapes(
    build: Callable[[], nn.Module], shapes: dict[str, tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        state = build().state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


@pytest.mark.parametrize("build", [small_rrdb, small_srvgg, small_isnet])
def test_weights_survive_a_file(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = build().eval(), build().eval()
    save_file(first.state_dict(), tmp_path / "model.safetensors")
    second.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    x = torch.rand(1, 3, 32, 32)
    before, after = first(x), second(x)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [2, 3])
def test_srvgg_enlarges_by_its_scale(scale: int) -> None:
    net = SRVGGNetCompact(num_feat=8, num_conv=3, scale=scale)
    assert net(torch.rand(1, 3, 7, 12)).shape == (1, 3, 7 * scale, 12 * scale)


def test_rrdb_doubles_what_it_folds() -> None:
    net = RRDBNet(num_feat=8, num_block=1, num_grow_ch=4, scale=2)
    assert net.conv_first.weight.shape == (8, 12, 3, 3), "as in RealESRGAN_x2plus"
    assert net(torch.rand(1, 3, 6, 14)).shape == (1, 3, 12, 28)
    with pytest.raises(ValueError, match="2 or 4"):
        RRDBNet(scale=3)


@pytest.mark.parametrize("build", [small_rrdb, small_srvgg])
@pytest.mark.parametrize("size", [(1, 1), (7, 12), (16, 9)])
def test_upscalers_quadruple_any_size(
    build: Callable[[], nn.Module], size: tuple[int, int]
) -> None:
    output = build()(torch.rand(2, 3, *size))
    assert output.shape == (2, 3, 4 * size[0], 4 * size[1])
    assert output.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("build", [small_rrdb, small_srvgg])
def test_a_margin_in_the_window_leaves_a_picture_as_it_is(
    build: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    net, sizes = build(), [(7, 12), (16, 16), (16, 5), (1, 1)]
    pictures = [torch.rand(1, 3, *size) for size in sizes]
    window = torch.zeros(len(sizes), 3, 16, 16)
    for place, picture in zip(window, pictures, strict=True):
        place[:, : picture.shape[2], : picture.shape[3]] = picture[0]

    def apart(output: torch.Tensor) -> list[float]:
        found: list[float] = []
        for one, picture, (height, width) in zip(output, pictures, sizes, strict=True):
            different = one[:, : 4 * height, : 4 * width] - net(picture)[0]
            found.append(float(different.abs().max()))
        return found

    assert max(apart(net(window, sizes=sizes))) < 1e-6
    unmarked = apart(net(window))
    assert min(unmarked[0], *unmarked[2:]) > 1e-4, "else the sizes would not matter"


def test_isnet_answers_at_the_size_of_its_input() -> None:
    sides = small_isnet().eval()(torch.rand(1, 3, 70, 65) - 0.5)
    assert [tuple(side.shape) for side in sides] == [(1, 1, 70, 65)] * 6


def test_srvgg_adds_details_to_the_nearest_neighbour_upscaling() -> None:
    net = small_srvgg()
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    x = torch.rand(1, 3, 5, 6)
    torch.testing.assert_close(net(x), F.interpolate(x, scale_factor=4), rtol=0, atol=0)


def test_rrdb_scales_every_residual_by_a_fifth() -> None:
    block = RRDB(num_feat=4, num_grow_ch=2)
    for name, parameter in block.named_parameters():
        nn.init.constant_(parameter, float(name.endswith("conv5.bias")))
    x = torch.rand(1, 4, 6, 6)
    # Each dense block adds 0.2, and a fifth of all three's output comes on top of the input.
    torch.testing.assert_close(block(x, Margin(x, None)), x + 0.2 * (x + 0.6))


def seam_error(net: SRVGGNetCompact, overlap_px: int) -> float:
    """Largest difference between a picture upscaled whole and in two overlapping halves."""
    torch.manual_seed(0)
    x, cut = torch.rand(1, 3, 24, 40), 20
    left = net(x[..., : cut + overlap_px])[..., : 4 * cut]
    right = net(x[..., cut - overlap_px :])[..., 4 * overlap_px :]
    return float((torch.cat((left, right), -1) - net(x)).abs().max())


@torch.no_grad()
def test_srvgg_tiles_equal_the_whole_from_the_receptive_field_on() -> None:
    torch.manual_seed(0)
    net = small_srvgg()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    assert net.tile_overlap_px == 5
    assert seam_error(net, net.tile_overlap_px) < 1e-5
    assert seam_error(net, net.tile_overlap_px - 1) > 1e-5
