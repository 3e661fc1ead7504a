"""Background removal with BiRefNet, IS-Net (RMBG-1.4 is one), U2-Net, and the starter model's own
network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from deployments.buckets import resize, sample_bilinear, shrink_bilinear
from deployments.cutout import cut_out
from deployments.engine.passes import Passes
from deployments.engine.pipeline import Work
from deployments.errors import ModelFailed
from deployments.pipelines import networks
from deployments.pipelines.guided import refined
from deployments.pipelines.lanes import Lanes
from deployments.pipelines.nets.birefnet import BiRefNet, BiRefNetWidths
from deployments.pipelines.nets.cutout import CutoutNet, CutoutWidths
from deployments.pipelines.nets.isnet import ISNet, ISNetWidths
from deployments.pipelines.nets.u2net import U2Net, U2NetWidths
from deployments.pipelines.pictures import require_picture
from deployments.transparency import WHITE, laid_over

if TYPE_CHECKING:
    from collections.abc import Generator, Hashable, Sequence
    from pathlib import Path

    from deployments.contract import BackgroundRequest
    from deployments.engine.grouping import GroupLimits
    from deployments.engine.passes import Tensors
    from deployments.engine.preparation import Preparation
    from deployments.engine.row import Pixels, RowInput
    from deployments.images import Array, Picture
    from deployments.registry import ModelSpec


@dataclass(slots=True)
class Mask:
    """A row on its way. All of it stays on the device, so that no pass waits for it.

    Attributes:
        source: the picture, `H x W x 3` uint8.
        alpha: `H x W` in [0, 1], after the step.
        valid: a scalar, after the step: whether `alpha` has no NaN.
    """

    source: torch.Tensor
    alpha: torch.Tensor = field(init=False, repr=False)
    valid: torch.Tensor = field(init=False, repr=False)


Net = ISNet | U2Net | BiRefNet | CutoutNet
_RESIZE = {"bilinear": sample_bilinear, "triangle": shrink_bilinear, "lanczos": resize}


class Matting:
    """One forward pass a row, at the network's own square size.

    `config.json` may set `architecture` (isnet, u2net, birefnet or cutout, the starter model's),
    `input_px` (1024, 320, 1024, 320), `widths` (the published ones), `patch_order` (of birefnet:
    columns), `stretch` (true; false for birefnet), `refine` (false) and `resize`. IS-Net's and
    U2-Net's own code stretches each mask to the full range; a calibrated network does without.
    `refine` moves the mask's edges to the picture's, for a small network. `resize` is how a picture
    gets to `input_px`: bilinear reads single pixels, as IS-Net's own code does, and is its default
    with `stretch`; triangle averages all of them, as BiRefNet's does; lanczos reads all of them
    too, much as U2-Net's does.
    """

    def __init__(self, spec: ModelSpec, folder: Path, lanes: Lanes | None = None) -> None:
        config = networks.read_config(spec, folder)
        self._refine = bool(config.get("refine", False))
        self._device = "cpu"
        self._lanes = lanes or Lanes()
        self._dtype = getattr(torch, spec.dtype)
        with networks.building(spec):
            self._net = build_net(config)
            config = untold(self._net) | config
            self._input_px = int(config["input_px"])
            self._stretch = bool(config["stretch"])
            self._resize = _RESIZE[config.get("resize", self._usual_resize())]
        networks.load_weights(self._net, spec, folder, self._device)
        self.passes = Passes(self._lanes.spread(self._call))

    def _usual_resize(self) -> str:
        if isinstance(self._net, BiRefNet):
            return "triangle"
        return "bilinear" if self._stretch and isinstance(self._net, ISNet) else "lanczos"

    def fit(self, picture: Picture | None, request: BackgroundRequest) -> Pixels:
        return self._resize(_on_white(require_picture(picture)), self._input_px, self._input_px)

    def to(self, device: str) -> None:
        self._net.to(device)
        self._device = device
        self.passes.clear()

    def prepare(self, how: Preparation, request: BackgroundRequest, limits: GroupLimits) -> int:
        rows = 1 if limits.exact else limits.max_batch_size
        if limits.budget_px is not None:
            rows = max(min(rows, limits.budget_px // self._input_px**2), 1)
        size = (1, 3, self._input_px, self._input_px)
        picture = torch.zeros(size, device=self._device, dtype=self._dtype)
        forward = how.compiled(self._net, self._call)
        self.passes.prepare(
            [{"picture": picture}],
            how.counts(rows),
            forward=forward and self._lanes.spread(forward),
            recorder=how.recorder,
        )
        return self.passes.prepared

    def _call(self, tensors: Tensors) -> torch.Tensor:
        return self._net(tensors["picture"], sides=1)[0]

    def work(self, width_px: int, height_px: int, request: BackgroundRequest) -> Work:
        return Work(1, self._input_px**2, self._input_px**2)

    def cost_px(self, row: RowInput[BackgroundRequest]) -> int:
        return self._input_px**2

    def begin(self, row: RowInput[BackgroundRequest]) -> Generator[None, None, Mask]:
        yield from ()
        return Mask(torch.from_numpy(row.pixels).to(self._device))

    def steps(self, state: Mask) -> int:
        return 1

    def key(self, state: Mask) -> Hashable:
        return "one size"

    @torch.inference_mode()
    def step(self, states: Sequence[Mask]) -> None:
        stacked = torch.stack([state.source for state in states])
        x = self._net.normalised(stacked.permute(0, 3, 1, 2).to(self._dtype))
        # Half precision is fine for the network, but too coarse for a soft edge.
        alpha = self.passes({"picture": x}).float().sigmoid()[:, 0]
        if self._stretch:
            low, high = alpha.amin((1, 2), keepdim=True), alpha.amax((1, 2), keepdim=True)
            alpha = (alpha - low) / (high - low).clamp(min=1e-6)
        finite = alpha.isfinite().all(dim=2).all(dim=1)
        for state, mask, valid in zip(states, alpha, finite, strict=True):
            state.alpha, state.valid = mask, valid

    def preview(self, row: RowInput[BackgroundRequest], state: Mask) -> Pixels | None:
        return None

    def finish(self, state: Mask) -> Generator[None, None, Pixels]:
        yield from ()
        if not state.valid.item():
            raise ModelFailed(
                "The model gave no valid mask for this picture (NaN).",
                value="NaN",
                remedy="Try another picture.",
            )
        return (state.alpha * 255).round().to(torch.uint8).cpu().numpy()

    def restore(
        self, output: Pixels, picture: Picture | None, request: BackgroundRequest
    ) -> Picture:
        picture = require_picture(picture)
        if self._refine:
            output = refined(output, self.fit(picture, request), _on_white(picture))
        return cut_out(picture, output, request)


def _on_white(picture: Picture) -> Array:
    """What the model sees: colours that go on behind a foreground's edges would hide it."""
    if picture.alpha is None:
        return picture.rgb
    return laid_over(picture.rgb, picture.alpha, WHITE)


PIPELINE = Matting


def build_net(config: dict[str, Any]) -> Net:
    """The network of a `config.json`, with random weights.

    Raises:
        KeyError, TypeError, ValueError: it describes none.
    """
    net, widths = _NETS[config.get("architecture", "isnet")]
    input_px = int(config.get("input_px", net.input_px))
    if net in (BiRefNet, CutoutNet) and (input_px % net.STRIDE or input_px < net.STRIDE):
        raise ValueError(f"input_px must be a multiple of {net.STRIDE}")
    order = {key: config[key] for key in ("patch_order",) if key in config}
    return net(widths(**config.get("widths", {})), **order)


def untold(net: Net) -> dict[str, Any]:
    """The keys of `config.json` that no weights tell, with the default that holds for each."""
    values = {"input_px": net.input_px, "stretch": not isinstance(net, BiRefNet)}
    return values | ({"patch_order": net.patch_order} if isinstance(net, BiRefNet) else {})


_NETS: dict[str, tuple[Any, Any]] = {
    "isnet": (ISNet, ISNetWidths),
    "u2net": (U2Net, U2NetWidths),
    "birefnet": (BiRefNet, BiRefNetWidths),
    "cutout": (CutoutNet, CutoutWidths),
}
"""The class of each architecture, and that of its widths."""
