"""The speed options: each is one change to what deployments/ does."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from benchmarks.gpu.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.gpu.workloads import Workload
    from deployments.registry import NoisePrecision

_WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class Options:
    """How ours runs. The defaults are what deployments/ does, except for `noise`.

    Attributes:
        dtype, vae_dtype: None as served.
        channels_last: memory format of all networks.
        fused_qkv: one matrix product for query, key and value.
        attention: of the UNet.
        compiled: a mode of torch.compile.
        padded: passes are filled up to a few fixed numbers of rows.
        graphs: a CUDA graph for each of those sizes.
        remembered: device and dtype of the UNet are looked up once.
        group: up to this many rows share a step, whenever they are there; None lets the engine
            choose, up to the workload's own.
        exact: every row steps alone.
        noise: dtype that noise is drawn in. By default the model's, because pictures are compared
            with those of stock diffusers, which draws so.
    """

    dtype: torch.dtype | None = None
    vae_dtype: torch.dtype | None = None
    channels_last: bool = False
    fused_qkv: bool = False
    attention: Literal["sdpa", "cudnn", "xformers"] = "sdpa"
    compiled: str | None = None
    padded: bool = False
    graphs: bool = False
    remembered: bool = False
    group: int | None = None
    exact: bool = False
    noise: NoisePrecision = "model"


BASE = Options()
OPTIONS: dict[str, Options] = {
    "remembered": Options(remembered=True),
    "channels_last": Options(channels_last=True),
    "fused_qkv": Options(fused_qkv=True),
    "cudnn_attention": Options(attention="cudnn"),
    "graphs": Options(padded=True, graphs=True),
    "compile": Options(compiled="default", padded=True),
    "bf16": Options(dtype=torch.bfloat16, vae_dtype=torch.bfloat16),
    "vae_bf16": Options(vae_dtype=torch.bfloat16),
    "vae_fp32": Options(vae_dtype=torch.float32),
    "group_1": Options(group=1),
    "group_2": Options(group=2),
    "group_4": Options(group=4),
    "group_8": Options(group=8),
    "xformers": Options(attention="xformers"),
    "padded": Options(padded=True),
    "exact": Options(group=1, exact=True),
    "compile_reduce_overhead": Options(compiled="reduce-overhead", padded=True),
    "compile_max_autotune": Options(compiled="max-autotune-no-cudagraphs", padded=True),
}
"""In the order of trial: the most promising first, the slowest to compile last."""
FIRST = 6
"""This many are tried before any other workload is measured."""
COMPILE_S = {"compile": 90, "compile_reduce_overhead": 120, "compile_max_autotune": 300}
"""Seconds that an option takes to compile and measure."""
_EXCLUSIVE = ({"graphs", "compile_reduce_overhead"}, {"fused_qkv", "xformers"})


def applicable(workload: Workload) -> list[str]:
    """The options that apply to a workload."""
    vae = ARCHITECTURES[workload.model].vae
    if vae is None:
        return [name for name, options in OPTIONS.items() if not _is_for_diffusion(options)]
    # An autoencoder that overflows in float16 is in float32 already.
    return [name for name in OPTIONS if name != "vae_fp32" or not vae.get("force_upcast", True)]


def _is_for_diffusion(options: Options) -> bool:
    of_unet = options.remembered or options.fused_qkv or options.attention != "sdpa"
    return of_unet or (options.vae_dtype is not None and options.dtype is None)


def missing(name: str, device: str) -> str | None:
    """Why an option cannot be tried here; None if it can."""
    options = OPTIONS[name]
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    if device != "cuda":
        of_gpus = options.compiled or options.graphs or options.attention != "sdpa"
        return "needs a GPU" if of_gpus else None
    old = torch.cuda.get_device_capability() < (8, 0)
    return "needs sm80" if old and torch.bfloat16 in (options.dtype, options.vae_dtype) else None


def combine(names: Sequence[str]) -> Options:
    """All of these options in one."""
    return replace(BASE, **{key: value for name in names for key, value in _changes(name).items()})


def _changes(name: str) -> dict[str, Any]:
    values = {field.name: getattr(OPTIONS[name], field.name) for field in fields(Options)}
    return {key: value for key, value in values.items() if value != getattr(BASE, key)}


def are_rivals(one: str, other: str) -> bool:
    """Whether only one of two options can be on."""
    shared = _changes(one).keys() & _changes(other).keys() - {"padded"}
    return bool(shared) or {one, other} in _EXCLUSIVE


def winners(gains: dict[str, float], least: float) -> list[str]:
    """What to switch on: every option that gains at least so much, the best one of rivals."""
    chosen: list[str] = []
    for name in sorted(gains, key=gains.__getitem__, reverse=True):
        if gains[name] >= least and not any(are_rivals(name, one) for one in chosen):
            chosen.append(name)
    return [name for name in OPTIONS if name in chosen]


def fixed_sizes(options: Options, places: int) -> tuple[int, ...]:
    """The numbers of rows that passes of at most `places` rows are filled up to: powers of two,
    but only one where each takes long to compile.
    """
    if options.compiled:
        return (places,)
    return tuple(dict.fromkeys([*(1 << i for i in range(places.bit_length())), places]))


def apply(module: Any, options: Options, places: int) -> Any:
    """A network with the options applied; the given one is not changed.

    Args:
        module: the UNet, or the only network.
        options: what to apply.
        places: the most rows of a pass.
    """
    changed = options.dtype or options.channels_last or options.fused_qkv or options.compiled
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
    if options.compiled:
        module = torch.compile(module, mode=options.compiled, dynamic=False)
    if options.attention == "cudnn":
        module = CudnnAttention(module)
    if options.graphs:
        module = Graphed(module)
    if options.padded:
        module = Padded(module, fixed_sizes(options, places))
    return Remembered(module) if options.remembered else module


def apply_vae(vae: Any, options: Options) -> Any:
    """An autoencoder with the options applied; the given one is not changed."""
    if options.vae_dtype is None and not options.channels_last:
        return vae
    layout = torch.channels_last if options.channels_last else torch.preserve_format
    return copy.deepcopy(vae).to(dtype=options.vae_dtype or vae.dtype, memory_format=layout)


class Wrapper:
    """A network whose calls are wrapped; its attributes are the network's."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)


class Remembered(Wrapper):
    """Looks device and dtype up once; diffusers walks through all parts of a network each time."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.device, self.dtype = module.device, module.dtype


class CudnnAttention(Wrapper):
    """Prefers cuDNN's attention to the kernel that torch would choose."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        order += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(order, set_priority=True):
            return self._module(*args, **kwargs)


class Padded(Wrapper):
    """Fills each pass up to one of a few numbers of rows, with copies of its first row.

    Args:
        sizes: ascending; a larger pass goes through as it is.
    """

    def __init__(self, module: Any, sizes: Sequence[int]) -> None:
        super().__init__(module)
        self._sizes = sizes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows = args[0].shape[0]
        size = next((size for size in self._sizes if size >= rows), rows)
        if size == rows:
            return self._module(*args, **kwargs)

        def fill(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return torch.cat([value, value[:1].expand(size - rows, *value.shape[1:])])

        args, kwargs = tree_map(fill, (args, kwargs))
        return tree_map(lambda value: value[:rows], self._module(*args, **kwargs))


class Graphed(Wrapper):
    """Replays recorded passes; the first pass of each size is recorded.

    The first pass of a size must not run beside other work on the device.

    Args:
        record: makes a replay of work whose inputs and outputs stay where they are.
    """

    def __init__(
        self,
        module: Any,
        record: Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]] | None = None,
    ) -> None:
        super().__init__(module)
        self._record = record or record_graph
        self._known: dict[Any, tuple[list[torch.Tensor], Callable[[], None], Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values, shape = tree_flatten((args, kwargs))
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        key = tuple(tuple(tensor.shape) for tensor in tensors)
        if key not in self._known:
            self._known[key] = self._recorded(values, shape)
        kept, replay, output = self._known[key]
        for place, tensor in zip(kept, tensors, strict=True):
            place.copy_(tensor)
        replay()
        # The next replay overwrites these outputs.
        return tree_map(torch.clone, output)

    def _recorded(self, values: list[Any], shape: Any) -> Any:
        own = [value.clone() if isinstance(value, torch.Tensor) else value for value in values]
        args, kwargs = tree_unflatten(own, shape)
        replay, output = self._record(lambda: self._module(*args, **kwargs))
        return [value for value in own if isinstance(value, torch.Tensor)], replay, output


def record_graph(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """The replay of a CUDA graph of `work`, and the outputs that every replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Libraries choose and load their kernels in the first passes.
        for _ in range(_WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = work()
    return graph.replay, output
