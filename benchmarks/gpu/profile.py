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
import re
import sys
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import machine
from benchmarks.gpu.architectures import (
    ARCHITECTURES,
    build_first_text_encoder,
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
    from collections.abc import Callable, Sequence

    from deployments.gpu.cap import DeviceMemory

    Values = dict[str, Any]

SIZES_PX = (512, 768, 1024)
NETWORK_ROWS = (1, 2, 4, 8)
TINY_PX = 128


class CountedMemory:
    """Adds up what is reserved, of a device without limits; else like `DeviceMemory`."""

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

    def __init__(self, device: str, memory: CountedMemory | DeviceMemory, *, tiny: bool) -> None:
        self._device, self._memory, self._tiny = device, memory, tiny
        self._dtype = torch.float32 if device == "cpu" else torch.float16

    def profile(self, name: str) -> Values:
        """The entry of one model in the profile file."""
        own_px = (TINY_PX, TINY_PX) if self._tiny else ARCHITECTURES[name].size_px
        if ARCHITECTURES[name].unet:
            weights, passes, vae = self._diffusion(name, own_px)
        else:
            weights, passes = self._network(name, own_px)
            vae = {"vae_size_px": list(own_px), "vae_peak_bytes": 0}
        return {
            "size_px": list(own_px),
            "weights_bytes": weights,
            **fit([entry for entry in passes if entry["size_px"] == list(own_px)]),
            **vae,
            "passes": passes,
        }

    def _diffusion(self, name: str, own_px: tuple[int, int]) -> tuple[int, list[Values], Values]:
        where: Values = {"device": self._device, "dtype": self._dtype, "tiny": self._tiny}
        weights = weights_bytes(build_text_encoder(name, **where))
        first = None if self._tiny else build_first_text_encoder(name, self._device, self._dtype)
        weights += 0 if first is None else weights_bytes(first)
        del first
        vae = build_vae(name, **where)
        weights += weights_bytes(vae)
        vae_entry = self._vae(name, vae, own_px)
        del vae
        unet = build_unet(name, **where)
        passes: list[Values] = []
        others = () if self._tiny else tuple((side, side) for side in SIZES_PX)
        for size in dict.fromkeys((own_px, *others)):
            for count in NETWORK_ROWS:
                inputs = unet_inputs(name, unet, count, *size)
                peak = self._peak(lambda inputs=inputs: unet(**inputs).sample.float())
                passes.append(_pass(size, count, peak))
        return weights + weights_bytes(unet), passes, vae_entry

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

    def _network(self, name: str, own_px: tuple[int, int]) -> tuple[int, list[Values]]:
        net = build_network(name, self._device, self._dtype, tiny=self._tiny)
        passes: list[Values] = []
        for count in NETWORK_ROWS:
            x = torch.zeros(count, 3, own_px[1], own_px[0], device=self._device, dtype=self._dtype)
            if ARCHITECTURES[name].family == "matting":
                peak = self._peak(lambda x=x: net(x, sides=1)[0].float().sigmoid())
            else:
                peak = self._peak(lambda x=x: _to_bytes(net(x).float()))
            passes.append(_pass(own_px, count, peak))
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


def run(device: str, names: Sequence[str], *, tiny: bool) -> Values:
    """The file's section of one device.

    Raises:
        SystemExit: there is no such device, or one row does not fit it.
    """
    section: Values = {
        "source": "dry run" if tiny else "measured" if device == "cuda" else "estimate",
        "gpu": None,
        "device_name": None,
        "measured_at": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "context_bytes": None,
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **machine.versions(("torch", "diffusers")),
        },
    }
    if device == "cuda":
        return section | _run_cuda(names, tiny=tiny)
    memory = CountedMemory()
    with ExitStack() as modes:
        modes.enter_context(LiveTensors(memory))
        if device == "meta":
            modes.enter_context(FusedAttention())
        return section | {"models": _profiles(Bench(device, memory, tiny=tiny), names)}


def _run_cuda(names: Sequence[str], *, tiny: bool) -> Values:
    if not torch.cuda.is_available():
        raise SystemExit(
            "There is no CUDA device, so nothing can be measured. Run this on a machine with a GPU."
            " Until then `imagen plan` uses the estimate in configs/gpu_profiles.json, which"
            " --device meta makes."
        )
    used_mib = machine.nvidia_smi("memory.used")  # by others, before we have a context
    memory = CudaMemory("cuda")
    models = _profiles(Bench("cuda", memory, tiny=tiny), names)
    # Measured at the end, because libraries load their kernels when they are first used.
    taken_bytes = memory.total_bytes() - memory.free_bytes() - int(float(used_mib or 0)) * 2**20
    return {
        "gpu": gpu_name(memory.device_name),
        "device_name": memory.device_name,
        "context_bytes": max(0, taken_bytes - memory.reserved_bytes()),
        "total_bytes": memory.total_bytes(),
        "driver": machine.nvidia_smi("driver_version"),
        "models": models,
    }


def _profiles(bench: Bench, names: Sequence[str]) -> Values:
    models: Values = {}
    for name in names:
        models[name] = entry = bench.profile(name)
        mib = {key: f"{value / 2**20:.0f}" for key, value in entry.items() if "bytes" in key}
        print(
            f"{name}: weights {mib['weights_bytes']} MiB, at {entry['size_px']} px"
            f" {mib['base_peak_bytes']} MiB and {mib['per_row_bytes']} MiB a further network row,"
            f" autoencoder {mib['vae_peak_bytes']} MiB",
            file=sys.stderr,
        )
    return models


def write(section: Values, path: Path) -> None:
    """Put the section in place of the same device's; models it does not name stay."""
    known = json.loads(path.read_text(encoding="utf-8"))["profiles"] if path.exists() else []
    key = (section["source"], section["gpu"])
    former = [old for old in known if (old["source"], old["gpu"]) == key]
    for old in former:
        section["models"] = old["models"] | section["models"]
    section["models"] = dict(sorted(section["models"].items()))
    profiles = [old for old in known if old not in former] + [section]
    text = json.dumps({"profiles": profiles}, indent=1)
    # Each measured pass on a line, so that the file can be read and compared.
    text = re.sub(r"\{[^{}]*\}", lambda match: " ".join(match.group().split()), text)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(ARCHITECTURES)
    parser.add_argument("--device", choices=("cuda", "meta", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny networks")
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME")
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
    write(run(args.device, args.models, tiny=args.tiny), out)
    print(f"Written: {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
