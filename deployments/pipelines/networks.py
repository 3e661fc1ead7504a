"""Our own networks from a folder: `config.json` describes one, `model.safetensors` fills it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from deployments.errors import ModelCorrupt, ModelNotCached

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from torch import nn

    from deployments.registry import ModelSpec


def read_config(spec: ModelSpec, folder: Path) -> dict[str, Any]:
    """The folder's `config.json`.

    Raises:
        ModelNotCached: there is none.
        ModelCorrupt: it is not a JSON object.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelNotCached(
            f"Model {spec.name} has no config.json.", value=folder, remedy="Fetch it again."
        ) from error
    except ValueError as error:
        raise ModelCorrupt(f"The config.json of {spec.name} is not JSON.", value=folder) from error
    if not isinstance(config, dict):
        raise ModelCorrupt(f"The config.json of {spec.name} is not an object.", value=folder)
    return config


@contextmanager
def building(spec: ModelSpec) -> Generator[None]:
    """Raise ModelCorrupt if the network that `config.json` describes cannot be built."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ModelCorrupt(
            f"The config.json of {spec.name} describes no network: {error!r}"
        ) from error


def load_weights(net: nn.Module, spec: ModelSpec, folder: Path, device: str) -> None:
    """Load `model.safetensors` into `net` strictly and move it to `device`, ready for inference.

    Raises:
        ModelNotCached: the file is missing.
        ModelCorrupt: it is truncated, or its keys or shapes are not the network's.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise ModelNotCached(
            f"Model {spec.name} has no model.safetensors.", value=folder, remedy="Fetch it again."
        )
    try:
        net.load_state_dict(load_file(path), strict=True, assign=True)  # mapped rather than copied
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelCorrupt(
            f"The weights of {spec.name} do not fit: {reason}", value=path
        ) from error
    net.requires_grad_(False).eval()
    net.to(device=device, dtype=getattr(torch, spec.dtype))
