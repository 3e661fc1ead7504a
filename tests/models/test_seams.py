"""Tiles of an upscaler show no seams: at most two levels beyond the picture in one piece.

The networks are narrow. Their weights are random, and scaled until what lies 30 px away changes a
pixel visibly, as it does with the published weights, of which none are here.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from stock import as_row
from torch import nn

from deployments.contract import UpscaleRequest
from deployments.images import Picture
from deployments.loader import build
from deployments.pipelines.upscale_gan import build_net
from deployments.settings import ROOT, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.pipelines.upscale_gan import UpscaleGan

MOST_LEVELS = 2
HEIGHT_PX = 32
TILE_PX = 64


class Network(NamedTuple):
    """A `config.json`, and a factor on the weights of the blocks."""

    config: dict[str, Any]
    gain: float


NARROW = {"architecture": "rrdb", "num_feat": 8, "num_grow_ch": 4}
NETWORKS = {
    "x4plus": Network({**NARROW, "num_block": 23}, 2.2),
    "x4plus-anime": Network({**NARROW, "num_block": 6}, 3.1),
    "x2plus": Network({**NARROW, "num_block": 6, "scale": 2}, 3.1),
    "srvgg": Network({"architecture": "srvgg", "num_feat": 8, "num_conv": 16}, 1.0),
}


def width_px(net: Any) -> int:
    """Of a picture of three tiles."""
    return 2 * net.tile_overlap_px + 2 * TILE_PX + 16


def photograph(width_px: int) -> np.ndarray:
    image = Image.open(ROOT / "docs" / "photo.jpg").convert("RGB")
    return np.array(image.crop((50, 200, 50 + width_px, 200 + HEIGHT_PX)))


def gradient(width_px: int) -> np.ndarray:
    levels = np.linspace(30, 220, width_px).round().astype(np.uint8)
    return np.broadcast_to(levels[None, :, None], (HEIGHT_PX, width_px, 3)).copy()


@torch.no_grad()
def weights(network: Network) -> dict[str, torch.Tensor]:
    """Random weights; the last layer gives the photograph's upscaling a usual mean and contrast."""
    torch.manual_seed(0)
    net = build_net(network.config)
    assert net is not None
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=0.2)
            module.weight *= network.gain if ".rdb" in name else 1.0
            nn.init.zeros_(module.bias)
    last = [module for module in net.modules() if isinstance(module, nn.Conv2d)][-1]
    picture = torch.from_numpy(photograph(64)).permute(2, 0, 1)[None] / 255
    seen = net(picture)
    last.weight *= 0.15 / seen.std()
    last.bias += 0.5 - net(picture).mean()
    return net.state_dict()


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], UpscaleGan]:
    """The pipeline of one of `NETWORKS`, through files as it is served."""

    def load(name: str) -> Any:
        folder, config = tmp_path_factory.mktemp(name), NETWORKS[name].config
        (folder / "config.json").write_text(json.dumps(config))
        save_file(weights(NETWORKS[name]), folder / "model.safetensors")
        spec = tiny.spec("rrdb", folder, tile_px=TILE_PX, times=config.get("scale"))
        return build(spec, folder, Settings(device="cpu"))

    return load


def seam(pipeline: Any, rgb: np.ndarray, run_together: Callable[..., None]) -> int:
    """The largest difference between a picture upscaled in tiles and in one piece, in levels."""
    row = as_row(pipeline, UpscaleRequest(), Picture(rgb, None))
    assert pipeline.work(rgb.shape[1], rgb.shape[0], UpscaleRequest()).steps == 3
    run_together(pipeline, [row])
    with torch.inference_mode():
        whole = pipeline._net(torch.from_numpy(rgb).permute(2, 0, 1)[None] / 255)[0]
    assert 0.05 < whole.std() < 0.5, "else levels would mean little"
    plain = (whole.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(int)
    return int(np.abs(row.future.result().astype(int) - plain).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_tiles_show_no_seams(
    name: str, upscaler: Callable[[str], UpscaleGan], run_together: Callable[..., None]
) -> None:
    pipeline: Any = upscaler(name)
    width = width_px(pipeline._net)
    most = 1 if name == "srvgg" else MOST_LEVELS  # exact, but for the order of sums
    assert seam(pipeline, gradient(width), run_together) <= most
    assert seam(pipeline, photograph(width), run_together) <= most


@pytest.mark.parametrize("name", ["x4plus", "x4plus-anime", "srvgg"])
def test_half_of_the_overlap_would_show_seams(
    name: str, upscaler: Callable[[str], UpscaleGan], run_together: Callable[..., None]
) -> None:
    pipeline: Any = upscaler(name)
    pipeline._net.tile_overlap_px //= 2
    assert seam(pipeline, photograph(width_px(pipeline._net)), run_together) > MOST_LEVELS
