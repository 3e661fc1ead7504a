"""Making the served model from its origins' files, once, on an operator's machine."""

from __future__ import annotations

import json
import pickle
import warnings
from typing import TYPE_CHECKING, Any, cast

from deployments.errors import ConfigError, ModelCorrupt, StoreUnwritable
from deployments.store.folder import hash_file, list_files
from deployments.store.lockfile import (
    LockedModel,
    build_manifest,
    conversion_of,
    load_lock,
    locked_origins,
    origin_manifest,
    update_lock,
)
from deployments.store.manifest import FileEntry, Manifest
from deployments.store.provider import origin_places

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from deployments.registry import ArtefactSpec
    from deployments.store.cache import Store

    Beat = Callable[[int], None]

_WEIGHTS = ".safetensors"
_HALF = ".fp16.safetensors"


def convert(spec: ArtefactSpec, registry: Path, store: Store) -> Manifest:
    """Fetch a model's origins, convert them, add the result to the store and its digest to the lock
    file. The same origins always give the same bytes, and so the same digest.

    Raises:
        ConfigError: the registry names no conversion, or none that fits these files; or the model
            is unresolved.
        ModelCorrupt: the origins differ from the lock file; a value is too large for float16; a
            pickle holds more than tensors; a file is no safetensors file.
        SourceFailed, StoreUnwritable, LockTimeout: see `Store.pull`.
    """
    conversion = spec.convert
    if conversion is None:
        raise ConfigError(
            f"{spec.name} is served with its origins' files; there is nothing to convert.",
            remedy=f"Run `imagen models pull {spec.name}`.",
        )
    origins = locked_origins(spec, load_lock(registry))
    raw = origin_manifest(spec, origins)
    with store.fetched(raw, origin_places(spec, origins)) as (folder, beat):
        made = folder.with_name(f"{folder.name}.made")
        made.mkdir()
        if conversion.to == "fp16":
            _to_fp16(spec, folder, made, beat)
        else:
            _to_safetensors(spec, folder, made)
        files = [_entry(made, path) for path in list_files(made)]
        manifest = build_manifest(spec, raw.sources, files, converted=conversion.to)
        store.add(manifest, lambda staging: _move(made, staging))
    made_of = LockedModel(digest=manifest.digest, conversion=conversion_of(spec), origins=origins)
    update_lock(registry, lambda lock: lock.with_model(spec.name, made_of))
    return manifest


def _to_fp16(spec: ArtefactSpec, folder: Path, made: Path, beat: Beat) -> None:
    paths = list_files(folder)
    if sharded := [path for path in paths if path.endswith(".safetensors.index.json")]:
        raise ConfigError(
            f"{spec.name} has weights in several pieces, which cannot be converted.",
            value=sharded[0],
            remedy="Name an origin with all weights in one file.",
        )
    for done, path in enumerate(paths):
        beat(done)
        target = made / _half_name(path)
        if target.name != path.rpartition("/")[2] and _half_name(path) in paths:
            raise ConfigError(
                f"The origins of {spec.name} hold a file both as float32 and as float16.",
                value=path,
                remedy="Name one of the two in the model registry.",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        if _half_name(path) == path:
            (folder / path).rename(target)
        else:
            _halve(spec.name, folder / path, target)
            (folder / path).unlink()  # so that the disk never holds every file twice


def _half_name(path: str) -> str:
    if not path.endswith(_WEIGHTS) or ".fp16." in path.rpartition("/")[2]:
        return path
    return path.removesuffix(_WEIGHTS) + _HALF


def _halve(name: str, source: Path, target: Path) -> None:
    """Cast one file, tensor by tensor: memory holds the result and one more tensor."""
    from safetensors import SafetensorError, safe_open

    halves: dict[str, Tensor] = {}
    try:
        with safe_open(source, framework="pt") as file:
            for key in sorted(file.keys()):
                halves[key] = _half(name, source, key, file.get_tensor(key))
    except SafetensorError as error:
        raise _no_weights(name, source, _first_line(error)) from error
    _save(halves, target)


def _half(name: str, source: Path, key: str, tensor: Tensor) -> Tensor:
    import torch

    if not tensor.is_floating_point():
        return tensor
    half = tensor.to(torch.float16)
    if not bool((torch.isfinite(half) | ~torch.isfinite(tensor)).all()):
        largest = tensor.abs().max().item()
        raise ModelCorrupt(
            f"{name} cannot be converted: {source.name}: {key} holds {largest:g}, too large for"
            " float16.",
            remedy="Serve this model in float32 or bfloat16, or name an fp16-safe file.",
        )
    return half


def _to_safetensors(spec: ArtefactSpec, folder: Path, made: Path) -> None:
    assert spec.convert is not None  # noqa: S101 - checked by convert
    paths = list_files(folder)
    if len(paths) != 1:
        raise ConfigError(
            f"{spec.name} is made from one checkpoint file; its origins name {len(paths)}.",
            value=", ".join(paths),
            remedy="Correct `files` in the model registry.",
        )
    source = folder / paths[0]
    tensors = _read_checkpoint(spec.name, source, spec.convert.key)
    _save(tensors, made / "model.safetensors")
    config = json.dumps(spec.convert.config, sort_keys=True, indent=2) + "\n"
    (made / "config.json").write_text(config, encoding="utf-8")


def _save(tensors: dict[str, Tensor], target: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, target, metadata={"format": "pt"})
    except SafetensorError as error:
        raise StoreUnwritable(
            f"The converted weights cannot be written: {_first_line(error)}.",
            value=target,
            remedy="Run `imagen models gc`, or give the store a larger disk.",
        ) from error


def _read_checkpoint(name: str, source: Path, key: str | None) -> dict[str, Tensor]:
    """The tensors in a pickle. Only tensors and plain containers are read; no code is run."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            content: Any = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelCorrupt(
            f"{name} cannot be converted: {source.name} holds code or objects, not only tensors;"
            " none of it was run.",
            remedy="Get the file from its author, and check its SHA-256.",
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything, OSError too
        raise _no_weights(name, source, _first_line(error)) from error
    if key is not None:
        if not isinstance(content, dict) or key not in content:
            raise _no_weights(name, source, f"it has no entry {key}")
        content = content[key]
    if not isinstance(content, dict) or not content:
        kind = type(content).__name__
        raise _no_weights(name, source, f"a {kind} instead of a dictionary of tensors")
    tensors: dict[str, Tensor] = {}
    for item, value in cast("dict[object, object]", content).items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            kind = type(value).__name__
            raise _no_weights(name, source, f"{item} is a {kind}, no dense tensor")
        # A copy, because safetensors refuses tensors that share memory.
        tensors[str(item)] = value.detach().clone(memory_format=torch.contiguous_format)
    return tensors


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _no_weights(name: str, source: Path, reason: str) -> ModelCorrupt:
    return ModelCorrupt(
        f"{name} cannot be converted: {source.name} cannot be read: {reason}.",
        remedy="Check `origins` and `convert` in the model registry.",
    )


def _entry(folder: Path, path: str) -> FileEntry:
    hashes = hash_file(folder / path)
    return FileEntry(path=path, size=hashes.size, sha256=str(hashes.sha256), crc32c=hashes.crc32c)


def _move(made: Path, staging: Path) -> None:
    for path in list_files(made):
        (staging / path).parent.mkdir(parents=True, exist_ok=True)
        (made / path).rename(staging / path)
