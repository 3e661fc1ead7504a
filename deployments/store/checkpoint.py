"""Checkpoint files: `.pth` and `.safetensors`, read without running anything that is in them."""

from __future__ import annotations

import pickle
import warnings
from typing import TYPE_CHECKING, Any, cast

from deployments.errors import ModelCorrupt

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

WEIGHTS = ".safetensors"
"""The suffix of files that hold tensors alone; every other checkpoint is a pickle."""


def read_checkpoint(source: Path) -> Any:
    """What a file holds: tensors by key, or entries of which some do. A pickle may hold only
    tensors and plain containers.

    Raises:
        ModelCorrupt: it is damaged, or holds code or objects, of which none is run.
    """
    return _read_safetensors(source) if source.suffix == WEIGHTS else _read_pickle(source)


def tensors_of(content: Any, key: str | None, source: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, each with memory of its own.

    Args:
        content: from `read_checkpoint`.
        key: of the entry that holds them; None if the content itself does.
        source: for errors.

    Raises:
        ModelCorrupt: there is no such entry, or it holds anything but dense tensors.
    """
    import torch

    if key is not None:
        if not isinstance(content, dict) or key not in content:
            raise unreadable(source, f"it has no entry {key}")
        content = cast("dict[object, object]", content)[key]
    if not isinstance(content, dict) or not content:
        kind = type(content).__name__
        raise unreadable(source, f"a {kind} instead of a dictionary of tensors")
    tensors: dict[str, Tensor] = {}
    for item, value in cast("dict[object, object]", content).items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            kind = type(value).__name__
            raise unreadable(source, f"{item} is a {kind}, no dense tensor")
        # A copy, because safetensors refuses tensors that share memory.
        tensors[str(item)] = value.detach().clone(memory_format=torch.contiguous_format)
    return tensors


def shapes_of(content: Any) -> dict[str | None, dict[str, tuple[int, ...]]]:
    """The shapes of every dictionary of tensors in a checkpoint, by the entry that holds it.

    The key None stands for the content itself.
    """
    entries: dict[str | None, Any] = {None: content}
    if isinstance(content, dict):
        entries |= cast("dict[str | None, Any]", content)
    return {key: shapes for key, value in entries.items() if (shapes := _shapes(value))}


def _shapes(content: Any) -> dict[str, tuple[int, ...]] | None:
    import torch

    if not isinstance(content, dict):
        return None
    items = cast("dict[object, object]", content).items()
    shapes = {str(k): tuple(v.shape) for k, v in items if isinstance(v, torch.Tensor)}
    return shapes if len(shapes) == len(items) else None


def _read_safetensors(source: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(source)
    except SafetensorError as error:
        raise unreadable(source, first_line(error)) from error


def _read_pickle(source: Path) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelCorrupt(
            f"{source.name} holds code or objects, not only tensors; none of it was run.",
            remedy="Get the file from its author, and check its SHA-256.",
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything, OSError too
        raise unreadable(source, first_line(error)) from error


def first_line(error: Exception) -> str:
    """The first line of an error, or else its class, without a full stop."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def unreadable(source: Path, reason: str) -> ModelCorrupt:
    """The error of a file whose tensors cannot be had."""
    return ModelCorrupt(
        f"{source.name} cannot be read: {reason}.",
        remedy="Check the file, and `origins` and `convert` in the model registry.",
    )
