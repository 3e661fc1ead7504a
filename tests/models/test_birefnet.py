"""BiRefNet by the names and shapes of its published weights, beside its equations written out."""

from __future__ import annotations

import json
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from stock import as_row
from torch.nn import functional as F
from transformers import SwinBackbone, SwinConfig

from deployments.contract import BackgroundRequest
from deployments.errors import ModelCorrupt
from deployments.images import Picture
from deployments.pipelines.nets.birefnet import BiRefNet, BiRefNetWidths, picture_patches
from deployments.pipelines.nets.deformable import deformable_conv
from deployments.pipelines.nets.swin import Block, Swin, regions_apart
from deployments.pipelines.recognise import recognise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from deployments.pipelines.nets.birefnet import PatchOrder

    State = dict[str, Tensor]
    Shape = tuple[int, ...]

LITE = BiRefNetWidths(96, (2, 2, 6, 2), (3, 6, 12, 24), 7)
NARROW = BiRefNetWidths(8, (1, 2, 1, 1), (1, 2, 2, 4), 2)


def as_config(widths: BiRefNetWidths) -> dict[str, object]:
    """Widths as a `config.json` has them."""
    return json.loads(json.dumps(vars(widths)))


def seeded(net: torch.nn.Module) -> torch.nn.Module:
    """`net` with weights and statistics that leave nothing out."""
    torch.manual_seed(0)
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        if name.endswith("running_var"):
            value.data.uniform_(0.5, 1.5)
        elif name.endswith("offset_conv.weight"):
            value.data.normal_(0, 0.1)  # some pixels far
        elif name.endswith(("bias", "running_mean", "bias_table")):
            value.data.normal_(0, 0.3)
    return net.eval()


def small(order: PatchOrder = "columns") -> BiRefNet:
    torch.manual_seed(0)
    net = seeded(BiRefNet(NARROW, order))
    assert isinstance(net, BiRefNet)
    return net


# The published names, as the authors' source builds them.


def convolution(
    name: str, outputs: int, inputs: int, kernel: int, *, bias: bool = True
) -> dict[str, Shape]:
    own: dict[str, Shape] = {f"{name}.weight": (outputs, inputs, kernel, kernel)}
    return own | ({f"{name}.bias": (outputs,)} if bias else {})


def norm(name: str, channels: int, *, batch: bool = True) -> dict[str, Shape]:
    own: dict[str, Shape] = {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}
    if batch:
        own |= {f"{name}.running_mean": (channels,), f"{name}.running_var": (channels,)}
        own |= {f"{name}.num_batches_tracked": ()}
    return own


def linear(name: str, outputs: int, inputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def swin_names(w: BiRefNetWidths) -> Iterator[dict[str, Shape]]:
    yield convolution("bb.patch_embed.proj", w.channels, 3, 4)
    yield norm("bb.patch_embed.norm", w.channels, batch=False)
    for i, (depth, heads) in enumerate(zip(w.depths, w.heads, strict=True)):
        c = w.channels * 2**i
        for j in range(depth):
            block = f"bb.layers.{i}.blocks.{j}"
            yield norm(f"{block}.norm1", c, batch=False) | norm(f"{block}.norm2", c, batch=False)
            yield linear(f"{block}.attn.qkv", 3 * c, c) | linear(f"{block}.attn.proj", c, c)
            yield linear(f"{block}.mlp.fc1", 4 * c, c) | linear(f"{block}.mlp.fc2", c, 4 * c)
            bias = f"{block}.attn.relative_position"
            yield {f"{bias}_bias_table": ((2 * w.window - 1) ** 2, heads)}
            yield {f"{bias}_index": (w.window**2, w.window**2)}
        if i < 3:
            down = f"bb.layers.{i}.downsample"
            yield {f"{down}.reduction.weight": (2 * c, 4 * c)}
            yield norm(f"{down}.norm", 4 * c, batch=False)
        yield norm(f"bb.norm{i}", c, batch=False)


def block_names(name: str, inputs: int, outputs: int) -> Iterator[dict[str, Shape]]:
    yield convolution(f"{name}.conv_in", 64, inputs, 3) | norm(f"{name}.bn_in", 64)
    yield convolution(f"{name}.conv_out", outputs, 64, 3) | norm(f"{name}.bn_out", outputs)
    att = f"{name}.dec_att"
    branches = [("aspp1", 1), ("aspp_deforms.0", 1), ("aspp_deforms.1", 3), ("aspp_deforms.2", 7)]
    for branch, kernel in branches:
        taps = f"{att}.{branch}.atrous_conv"
        yield convolution(f"{taps}.offset_conv", 2 * kernel**2, 64, kernel)
        yield convolution(f"{taps}.modulator_conv", kernel**2, 64, kernel)
        yield convolution(f"{taps}.regular_conv", 256, 64, kernel, bias=False)
        yield norm(f"{att}.{branch}.bn", 256)
    yield convolution(f"{att}.global_avg_pool.1", 256, 64, 1, bias=False)
    yield norm(f"{att}.global_avg_pool.2", 256)
    yield convolution(f"{att}.conv1", 64, 5 * 256, 1, bias=False) | norm(f"{att}.bn1", 64)


def published(w: BiRefNetWidths) -> dict[str, Shape]:
    """Shapes by name: mul_scl_ipt=cat, cxt_num=3, squeeze_block=BasicDecBlk_x1, dec_ipt_split,
    dec_att=ASPPDeformable, ms_supervision, out_ref.
    """
    x4, x3, x2, x1 = (2 * w.channels * 2**i for i in (3, 2, 1, 0))
    found = [*swin_names(w), *block_names("squeeze_module.0", x4 + x3 + x2 + x1, x4)]
    looks = {5: (3072, x4 // 8), 4: (768, x4 // 8), 3: (192, x3 // 8), 2: (48, x2 // 8)}
    for i, (inputs, outputs) in (looks | {1: (3, x1 // 8)}).items():
        found.append(convolution(f"decoder.ipt_blk{i}.conv1", 64, inputs, 3))
        found.append(convolution(f"decoder.ipt_blk{i}.conv_out", outputs, 64, 3))
    levels = {4: (x4 + x4 // 8, x3), 3: (x3 + x4 // 8, x2), 2: (x2 + x3 // 8, x1)}
    for i, (inputs, outputs) in (levels | {1: (x1 + x2 // 8, x1 // 2)}).items():
        found.extend(block_names(f"decoder.decoder_block{i}", inputs, outputs))
    found.append(convolution("decoder.conv_out1.0", 1, x1 // 2 + x1 // 8, 1))
    for i, c in ((4, x3), (3, x2), (2, x1)):
        found.append(convolution(f"decoder.lateral_block{i}.conv", c, c, 1))
        found.append(convolution(f"decoder.conv_ms_spvn_{i}", 1, c, 1))
        found.append(convolution(f"decoder.gdt_convs_{i}.0", 16, c, 3))
        found.append(norm(f"decoder.gdt_convs_{i}.1", 16))
        for use in ("pred", "attn"):
            found.append(convolution(f"decoder.gdt_convs_{use}_{i}.0", 1, 16, 1))
    return {name: shape for one in found for name, shape in one.items()}


def file_bytes(state: State, dtype: str, width: int) -> int:
    """Bytes of the safetensors file that transformers writes of these tensors."""
    whole = {name: value for name, value in state.items() if value.dtype == torch.int64}
    header, end = dict[str, object](__metadata__={"format": "pt"}), 0
    order = [*((n, "I64", 8) for n in sorted(whole)), *((n, dtype, width) for n in sorted(state))]
    for name, kind, size in order:
        if name in header or (name in whole and kind != "I64"):
            continue
        shape, start = list(state[name].shape), end
        end += size * prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + text + -text % 8 + end


@pytest.mark.parametrize(
    ("widths", "keys", "parameters", "stored", "size_bytes"),
    [
        pytest.param(None, 754, 220_176_498, ("F16", 2), 444_473_596, id="BiRefNet"),
        pytest.param(LITE, 586, 44_313_720, ("F32", 4), 177_634_392, id="BiRefNet_lite"),
    ],
)
def test_names_shapes_and_file_size_are_the_published_ones(
    widths: BiRefNetWidths | None,
    keys: int,
    parameters: int,
    stored: tuple[str, int],
    size_bytes: int,
) -> None:
    with torch.device("meta"):
        net = BiRefNet(widths)
    state = net.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes == published(widths or BiRefNetWidths())
    assert len(state) == keys
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert file_bytes(state, *stored) == size_bytes
    found = recognise(shapes)
    assert (found.title, found.differences) == ("BiRefNet", [])
    assert found.config["widths"] == as_config(widths or BiRefNetWidths())
    assert found.unknown == {"input_px": 1024, "stretch": False, "patch_order": "columns"}


# The equations of deformable convolution, place by place.


def read(picture: np.ndarray, y: float, x: float) -> np.ndarray:
    """All channels of a picture at a place between its pixels; 0 outside."""
    top, left = int(np.floor(y)), int(np.floor(x))
    total = np.zeros(picture.shape[0])
    for j in (top, top + 1):
        for i in (left, left + 1):
            if 0 <= j < picture.shape[1] and 0 <= i < picture.shape[2]:
                total += picture[:, j, i] * (1 - abs(y - j)) * (1 - abs(x - i))
    return total


def slow_deformable(x: Tensor, weight: Tensor, offset: Tensor, modulation: Tensor) -> Tensor:
    kernel, (height, width) = weight.shape[-1], x.shape[2:]
    taps = weight.double().numpy()
    result = np.zeros((x.shape[0], weight.shape[0], height, width))
    for row, picture in enumerate(x.double().numpy()):
        moves = offset[row].double().numpy()
        for tap in range(kernel**2):
            i, j = divmod(tap, kernel)
            for y, across in np.ndindex(height, width):
                down_px, right_px = moves[2 * tap : 2 * tap + 2, y, across]
                there = y + i - kernel // 2 + down_px, across + j - kernel // 2 + right_px
                seen = read(picture, *there) * float(modulation[row, tap, y, across])
                result[row, :, y, across] += taps[:, :, i, j] @ seen
    return torch.from_numpy(result).to(x.dtype)


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("size", [(5, 4), (1, 6)])
def test_deformable_convolution_computes_its_equations(kernel: int, size: tuple[int, int]) -> None:
    torch.manual_seed(kernel)
    x, weight = torch.randn(2, 3, *size), torch.randn(4, 3, kernel, kernel)
    offset = 2 * torch.randn(2, 2 * kernel**2, *size)  # some reach beyond every edge
    offset[0, :, 0] = 1.0  # whole pixels
    offset[1, :, 0] = -40.0
    modulation = 2 * torch.rand(2, kernel**2, *size)
    expected = slow_deformable(x, weight, offset, modulation)
    found = deformable_conv(x, weight, offset, modulation)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_without_offsets_it_is_a_plain_convolution() -> None:
    x, weight = torch.randn(1, 3, 6, 5), torch.randn(2, 3, 3, 3)
    found = deformable_conv(x, weight, torch.zeros(1, 18, 6, 5), torch.ones(1, 9, 6, 5))
    torch.testing.assert_close(found, F.conv2d(x, weight, padding=1), rtol=1e-5, atol=1e-5)


def test_half_precision_reads_at_exact_places() -> None:
    ramp = torch.arange(256).half()[None, None, None] / 256
    offset = torch.zeros(1, 2, 1, 256).half()
    offset[:, 1] = 0.0625  # lost beside 255 in float16
    found = deformable_conv(ramp, torch.ones(1, 1, 1, 1).half(), offset, torch.ones_like(ramp))
    expected = (torch.arange(255) + 0.0625) / 256
    torch.testing.assert_close(found[0, 0, 0, :255].float(), expected, rtol=0, atol=3e-4)
    assert (found[0, 0, 0, 1:255] > ramp[0, 0, 0, 1:255]).float().mean() > 0.2


# The encoder.


def as_published(state: State) -> State:
    """The weights of a `SwinBackbone` of transformers by our names."""
    found = dict[str, torch.Tensor]()
    for name, value in state.items():
        name = name.replace("swin.embeddings.patch_embeddings.projection", "patch_embed.proj")
        name = name.replace("swin.embeddings.norm", "patch_embed.norm")
        name = name.replace("swin.encoder.layers", "layers")
        name = name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
        name = name.replace("attention.o_proj", "attn.proj")
        name = name.replace("attention.relative_position_bias.", "attn.")
        for i in range(4):
            name = name.replace(f"hidden_states_norms.stage{i + 1}", f"norm{i}")
        if not name.startswith("swin.layernorm"):
            found[name] = value
    for name in [name for name in found if "attention.q_proj" in name]:
        parts = [found.pop(name.replace("q_proj", f"{one}_proj")) for one in "qkv"]
        found[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return found


@torch.no_grad()
@pytest.mark.parametrize("size", [(96, 96), (112, 160)])
def test_the_encoder_is_the_swin_transformer_of_transformers(size: tuple[int, int]) -> None:
    widths = BiRefNetWidths(8, (2, 2, 3, 2), (1, 2, 2, 4), 2)
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=size,
        embed_dim=widths.channels,
        depths=list(widths.depths),
        num_heads=list(widths.heads),
        window_size=widths.window,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    theirs = seeded(SwinBackbone(config))
    ours = Swin(widths.channels, widths.depths, widths.heads, widths.window).eval()
    missing = ours.load_state_dict(as_published(theirs.state_dict()), strict=False)
    assert not missing.unexpected_keys
    assert all(name.endswith("relative_position_index") for name in missing.missing_keys)
    x = torch.randn(2, 3, *size)
    for one, other in zip(ours(x), theirs(x).feature_maps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert one.std() > 0.1


def slow_block(block: Block, x: Tensor) -> Tensor:
    """A shifted block, place by place: each sees those of its window that the shift left beside
    it; places beyond the edges are zeros.
    """
    state, window, shift = block.state_dict(), block.window, block.shift
    height, width, channels = x.shape
    sides = [side + -side % window for side in (height, width)]
    hidden = torch.zeros(*sides, channels)
    hidden[:height, :width] = block.norm1(x)
    q, k, v = block.attn.qkv(hidden).chunk(3, -1)
    table = state["attn.relative_position_bias_table"]

    def region(place: int, side: int) -> tuple[int, int, int]:
        place = (place - shift) % side
        return place // window, place % window, (place >= side - window) + (place >= side - shift)

    everywhere = list(np.ndindex(*sides))
    at = {p: [region(n, side) for n, side in zip(p, sides, strict=True)] for p in everywhere}
    mixed = torch.zeros(height, width, channels)
    each = channels // block.attn.heads
    for p in np.ndindex(height, width):
        seen = [
            o
            for o in everywhere
            if all(a[::2] == b[::2] for a, b in zip(at[p], at[o], strict=True))
        ]
        for head in range(block.attn.heads):
            part = slice(head * each, (head + 1) * each)
            logits = torch.stack([q[p][part] @ k[o][part] / each**0.5 for o in seen])
            for n, o in enumerate(seen):
                apart = [a[1] - b[1] + window - 1 for a, b in zip(at[p], at[o], strict=True)]
                logits[n] += table[apart[0] * (2 * window - 1) + apart[1], head]
            mixed[p][part] = logits.softmax(0) @ torch.stack([v[o][part] for o in seen])
    x = x + block.attn.proj(mixed)
    return x + block.mlp(block.norm2(x))


@torch.no_grad()
@pytest.mark.parametrize("size", [(3, 5), (8, 4), (1, 1)])
def test_a_shifted_block_sees_what_lies_together(size: tuple[int, int]) -> None:
    block = seeded(Block(4, 2, 4, shifted=True))
    assert isinstance(block, Block)
    x = torch.randn(2, *size, 4)
    found = block(x, regions_apart(x, block.window))
    expected = torch.stack([slow_block(block, row) for row in x])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# The decoder, from a state dict alone.


def convolve(state: State, name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2)


def normed(state: State, name: str, x: Tensor) -> Tensor:
    names = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(state[f"{name}.{one}"] for one in names))


def grown(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=True)


def branch(state: State, name: str, x: Tensor) -> Tensor:
    offset = convolve(state, f"{name}.atrous_conv.offset_conv", x)
    modulation = 2 * torch.sigmoid(convolve(state, f"{name}.atrous_conv.modulator_conv", x))
    weight = state[f"{name}.atrous_conv.regular_conv.weight"]
    return normed(state, f"{name}.bn", slow_deformable(x, weight, offset, modulation)).relu()


def decoder_block(state: State, name: str, x: Tensor) -> Tensor:
    x = normed(state, f"{name}.bn_in", convolve(state, f"{name}.conv_in", x)).relu()
    att = f"{name}.dec_att"
    names = ("aspp1", "aspp_deforms.0", "aspp_deforms.1", "aspp_deforms.2")
    parts = [branch(state, f"{att}.{one}", x) for one in names]
    mean = convolve(state, f"{att}.global_avg_pool.1", x.mean((2, 3), keepdim=True))
    mean = normed(state, f"{att}.global_avg_pool.2", mean).relu()
    x = convolve(state, f"{att}.conv1", torch.cat((*parts, grown(mean, x)), 1))
    x = normed(state, f"{att}.bn1", x).relu()
    return normed(state, f"{name}.bn_out", convolve(state, f"{name}.conv_out", x))


def patches(x: Tensor, grid: int, order: PatchOrder) -> Tensor:
    height, width = x.shape[2] // grid, x.shape[3] // grid

    def patch(row: int, column: int) -> Tensor:
        top, left = row * height, column * width
        return x[:, :, top : top + height, left : left + width]

    if order == "columns":
        return torch.cat([patch(i, j) for j in range(grid) for i in range(grid)], 1)
    found = [patch(i, j) for i in range(grid) for j in range(grid)]
    return torch.cat([one[:, c : c + 1] for c in range(x.shape[1]) for one in found], 1)


def reference(net: BiRefNet, x: Tensor, order: PatchOrder) -> list[Tensor]:
    """Logits, finest first. The encoder is the network's own, which transformers vouches for."""
    state = net.state_dict()
    half = F.interpolate(
        x, size=(x.shape[2] // 2, x.shape[3] // 2), mode="bilinear", align_corners=True
    )
    features = [
        torch.cat((a, grown(b, a)), 1) for a, b in zip(net.bb(x), net.bb(half), strict=True)
    ]
    x1, x2, x3, x4 = features
    hidden = torch.cat((grown(x1, x4), grown(x2, x4), grown(x3, x4), x4), 1)
    hidden = decoder_block(state, "squeeze_module.0", hidden)
    coarse = list[torch.Tensor]()

    def look(i: int, grid: int) -> Tensor:
        name = f"decoder.ipt_blk{i}"
        seen = convolve(state, f"{name}.conv1", patches(x, grid, order))
        return convolve(state, f"{name}.conv_out", seen)

    for level, skip in ((4, x3), (3, x2), (2, x1)):
        hidden = torch.cat((hidden, look(level + 1, 2 ** (level + 1))), 1)
        hidden = decoder_block(state, f"decoder.decoder_block{level}", hidden)
        coarse.insert(0, convolve(state, f"decoder.conv_ms_spvn_{level}", hidden))
        gradients = convolve(state, f"decoder.gdt_convs_{level}.0", hidden)
        gradients = normed(state, f"decoder.gdt_convs_{level}.1", gradients).relu()
        hidden = hidden * convolve(state, f"decoder.gdt_convs_attn_{level}.0", gradients).sigmoid()
        hidden = grown(hidden, skip) + convolve(state, f"decoder.lateral_block{level}.conv", skip)
    hidden = decoder_block(state, "decoder.decoder_block1", torch.cat((hidden, look(2, 4)), 1))
    whole = torch.cat((grown(hidden, x), look(1, 1)), 1)
    return [convolve(state, "decoder.conv_out1.0", whole), *coarse]


@pytest.mark.parametrize("order", ["columns", "channels"])
@pytest.mark.parametrize("grid", [1, 2, 4])
def test_patches_of_the_picture_become_channels(order: PatchOrder, grid: int) -> None:
    x = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12)
    assert torch.equal(picture_patches(x, grid, order), patches(x, grid, order))


@torch.no_grad()
@pytest.mark.parametrize(("order", "size"), [("columns", (64, 32)), ("channels", (32, 64))])
def test_it_computes_its_equations(order: PatchOrder, size: tuple[int, int]) -> None:
    net, x = small(order), torch.randn(1, 3, *size)
    expected = reference(net, x, order)
    found = net(x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert found[0].std() > 1e-3, "else any network would do"
    assert torch.equal(net(x, sides=1)[0], found[0])


@torch.no_grad()
def test_rows_do_not_see_each_other_and_half_precision_is_near() -> None:
    net, x = small(), torch.randn(2, 3, 64, 64)
    both = net(x, sides=1)[0]
    torch.testing.assert_close(both[:1], net(x[:1], sides=1)[0], rtol=1e-4, atol=1e-5)
    half = net.half()(x.half(), sides=1)[0].float()
    assert (half.sigmoid() - both.sigmoid()).abs().max() < 0.01


# In the pipeline.


def save(folder: Path, net: BiRefNet, **config: object) -> None:
    own = {"architecture": "birefnet", "input_px": 64, "widths": as_config(NARROW)}
    config = own | config
    (folder / "config.json").write_text(json.dumps(config))
    save_file(net.state_dict(), folder / "model.safetensors")


@pytest.mark.parametrize("order", [None, "channels"])
def test_a_picture_becomes_a_mask_as_its_own_code_makes_it(
    order: PatchOrder | None, tmp_path: Path, run_together: Callable[..., None]
) -> None:
    net = small()
    save(tmp_path, net, **({"patch_order": order} if order else {}))
    pipeline = tiny.pipeline(tiny.spec("isnet", tmp_path))
    picture = tiny.picture(2, 64, 64)
    rows = [as_row(pipeline, BackgroundRequest(), p) for p in (picture, tiny.picture(3, 90, 70))]
    run_together(pipeline, rows)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    x = (torch.from_numpy(picture.rgb).permute(2, 0, 1)[None] / 255 - mean) / deviation
    with torch.no_grad():
        mask = small(order or "columns")(x, sides=1)[0].sigmoid()[0, 0].numpy()
    assert np.abs(rows[0].future.result() - 255 * mask).max() <= 1
    assert mask.std() > 0.01


def test_a_picture_is_shrunk_as_its_own_code_shrinks_it(tmp_path: Path) -> None:
    save(tmp_path, small())
    pipeline = tiny.pipeline(tiny.spec("isnet", tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (90, 210, 3), np.uint8)
    fitted = pipeline.fit(Picture(pixels, None), BackgroundRequest())
    own = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(fitted, np.asarray(own))


def test_other_weights_are_refused_with_their_names(tmp_path: Path) -> None:
    net = small()
    save(tmp_path, net)
    state = net.state_dict()
    state["decoder.conv_out2.weight"] = state.pop("decoder.conv_out1.0.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ModelCorrupt, match=r"decoder\.conv_out1\.0\.weight .* is missing"):
        tiny.pipeline(tiny.spec("isnet", tmp_path))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"input_px": 80}, "multiple of 32"),
        ({"patch_order": "rows"}, "patch_order rows"),
        ({"widths": {"channels": 8, "heads": [3, 2, 2, 4]}}, "3 heads do not divide 8"),
        ({"widths": {"depths": [1, 1]}}, "four values"),
        ({"architecture": "u2net", "widths": {}, "patch_order": "columns"}, "patch_order"),
    ],
)
def test_a_network_that_cannot_be_is_refused(
    config: dict[str, object], reason: str, tmp_path: Path
) -> None:
    save(tmp_path, small(), **config)
    with pytest.raises(ModelCorrupt, match=reason):
        tiny.pipeline(tiny.spec("isnet", tmp_path))
