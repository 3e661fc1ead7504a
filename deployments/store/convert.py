"""Making the served model from its origins' files, once, on an operator's machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from deployments.errors import ConfigError, ModelCorrupt, StoreUnwritable
from deployments.registry import ArtefactSpec, ModelSpec
from deployments.store.checkpoint import (
    WEIGHTS,
    first_line,
    read_checkpoint,
    tensors_of,
    unreadable,
)
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
from deployments.store.smoke import smoke_load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from deployments.store.cache import Store

    Beat = Callable[[int], None]

_HALF = ".fp16.safetensors"


def convert(spec: ArtefactSpec, registry: Path, store: Store) -> Manifest:
    """Fetch a model's origins, convert them, load the result once, add it to the store and its
    digest to the lock file. The same origins always give the same bytes, and so the same digest.

    Raises:
        ConfigError: the registry names no conversion, or none that fits these files; or the model
            is unresolved.
        ModelCorrupt: the origins differ from the lock file; a value is too large for float16; a
            pickle holds more than tensors; a file is no safetensors file; the result does not load.
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
    with store.fetched(raw, origin_places(spec, origins, store.hub_cache)) as (folder, beat):
        made = folder.with_name(f"{folder.name}.made")
        made.mkdir()
        if conversion.to == "fp16":
            _to_fp16(spec, folder, made, beat)
        else:
            _to_safetensors(spec, folder, made)
        if isinstance(spec, ModelSpec):
            smoke_load(spec, made, "was converted but does not load, so it is not kept")
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
    named = _marks_half(spec)
    for done, path in enumerate(paths):
        beat(done)
        target = made / (_half_name(path) if named else path)
        if named and _is_full(path) and _half_name(path) in paths:
            raise ConfigError(
                f"The origins of {spec.name} hold a file both as float32 and as float16.",
                value=path,
                remedy="Name one of the two in the model registry.",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        if not _is_full(path):
            (folder / path).rename(target)
        else:
            _halve(spec.name, folder / path, target)
            (folder / path).unlink()  # so that the disk never holds every file twice


def _marks_half(spec: ArtefactSpec) -> bool:
    """Whether names say fp16. Loading looks for them by the variant; an artefact has none."""
    return not isinstance(spec, ModelSpec) or spec.variant == "fp16"


def _is_full(path: str) -> bool:
    """Whether a file holds weights to cast."""
    return path.endswith(WEIGHTS) and ".fp16." not in path.rpartition("/")[2]


def _half_name(path: str) -> str:
    return path.removesuffix(WEIGHTS) + _HALF if _is_full(path) else path


def _halve(name: str, source: Path, target: Path) -> None:
    """Cast one file, tensor by tensor: memory holds the result and one more tensor."""
    from safetensors import SafetensorError, safe_open

    halves: dict[str, Tensor] = {}
    try:
        with safe_open(source, framework="pt") as file:
            for key in sorted(file.keys()):
                halves[key] = _half(name, source, key, file.get_tensor(key))
    except SafetensorError as error:
        raise unreadable(source, first_line(error)) from error
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
    tensors = tensors_of(read_checkpoint(source), spec.convert.key, source)
    _save(tensors, made / ("model" + (_HALF if spec.file_variant else WEIGHTS)))
    config = json.dumps(spec.convert.config, sort_keys=True, indent=2) + "\n"
    (made / "config.json").write_text(config, encoding="utf-8")


def _save(tensors: dict[str, Tensor], target: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, target, metadata={"format": "pt"})
    except SafetensorError as error:
        raise StoreUnwritable(
            f"The converted weights cannot be written: {first_line(error)}.",
            value=target,
            remedy="Run `imagen models gc`, or give the store a larger disk.",
        ) from error


def _entry(folder: Path, path: str) -> FileEntry:
    hashes = hash_file(folder / path)
    return FileEntry(path=path, size=hashes.size, sha256=str(hashes.sha256), crc32c=hashes.crc32c)


def _move(made: Path, staging: Path) -> None:
    for path in list_files(made):
        (staging / path).parent.mkdir(parents=True, exist_ok=True)
        (made / path).rename(staging / path)
