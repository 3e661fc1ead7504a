"""Background removal with IS-Net: RMBG-1.4 and smaller networks of its kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from deployments.buckets import resize
from deployments.contract import BackgroundRequest
from deployments.engine.pipeline import Work
from deployments.errors import ModelFailed
from deployments.images import Picture
from deployments.pipelines import networks
from deployments.pipelines.lanes import Lanes
from deployments.pipelines.nets.isnet import ISNet, ISNetWidths

if TYPE_CHECKING:
    from collections.abc import Generator, Hashable, Sequence
    from pathlib import Path

    from deployments.contract import ImageRequest
    from deployments.engine.row import Pixels, Row
    from deployments.registry import ModelSpec


@dataclass(slots=True)
class _Mask:
    """Left on the device, so that no pass waits for it: `H x W` in [0, 1]; without any NaN."""

    alpha: torch.Tensor
    valid: torch.Tensor


class Matting:
    """One forward pass a row at the network's own square size, whatever the picture's size.

    `config.json` may say `input_px` (1024), `widths` (RMBG-1.4's) and `stretch` (true): RMBG-1.4
    stretches each mask to the full range; a calibrated network does without.
    """

    def __init__(
        self, spec: ModelSpec, folder: Path, device: str, lanes: Lanes | None = None
    ) -> None:
        config = networks.read_config(spec, folder)
        self._stretch = bool(config.get("stretch", True))
        self._device = device
        self._lanes = lanes or Lanes()
        self._dtype = getattr(torch, spec.dtype)
        with networks.building(spec):
            self._input_px = int(config.get("input_px", 1024))
            self._net = ISNet(ISNetWidths(**config.get("widths", {})))
        networks.load_weights(self._net, spec, folder, device)

    def fit(self, picture: Picture, request: ImageRequest) -> Pixels:
        return resize(picture.rgb, self._input_px, self._input_px)

    def to(self, device: str) -> None:
        self._net.to(device)
        self._device = device

    def work(self, width_px: int, height_px: int, request: ImageRequest) -> Work:
        return Work(1, self._input_px**2, self._input_px**2)

    def cost_px(self, row: Row) -> int:
        return self._input_px**2

    def begin(self, row: Row) -> Generator[None, None, None]:
        row.state, row.steps_left = torch.from_numpy(row.pixels).to(self._device), 1
        yield from ()

    def key(self, row: Row) -> Hashable:
        return "one size"

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> None:
        stacked = torch.stack([cast("torch.Tensor", row.state) for row in rows])
        x = stacked.permute(0, 3, 1, 2).to(self._dtype) / 255 - 0.5
        # Half precision is fine for the network and too coarse for a soft edge.
        alpha = self._lanes.run(lambda part: self._net(x[part], sides=1)[0], len(rows))
        alpha = alpha.float().sigmoid()[:, 0]
        if self._stretch:
            low, high = alpha.amin((1, 2), keepdim=True), alpha.amax((1, 2), keepdim=True)
            alpha = (alpha - low) / (high - low).clamp(min=1e-6)
        finite = alpha.isfinite().all(dim=2).all(dim=1)
        for row, mask, valid in zip(rows, alpha, finite, strict=True):
            row.state = _Mask(mask, valid)

    def finish(self, row: Row) -> Generator[None, None, Pixels]:
        yield from ()
        mask = cast("_Mask", row.state)
        if not mask.valid.item():
            raise ModelFailed(
                "The model gave no valid mask for this picture (NaN).",
                value="NaN",
                remedy="Try another picture.",
            )
        return (mask.alpha * 255).round().to(torch.uint8).cpu().numpy()

    def restore(self, output: Pixels, picture: Picture, request: ImageRequest) -> Picture:
        request = cast("BackgroundRequest", request)
        alpha = resize(output, picture.width_px, picture.height_px)
        if picture.alpha is not None:
            alpha = (alpha.astype(np.uint16) * picture.alpha // 255).astype(np.uint8)
        if request.output == "mask":
            return Picture(alpha, None, picture.notes)
        if request.output == "rgba":
            return Picture(picture.rgb, alpha, picture.notes)
        colour = np.array(list(bytes.fromhex(request.color[1:])), np.float32)
        share = alpha[..., None].astype(np.float32) / 255
        mixed = picture.rgb * share + colour * (1 - share)
        return Picture(mixed.round().astype(np.uint8), None, picture.notes)


PIPELINE = Matting
