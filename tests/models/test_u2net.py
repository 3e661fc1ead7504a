"""U2-Net by the names and shapes of its published weights, beside its equations written out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from stock import as_row
from torch.nn import functional as F

from deployments.contract import BackgroundRequest
from deployments.images import Picture
from deployments.pipelines.nets.u2net import U2Net, U2NetWidths

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

NARROW = U2NetWidths((2, 2, 2, 4, 4, 4), (4, 4, 4, 8, 8, 8), (4, 4, 2, 2, 2), (8, 8, 4, 4, 4))
DEPTHS = {"1": 7, "2": 6, "3": 5, "4": 4}
"""Of the stages that pool; 5 and 6 dilate instead."""


def small() -> U2Net:
    torch.manual_seed(0)
    net = U2Net(NARROW).eval()
    for name, value in net.named_buffers():
        if name.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return net


@pytest.mark.parametrize(
    ("widths", "parameters"),
    [
        pytest.param(U2NetWidths(), 44_009_869, id="u2net.pth"),
        pytest.param(
            U2NetWidths((16,) * 6, (64,) * 6, (16,) * 5, (64,) * 5), 1_131_181, id="u2netp.pth"
        ),
    ],
)
def test_the_size_is_the_published_one(widths: U2NetWidths, parameters: int) -> None:
    with torch.device("meta"):
        net = U2Net(widths)
    assert len(net.state_dict()) == 798
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_published_keys_have_their_shapes() -> None:
    with torch.device("meta"):
        state = U2Net().state_dict()
    shapes = {
        "stage1.rebnconvin.conv_s1.weight": (64, 3, 3, 3),
        "stage1.rebnconv7.bn_s1.running_var": (32,),
        "stage4.rebnconv4.conv_s1.weight": (128, 128, 3, 3),
        "stage5d.rebnconvin.conv_s1.weight": (512, 1024, 3, 3),
        "stage1d.rebnconv1d.conv_s1.bias": (64,),
        "side3.weight": (1, 128, 3, 3),
        "side6.weight": (1, 512, 3, 3),
        "outconv.weight": (1, 6, 1, 1),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


# The equations of the paper, from a state dict alone.


def convolve(state: dict[str, Tensor], name: str, x: Tensor, dilation: int = 1) -> Tensor:
    weight, bias = state[f"{name}.conv_s1.weight"], state[f"{name}.conv_s1.bias"]
    hidden = F.conv2d(x, weight, bias, padding=dilation, dilation=dilation)
    names = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(hidden, *(state[f"{name}.bn_s1.{one}"] for one in names)).relu()


def upsampled(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear")


def u_block(state: dict[str, Tensor], stage: str, x: Tensor) -> Tensor:
    depth = DEPTHS.get(stage[5])
    whole = convolve(state, f"{stage}.rebnconvin", x)
    if depth is None:
        a = convolve(state, f"{stage}.rebnconv1", whole)
        b = convolve(state, f"{stage}.rebnconv2", a, 2)
        c = convolve(state, f"{stage}.rebnconv3", b, 4)
        d = convolve(state, f"{stage}.rebnconv4", c, 8)
        up = convolve(state, f"{stage}.rebnconv3d", torch.cat((d, c), 1), 4)
        up = convolve(state, f"{stage}.rebnconv2d", torch.cat((up, b), 1), 2)
        return convolve(state, f"{stage}.rebnconv1d", torch.cat((up, a), 1)) + whole
    levels = [convolve(state, f"{stage}.rebnconv1", whole)]
    for level in range(2, depth):
        pooled = F.max_pool2d(levels[-1], 2, 2, ceil_mode=True)
        levels.append(convolve(state, f"{stage}.rebnconv{level}", pooled))
    up = convolve(state, f"{stage}.rebnconv{depth}", levels[-1], 2)
    for level in range(depth - 1, 0, -1):
        joined = torch.cat((upsampled(up, levels[level - 1]), levels[level - 1]), 1)
        up = convolve(state, f"{stage}.rebnconv{level}d", joined)
    return up + whole


def reference(state: dict[str, Tensor], x: Tensor) -> Tensor:
    encoded = [u_block(state, "stage1", x)]
    for stage in range(2, 7):
        pooled = F.max_pool2d(encoded[-1], 2, 2, ceil_mode=True)
        encoded.append(u_block(state, f"stage{stage}", pooled))
    decoded = [encoded[5]]
    for stage in range(5, 0, -1):
        skip = encoded[stage - 1]
        joined = torch.cat((upsampled(decoded[0], skip), skip), 1)
        decoded.insert(0, u_block(state, f"stage{stage}d", joined))
    sides = [
        upsampled(F.conv2d(one, state[f"side{i}.weight"], state[f"side{i}.bias"], padding=1), x)
        for i, one in enumerate(decoded, 1)
    ]
    return F.conv2d(torch.cat(sides, 1), state["outconv.weight"], state["outconv.bias"])


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (70, 45)])
def test_it_computes_its_equations(size: tuple[int, int]) -> None:
    net, x = small(), torch.randn(2, 3, *size)
    first, *sides = net(x)
    assert len(sides) == 6
    torch.testing.assert_close(first, reference(net.state_dict(), x), rtol=1e-5, atol=1e-5)
    assert first.std() > 1e-3, "else any network would do"


def test_a_picture_becomes_a_mask_as_its_own_code_makes_it(
    tmp_path: Path, run_together: Callable[..., None]
) -> None:
    net = small()
    widths = {key: list(value) for key, value in vars(NARROW).items()}
    config = {"architecture": "u2net", "input_px": 64, "widths": widths}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    pipeline = tiny.pipeline(tiny.spec("isnet", tmp_path))
    dark = Picture((tiny.picture(2, 64, 64).rgb // 2), None)
    rows = [as_row(pipeline, BackgroundRequest(), p) for p in (dark, tiny.picture(3, 64, 64))]
    run_together(pipeline, rows)
    x = torch.from_numpy(dark.rgb).permute(2, 0, 1)[None] / float(dark.rgb.max())
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(
        2, 3, 1, 1
    )
    with torch.no_grad():
        mask = reference(net.state_dict(), (x - mean) / deviation).sigmoid()[0, 0].numpy()
    expected = 255 * (mask - mask.min()) / (mask.max() - mask.min())
    assert np.abs(rows[0].future.result() - expected).max() <= 1
