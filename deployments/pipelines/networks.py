"""Our own networks from a folder: `config.json` describes one, `model.safetensors` fills it.

The weights of a model with `variant: fp16` are in `model.fp16.safetensors`.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from deployments.errors import ModelCorrupt, ModelNotCached

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from pathlib import Path

    from torch import nn

    from deployments.registry import ModelSpec

_EXAMPLES = {
    "upscale_gan": '{"architecture": "rrdb", "num_block": 23}',
    "matting": '{"architecture": "isnet", "input_px": 1024}',
}
_NAMED = 3
"""Tensors that a message names."""


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
            f"Model {spec.name} has no config.json, which describes its network.",
            value=folder,
            remedy=f"It must hold an object such as {_EXAMPLES[spec.family]}: name the file in the"
            " model registry, or let `convert` write it (docs/models.md).",
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
    """Load the weights into `net` strictly and move it to `device`, ready for inference.

    Raises:
        ModelNotCached: the file is missing.
        ModelCorrupt: it is truncated, or its keys or shapes are not the network's; names the first
            three.
    """
    path = folder / (f"model.{spec.variant}.safetensors" if spec.variant else "model.safetensors")
    if not path.is_file():
        raise ModelNotCached(
            f"Model {spec.name} has no {path.name}.",
            value=folder,
            remedy="Its weights must have this name: correct `files` or `variant` in the model"
            " registry, or let `convert` write them (docs/models.md).",
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        reason = str(error).splitlines()[0]
        raise ModelCorrupt(
            f"The weights of {spec.name} are damaged: {reason}.", value=path
        ) from error
    if found := differences(net, {key: tuple(value.shape) for key, value in tensors.items()}):
        raise ModelCorrupt(
            f"The weights of {spec.name} do not fit the network of its config.json:"
            f" {first_of(found)}.",
            value=path,
            remedy="Correct `convert` or the files in the model registry.",
        )
    net.load_state_dict(tensors, strict=True, assign=True)  # mapped rather than copied
    net.requires_grad_(False).eval()
    net.to(device=device, dtype=getattr(torch, spec.dtype))


def differences(net: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps tensors of these shapes from a strict load into `net`, a phrase for each key."""
    own = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    return [
        *(f"{key} {shape} is missing" for key, shape in own.items() if key not in shapes),
        *(
            f"{key} is {shapes[key]} instead of {shape}"
            for key, shape in own.items()
            if shapes.get(key, shape) != shape
        ),
        *(f"{key} {shape} is unknown" for key, shape in shapes.items() if key not in own),
    ]


def first_of(found: list[str]) -> str:
    """The first three phrases, and how many more there are."""
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(found[:_NAMED]) + more
