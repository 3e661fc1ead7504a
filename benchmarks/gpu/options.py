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

Attention = Literal["sdpa", "cudnn", "xformers"]
_WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class Options:
    """How ours runs. The defaults are what deployments/ does.

    Attributes:
        dtype, vae_dtype: None as served.
        channels_last: memory format of all networks.
        fused_qkv: one matrix product for query, key and value.
        attention: of the UNet.
        compiled: a mode of torch.compile.
        padded: passes are filled up to a few fixed numbers of rows.
        one_size: passes are filled up to a single number of rows.
        graphs: a CUDA graph for each of those sizes.
        remembered: device and dtype of the UNet are looked up once.
        group: up to this many rows share a step, whenever they are there; None lets the engine
            choose, up to the workload's own.
        exact: every row steps alone.
    """

    dtype: torch.dtype | None = None
    vae_dtype: torch.dtype | None = None
    channels_last: bool = False
    fused_qkv: bool = False
    attention: Attention = "sdpa"
    compiled: str | None = None
    padded: bool = False
    one_size: bool = False
    graphs: bool = False
    remembered: bool = False
    group: int | None = None
    exact: bool = False


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
    "compile_reduce_overhead": Options(compiled="reduce-overhead", padded=True),
    "compile_max_autotune": Options(compiled="max-autotune-no-cudagraphs", padded=True),
}
"""In the order of trial: the most promising first, the slowest to compile last."""
FIRST = 6
"""This many are tried before any other workload is measured."""

TITLES: dict[str, str] = {
    "remembered": "device and dtype looked up once",
    "channels_last": "channels_last",
    "fused_qkv": "fused QKV",
    "cudnn_attention": "attention by cuDNN",
    "graphs": "CUDA graphs per bucket",
    "compile": "torch.compile",
    "bf16": "bf16 throughout",
    "vae_bf16": "autoencoder in bf16",
    "vae_fp32": "autoencoder in fp32",
    "group_1": "groups of 1",
    "group_2": "groups of 2",
    "group_4": "groups of 4",
    "group_8": "groups of 8",
    "xformers": "attention by xformers",
    "padded": "passes padded to fixed sizes",
    "compile_reduce_overhead": "torch.compile, reduce-overhead",
    "compile_max_autotune": "torch.compile, max-autotune-no-cudagraphs",
}
RIVALS = (
    {"compile", "compile_reduce_overhead", "compile_max_autotune"},
    {"cudnn_attention", "xformers"},
    {"bf16", "vae_bf16", "vae_fp32"},
    {"group_1", "group_2", "group_4", "group_8"},
    {"graphs", "compile_reduce_overhead"},
    {"fused_qkv", "xformers"},
)
"""Only one option of each set can be on."""

_DIFFUSION_ONLY = {
    *("remembered", "fused_qkv", "vae_bf16", "vae_fp32", "cudnn_attention", "xformers"),
}
_DEVICE_ONLY = {
    *("cudnn_attention", "xformers", "graphs"),
    *("compile", "compile_reduce_overhead", "compile_max_autotune"),
}


def applicable(workload: Workload) -> list[str]:
    """The options that apply to a workload."""
    vae = ARCHITECTURES[workload.model].vae
    if vae is None:
        return [name for name in OPTIONS if name not in _DIFFUSION_ONLY]
    # An autoencoder that overflows in float16 is in float32 already.
    return [name for name in OPTIONS if name != "vae_fp32" or not vae.get("force_upcast", True)]


def missing(name: str, device: str) -> str | None:
    """Why an option cannot be tried here; None if it can."""
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    if name in _DEVICE_ONLY and device != "cuda":
        return "needs a GPU"
    old = device == "cuda" and torch.cuda.get_device_capability() < (8, 0)
    return "needs sm80" if old and "bf16" in name else None


def combine(names: Sequence[str]) -> Options:
    """All of these options in one."""
    changes: dict[str, Any] = {}
    for name in names:
        for field in fields(Options):
            value = getattr(OPTIONS[name], field.name)
            if value != getattr(BASE, field.name):
                changes[field.name] = value
    return replace(BASE, **changes)


def winners(gains: dict[str, float], least: float) -> list[str]:
    """What to switch on: every option that gains at least so much, the best one of rivals."""
    good = {name: gain for name, gain in gains.items() if gain >= least}
    for rivals in RIVALS:
        there = [name for name in good if name in rivals]
        for name in sorted(there, key=good.__getitem__)[:-1]:
            del good[name]
    return [name for name in OPTIONS if name in good]


def fixed_sizes(options: Options, places: int) -> tuple[int, ...]:
    """The numbers of rows that passes of at most `places` rows are filled up to: powers of two,
    but only one where each takes long to compile.
    """
    if options.compiled or options.one_size:
        return (places,)
    return tuple(dict.fromkeys([*(1 << i for i in range(places.bit_length())), places]))


def apply(module: Any, options: Options, places: int) -> Any:
    """A network with the options applied; the given one is not changed.

    Args:
        places: the most rows of a pass.
    """
    dtype = options.dtype
    changed = dtype is not None or options.channels_last or options.fused_qkv or options.compiled
    if changed or options.attention == "xformers":
        module = copy.deepcopy(module)
    if dtype is not None:
        module = module.to(dtype)
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
    if options.vae_dtype is None and not options.channels_last:
        return vae
    vae = copy.deepcopy(vae)
    if options.vae_dtype is not None:
        vae = vae.to(options.vae_dtype)
    return vae.to(memory_format=torch.channels_last) if options.channels_last else vae


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

        def cut(value: torch.Tensor) -> torch.Tensor:
            return value[:rows]

        args, kwargs = tree_map(fill, (args, kwargs))
        return tree_map(cut, self._module(*args, **kwargs))


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
