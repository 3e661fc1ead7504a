"""The speed options: each is one change to what deployments/ does."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from benchmarks.gpu.workloads import Workload
    from deployments.registry import NoisePrecision


@dataclass(frozen=True, slots=True)
class Options:
    """How ours runs. The defaults are what deployments/ does with a model of the registry, except
    for `noise`.

    Attributes:
        mode: what torch compiles.
        graphs: whether passes are recorded as CUDA graphs.
        dtype, vae_dtype: None as served.
        channels_last: memory format of all networks.
        fused_qkv: one matrix product for query, key and value.
        attention: of the UNet.
        group: up to this many rows share a step, whenever they are there; None lets the engine
            choose, up to the workload's own.
        exact: every row steps alone.
        noise: dtype that noise is drawn in. By default the model's, because pictures are compared
            with those of stock diffusers, which draws so.
    """

    mode: Literal["off", "blocks", "full"] = "off"
    graphs: bool = True
    dtype: torch.dtype | None = None
    vae_dtype: torch.dtype | None = None
    channels_last: bool = False
    fused_qkv: bool = False
    attention: Literal["sdpa", "cudnn", "xformers"] = "sdpa"
    group: int | None = None
    exact: bool = False
    noise: NoisePrecision = "model"


BASE = Options()
PLAIN = Options(graphs=False)
FULL = Options(mode="full")
OPTIONS: dict[str, Options] = {
    "blocks": Options(mode="blocks"),
    "channels_last": Options(channels_last=True),
    "fused_qkv": Options(fused_qkv=True),
    "cudnn_attention": Options(attention="cudnn"),
    "bf16": Options(dtype=torch.bfloat16, vae_dtype=torch.bfloat16),
    "vae_bf16": Options(vae_dtype=torch.bfloat16),
    "vae_fp32": Options(vae_dtype=torch.float32),
    "group_1": Options(group=1),
    "group_2": Options(group=2),
    "group_4": Options(group=4),
    "group_8": Options(group=8),
    "xformers": Options(attention="xformers"),
    "exact": Options(group=1, exact=True),
}
"""In the order of trial: the most promising first."""


def applicable(workload: Workload) -> list[str]:
    """The options that apply to a workload."""
    vae = ARCHITECTURES[workload.model].vae
    if vae is None:
        return [name for name, options in OPTIONS.items() if not _is_for_diffusion(options)]
    # An autoencoder that overflows in float16 is in float32 already.
    return [name for name in OPTIONS if name != "vae_fp32" or not vae.get("force_upcast", True)]


def _is_for_diffusion(options: Options) -> bool:
    of_unet = options.mode == "blocks" or options.fused_qkv or options.attention != "sdpa"
    return of_unet or (options.vae_dtype is not None and options.dtype is None)


def missing(name: str, device: str) -> str | None:
    """Why an option cannot be tried here; None if it can."""
    options = OPTIONS[name]
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    if device != "cuda":
        of_gpus = options.mode != "off" or options.attention != "sdpa"
        return "needs a GPU" if of_gpus else None
    old = torch.cuda.get_device_capability() < (8, 0)
    return "needs sm80" if old and torch.bfloat16 in (options.dtype, options.vae_dtype) else None


def apply(module: Any, options: Options) -> Any:
    """A network with the options applied; the given one is not changed."""
    changed = options.dtype or options.channels_last or options.fused_qkv or options.mode != "off"
    if changed or options.attention == "xformers":
        module = copy.deepcopy(module)
    if options.dtype is not None:
        module = module.to(options.dtype)
    if options.channels_last:
        module = module.to(memory_format=torch.channels_last)
    if options.fused_qkv:
        module.fuse_qkv_projections()
    if options.attention == "xformers":
        module.enable_xformers_memory_efficient_attention()
    return CudnnAttention(module) if options.attention == "cudnn" else module


def apply_vae(vae: Any, options: Options) -> Any:
    """An autoencoder with the options applied; the given one is not changed."""
    if options.vae_dtype is None and not options.channels_last and options.mode != "full":
        return vae
    layout = torch.channels_last if options.channels_last else torch.preserve_format
    return copy.deepcopy(vae).to(dtype=options.vae_dtype or vae.dtype, memory_format=layout)


class CudnnAttention:
    """Prefers cuDNN's attention to the kernel that torch would choose.

    Args:
        module: whose calls are wrapped; all else is looked up there.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        order += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(order, set_priority=True):
            return self._module(*args, **kwargs)
