"""GPU types, and what models take of their memory (configs/gpu_profiles.json)."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deployments.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

PROFILES = Path(__file__).resolve().parents[2] / "configs" / "gpu_profiles.json"
_MIB, _GIB = 2**20, 2**30

CONTEXT_BYTES = 600 * _MIB
"""What a process takes beside its allocator: the CUDA context and the libraries' kernels.

An estimate, for GPU types that no profile has measured.
"""

GpuName = Literal["t4", "l4", "a100-40", "h100", "h200"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU type.

    Attributes:
        name: for `imagen plan --gpu`; of a device that is not in the table, its own in one word.
        label: for people.
        total_bytes: the device's memory as CUDA reports it. It is less than the data sheet and
            nvidia-smi say, because the driver and ECC keep some.
        pattern: regular expression of the device names that CUDA reports.
    """

    name: str
    label: str
    total_bytes: int
    pattern: str


# Each total is the lowest "total capacity" seen in torch's out-of-memory errors of that GPU. It
# differs by a few hundred MiB with the driver. A replica asks its own device.
GPUS: dict[GpuName, Gpu] = {
    "t4": Gpu("t4", "T4 16 GB", int(14.56 * _GIB), r"\bT4\b"),
    "l4": Gpu("l4", "L4 24 GB", int(22.03 * _GIB), r"\bL4\b"),
    "a100-40": Gpu("a100-40", "A100 40 GB", int(39.38 * _GIB), r"\bA100.*40GB"),
    "h100": Gpu("h100", "H100 80 GB", int(79.10 * _GIB), r"\bH100\b"),
    "h200": Gpu("h200", "H200 141 GB", int(139.72 * _GIB), r"\bH200\b"),
}


def gpu_name(device_name: str) -> str:
    """A device's name in `GPUS`; for an unknown one, its own name in one word."""
    for gpu in GPUS.values():
        if re.search(gpu.pattern, device_name):
            return gpu.name
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """What one model takes of a GPU at one size, beside the CUDA context.

    Attributes:
        model: its name in the registry.
        gpu: type it was measured on, as in `GPUS`; empty for an estimate.
        source: measured on a device, or an estimate that counts tensors without one.
        measured_at: date.
        context_bytes: of the process on that GPU; 0 for an estimate.
        size_px: width and height of the pass.
        weights_bytes: on the device.
        base_peak_bytes: activations of one network row.
        per_row_bytes: activations of each further row; a picture with guidance is two rows.
        vae_size_px: width and height that the autoencoder works on at once: a picture or a tile.
        vae_peak_bytes: activations of encoding or decoding that; they add to those of a pass.
    """

    model: str
    gpu: str
    source: Literal["measured", "estimate"]
    measured_at: str
    context_bytes: int
    size_px: tuple[int, int]
    weights_bytes: int
    base_peak_bytes: int
    per_row_bytes: int
    vae_size_px: tuple[int, int]
    vae_peak_bytes: int

    def in_dtype(self, dtype: str) -> MemoryProfile:
        """The profile in a dtype: profiles are of float16, and float32 takes twice as much."""
        if dtype != "float32":
            return self
        return replace(
            self,
            weights_bytes=2 * self.weights_bytes,
            base_peak_bytes=2 * self.base_peak_bytes,
            per_row_bytes=2 * self.per_row_bytes,
            vae_peak_bytes=2 * self.vae_peak_bytes,
        )

    @property
    def px(self) -> int:
        return self.size_px[0] * self.size_px[1]

    @property
    def vae_px(self) -> int:
        return self.vae_size_px[0] * self.vae_size_px[1]

    def peak_bytes(self, budget_px: int) -> int:
        """Activations of a pass over `budget_px` network pixels; at least those of one row."""
        further_rows = max(budget_px / self.px - 1, 0.0)
        return self.base_peak_bytes + math.ceil(self.per_row_bytes * further_rows)


def load_profiles(path: Path = PROFILES) -> list[MemoryProfile]:
    """Every profile of a file; none if there is no such file.

    Raises:
        ConfigError: it cannot be read, or is not a profile file.
    """
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        return [
            _profile(model, entry, device)
            for device in values["profiles"]
            for model, entry in device["models"].items()
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"The GPU profiles cannot be read: {error!r}.",
            value=path,
            remedy="Restore the file, or write a new one with `make profile-gpu`.",
        ) from error


def _profile(model: str, entry: dict[str, Any], device: dict[str, Any]) -> MemoryProfile:
    if device["source"] not in ("measured", "estimate"):
        raise ValueError(f"unknown source {device['source']}")
    width, height = (int(side) for side in entry["size_px"])
    vae_width, vae_height = (int(side) for side in entry["vae_size_px"])
    amounts = {
        key: int(entry[key])
        for key in ("weights_bytes", "base_peak_bytes", "per_row_bytes", "vae_peak_bytes")
    }
    if min(width, height, vae_width, vae_height) <= 0 or min(amounts.values()) < 0:
        raise ValueError(f"{model} has an amount below zero")
    return MemoryProfile(
        model=model,
        gpu=str(device["gpu"] or ""),
        source=device["source"],
        measured_at=str(device["measured_at"]),
        context_bytes=int(device["context_bytes"] or 0),
        size_px=(width, height),
        vae_size_px=(vae_width, vae_height),
        **amounts,
    )


def choose_profile(profiles: Sequence[MemoryProfile], model: str, gpu: str) -> MemoryProfile:
    """The profile for a model on a GPU type.

    That type's own profile comes first, then the largest of other types, then the estimate.

    Raises:
        ConfigError: the model has no profile.
    """
    own = [profile for profile in profiles if profile.model == model]
    for candidates in (
        [p for p in own if p.source == "measured" and p.gpu == gpu],
        [p for p in own if p.source == "measured"],
        own,
    ):
        if candidates:
            return max(candidates, key=lambda p: p.peak_bytes(p.px) + p.vae_peak_bytes)
    raise ConfigError(
        "No GPU profile knows this model.",
        value=model,
        remedy=f"Add it to benchmarks/gpu/architectures.py and run `make profile-gpu`; known: "
        f"{', '.join(sorted({p.model for p in profiles})) or 'none'}.",
    )


def context_reserve_bytes(profiles: Sequence[MemoryProfile], gpu: str) -> int:
    """What a process takes of that GPU beside its allocator: as measured there, or the estimate."""
    measured = [p.context_bytes for p in profiles if p.source == "measured" and p.gpu == gpu]
    return max(measured, default=CONTEXT_BYTES)


def as_gpu(name: str) -> GpuName:
    """A name in `GPUS`, whether it is written in lower case or in capitals.

    Raises:
        ConfigError: there is no such GPU in the table.
    """
    known = name.lower()
    if known not in GPUS:
        raise ConfigError(
            "No such GPU in the table.", value=name, remedy=f"Known: {', '.join(GPUS)}."
        )
    return known
