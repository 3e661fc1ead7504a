"""`make profile-gpu`: what the production models take of a GPU's memory, for `imagen plan`.

Builds each architecture at full size with random weights, runs single passes at several sizes and
row counts, and writes the peaks to configs/gpu_profiles.json. Needs torch, diffusers and
transformers; no server, no network, no weights.

    --device cuda        measures the GPU of this machine: an entry with `source: measured`
    --device meta        counts live tensors without a device: the entry with `source: estimate`
    --device cpu --tiny  a dry run of tiny networks, for tests; needs --out
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sys
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import machine
from benchmarks.gpu.architectures import (
    ARCHITECTURES,
    build_network,
    build_text_encoder,
    build_unet,
    build_vae,
    unet_inputs,
    weights_bytes,
)
from deployments.gpu.cap import CudaMemory
from deployments.gpu.profiles import PROFILES, gpu_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Values = dict[str, Any]

SIZES_PX = (512, 768, 1024)
NETWORK_ROWS = (1, 2, 4, 8)
TINY_PX = 128
_DATE = "%Y-%m-%d"


class Memory(Protocol):
    """How much memory tensors take on a device."""

    def allocated_bytes(self) -> int:
        """What they take now."""
        ...

    def peak_bytes(self) -> int:
        """The most they took since `reset_peak`."""
        ...

    def reset_peak(self) -> None: ...


class CountedMemory:
    """A `Memory` that adds up what is reserved, of a device without limits."""

    def __init__(self) -> None:
        self._taken_bytes = self._peak_bytes = 0

    def reserve(self, amount_bytes: int) -> None:
        self._taken_bytes += amount_bytes
        self._peak_bytes = max(self._peak_bytes, self._taken_bytes)

    def release(self, amount_bytes: int) -> None:
        self._taken_bytes -= amount_bytes

    def allocated_bytes(self) -> int:
        return self._taken_bytes

    def peak_bytes(self) -> int:
        return self._peak_bytes

    def reset_peak(self) -> None:
        self._peak_bytes = self._taken_bytes


class LiveTensors(TorchDispatchMode):
    """Reserves the size of every storage while it lives.

    Networks must be built inside, or their weights are counted when they are first used. Memory
    that kernels use inside (workspaces, attention), the allocator's rounding and its fragments are
    not seen.

    Args:
        memory: its `reserve` and `release` are called.
    """

    def __init__(self, memory: CountedMemory) -> None:
        super().__init__()
        self._memory = memory
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Values | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        return result

    def hold(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is freed; once, however many tensors share it."""
        storage = tensor.untyped_storage()
        # The storage's identity: tensors that share it have different Python objects for it.
        key: int = storage._cdata  # pyright: ignore[reportPrivateUsage]
        amount_bytes = storage.nbytes()
        if key in self._known:
            return
        self._memory.reserve(amount_bytes)
        self._known.add(key)
        weakref.finalize(storage, self._release, key, amount_bytes)

    def _release(self, key: int, amount_bytes: int) -> None:
        self._known.discard(key)
        self._memory.release(amount_bytes)


class FusedAttention(TorchFunctionMode):
    """Computes the result of attention only, as the fused CUDA kernels do.

    On the meta device torch would allocate a value for every pair of tokens.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Values | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **(kwargs or {}))


class Bench:
    """Measures passes on one device.

    Args:
        device: cuda, meta or cpu.
        memory: of the device.
        tiny: whether networks and sizes are tiny.
    """

    def __init__(self, device: str, memory: Memory, *, tiny: bool) -> None:
        self._device = device
        self._memory = memory
        self._tiny = tiny
        self._dtype = torch.float32 if device == "cpu" else torch.float16

    def profile(self, name: str, sizes_px: Sequence[int], rows: Sequence[int]) -> Values:
        """The entry of one model in the profile file."""
        own_px = (TINY_PX, TINY_PX) if self._tiny else ARCHITECTURES[name].size_px
        vae: Values = {"vae_size_px": list(own_px), "vae_peak_bytes": 0}
        if ARCHITECTURES[name].unet:
            weights, passes, vae = self._diffusion(name, own_px, sizes_px, rows)
        else:
            weights, passes = self._network(name, own_px, rows)
        return {
            "size_px": list(own_px),
            "weights_bytes": weights,
            **fit([entry for entry in passes if entry["size_px"] == list(own_px)]),
            **vae,
            "passes": passes,
        }

    def _diffusion(
        self, name: str, own_px: tuple[int, int], sizes_px: Sequence[int], rows: Sequence[int]
    ) -> tuple[int, list[Values], Values]:
        where: Values = {"device": self._device, "dtype": self._dtype, "tiny": self._tiny}
        text = weights_bytes(build_text_encoder(name, **where))
        vae = build_vae(name, **where)
        weights = text + weights_bytes(vae)
        vae_entry = self._vae(name, vae, own_px)
        del vae
        unet = build_unet(name, **where)
        weights += weights_bytes(unet)
        passes = []
        for width_px, height_px in dict.fromkeys([own_px, *((side, side) for side in sizes_px)]):
            for count in rows:
                inputs = unet_inputs(name, unet, count, width_px, height_px)
                peak = self._peak(lambda inputs=inputs: unet(**inputs).sample.float())
                passes.append(_pass((width_px, height_px), count, peak))
        return weights, passes, vae_entry

    def _vae(self, name: str, vae: Any, own_px: tuple[int, int]) -> Values:
        """Of encoding and of decoding one picture, or one tile of it; the larger."""
        architecture = ARCHITECTURES[name]
        weight = next(vae.parameters())
        options: Values = {"device": weight.device, "dtype": weight.dtype}
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        output_px = [side // architecture.latent_px * scale for side in own_px]
        tile_px = architecture.vae_tile_px
        width_px, height_px = (min(side, tile_px or side) for side in output_px)
        latents = torch.zeros(1, 4, height_px // scale, width_px // scale, **options)
        peak = self._peak(lambda: _to_bytes(vae.decode(latents).sample / 2 + 0.5))
        if architecture.family == "img2img":
            picture = torch.zeros(1, 3, height_px, width_px, **options)
            peak = max(peak or 0, self._peak(lambda: vae.encode(picture).latent_dist.mean) or 0)
        if not peak:
            raise SystemExit(f"{name}: one picture of its autoencoder does not fit this device.")
        return {"vae_size_px": [width_px, height_px], "vae_peak_bytes": peak}

    def _network(
        self, name: str, own_px: tuple[int, int], rows: Sequence[int]
    ) -> tuple[int, list[Values]]:
        net = build_network(name, self._device, self._dtype, tiny=self._tiny)
        passes = []
        for count in rows:
            x = torch.zeros(count, 3, own_px[1], own_px[0], device=self._device, dtype=self._dtype)
            matting = ARCHITECTURES[name].family == "matting"
            work = (
                (lambda x=x: net(x, sides=1)[0].float().sigmoid())
                if matting
                else (lambda x=x: _to_bytes(net(x).float()))
            )
            passes.append(_pass(own_px, count, self._peak(work)))
        return weights_bytes(net), passes

    def _peak(self, work: Callable[[], torch.Tensor]) -> int | None:
        """What tensors take beyond what is there already; None if the device runs out of memory."""
        self._memory.reset_peak()
        before_bytes = self._memory.allocated_bytes()
        try:
            with torch.no_grad():
                work()
        except torch.OutOfMemoryError:
            return None
        if self._device == "cuda":
            torch.cuda.synchronize()
        return self._memory.peak_bytes() - before_bytes


def fit(passes: Sequence[Values]) -> dict[str, int]:
    """One row's peak, and the least slope per further row that no measured pass exceeds.

    Raises:
        SystemExit: one row did not fit.
    """
    peaks = {p["network_rows"]: p["peak_bytes"] for p in passes if p["peak_bytes"] is not None}
    if 1 not in peaks:
        raise SystemExit("One row does not fit this device: there is nothing to profile.")
    slopes = [(peak - peaks[1]) / (rows - 1) for rows, peak in peaks.items() if rows > 1]
    # Without a second point: a further row takes no more than the first.
    per_row = max(slopes, default=peaks[1])
    return {"base_peak_bytes": peaks[1], "per_row_bytes": max(0, math.ceil(per_row))}


def _pass(size_px: tuple[int, int], network_rows: int, peak_bytes: int | None) -> Values:
    return {"size_px": list(size_px), "network_rows": network_rows, "peak_bytes": peak_bytes}


def _to_bytes(images: torch.Tensor) -> torch.Tensor:
    """The last steps of every picture on the device."""
    return images.float().clamp(0, 1).mul(255).round().to(torch.uint8)


def run(args: argparse.Namespace) -> Values:
    """The file's section of one device."""
    names = args.models or list(ARCHITECTURES)
    if unknown := set(names) - set(ARCHITECTURES):
        raise SystemExit(f"Unknown models {sorted(unknown)}; known: {', '.join(ARCHITECTURES)}.")
    if args.device == "cuda":
        return _run_cuda(names, args)
    memory = CountedMemory()
    bench = Bench(args.device, memory, tiny=args.tiny)
    with ExitStack() as modes:
        modes.enter_context(LiveTensors(memory))
        if args.device == "meta":
            modes.enter_context(FusedAttention())
        models = dict(_each(bench, names, args))
    source = "dry run" if args.tiny else "estimate"
    return _section(source, models, gpu=None, device_name=None, context_bytes=None)


def _run_cuda(names: Sequence[str], args: argparse.Namespace) -> Values:
    if not torch.cuda.is_available():
        raise SystemExit(
            "There is no CUDA device, so nothing can be measured. Run this on a machine with a GPU."
            " Until then `imagen plan` uses the estimate in configs/gpu_profiles.json, which"
            " --device meta makes."
        )
    others_bytes = _used_bytes()
    memory = CudaMemory("cuda")
    models = dict(_each(Bench("cuda", memory, tiny=args.tiny), names, args))
    # Measured at the end, because libraries load their kernels when they are first used.
    taken_bytes = memory.total_bytes() - memory.free_bytes() - others_bytes
    return _section(
        "dry run" if args.tiny else "measured",
        models,
        gpu=gpu_name(memory.device_name),
        device_name=memory.device_name,
        context_bytes=max(0, taken_bytes - memory.reserved_bytes()),
    ) | {"total_bytes": memory.total_bytes(), "driver": machine.nvidia_smi("driver_version")}


def _each(
    bench: Bench, names: Sequence[str], args: argparse.Namespace
) -> Iterator[tuple[str, Values]]:
    sizes_px = [TINY_PX] if args.tiny else args.sizes_px
    for name in names:
        entry = bench.profile(name, sizes_px, args.rows)
        print(
            f"{name}: weights {entry['weights_bytes'] / 2**30:.2f} GiB, at {entry['size_px']} px"
            f" {entry['base_peak_bytes'] / 2**20:.0f} MiB and {entry['per_row_bytes'] / 2**20:.0f}"
            f" MiB a further network row, autoencoder {entry['vae_peak_bytes'] / 2**20:.0f} MiB",
            file=sys.stderr,
        )
        yield name, entry


def _section(
    source: str,
    models: Values,
    *,
    gpu: str | None,
    device_name: str | None,
    context_bytes: int | None,
) -> Values:
    versions = machine.versions(("torch", "diffusers"))
    return {
        "source": source,
        "gpu": gpu,
        "device_name": device_name,
        "measured_at": datetime.datetime.now(datetime.UTC).strftime(_DATE),
        "context_bytes": context_bytes,
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **versions},
        "models": models,
    }


def _used_bytes() -> int:
    """The GPU memory in use before this process has a context; 0 without nvidia-smi."""
    used = machine.nvidia_smi("memory.used")
    return int(float(used)) * 2**20 if used else 0


def write(section: Values, path: Path) -> None:
    """Put the section in place of the same device's; models it does not name stay."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["profiles"]
    except FileNotFoundError:
        known = []
    key = (section["source"], section["gpu"])
    former = [old for old in known if (old["source"], old["gpu"]) == key]
    for old in former:
        section["models"] = old["models"] | section["models"]
    section["models"] = dict(sorted(section["models"].items()))
    profiles = [old for old in known if old not in former] + [section]
    text = _dump({"profiles": profiles})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _dump(values: Values) -> str:
    """JSON with each measured pass on a line, so that the file can be read and compared."""
    lines: dict[str, str] = {}
    for section in values["profiles"]:
        for model in section["models"].values():
            for i, entry in enumerate(model["passes"]):
                if not isinstance(entry, str):
                    mark = f"@{len(lines)}@"
                    lines[mark] = json.dumps(entry)
                    model["passes"][i] = mark
    text = json.dumps(values, indent=1)
    for mark, line in lines.items():
        text = text.replace(f'"{mark}"', line)
    return text + "\n"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "meta", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny networks")
    parser.add_argument("--models", nargs="+", help="names of the registry; unset: all")
    parser.add_argument("--sizes-px", nargs="+", type=int, default=list(SIZES_PX))
    parser.add_argument("--rows", nargs="+", type=int, default=list(NETWORK_ROWS))
    parser.add_argument("--out", type=Path, help=f"unset: {PROFILES.name}")
    args = parser.parse_args(argv)
    if args.tiny and args.out is None:
        parser.error("--tiny needs --out: its figures do not belong in the committed file")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu is a dry run, which needs --tiny")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    out = args.out or PROFILES
    write(run(args), out)
    print(f"Written: {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
