"""The lock file beside a registry: sizes, hashes and digest of every model.

People write `production.yaml`; `imagen models resolve`, `convert`, `compile` and `publish` write
`production.lock.json`. Values that are not looked up yet are `unresolved` there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, ValidationError

from deployments.errors import ConfigError
from deployments.origins import UNRESOLVED, SafePath, parse_hub
from deployments.settings import Strict, resolve
from deployments.store.manifest import SHORT, FileEntry, Licence, Manifest, Sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from deployments.registry import ArtefactSpec

_Unresolved = Literal["unresolved"]
Mode = Literal["blocks", "full"]
"""What was compiled of a network: its repeated blocks, or all of it."""


class LockedFile(Strict):
    """A file of an origin: path relative to it, bytes, SHA-256."""

    path: SafePath
    size: Annotated[int, Field(ge=0)] | _Unresolved = UNRESOLVED
    sha256: Sha256 | _Unresolved = UNRESOLVED

    @property
    def resolved(self) -> bool:
        return UNRESOLVED not in (self.size, self.sha256)


class LockedOrigin(Strict):
    """An origin with its revision pinned."""

    source: str
    files: tuple[LockedFile, ...]


class LockedArtefact(Strict):
    """What `torch.compile` made of a model for one kind of device.

    Attributes:
        id: of its `CompiledKey`.
        device: GPU type and compute capability, or cpu.
        torch: version that made it, and that alone can use it.
        mode: what was compiled.
        shapes: fingerprint of the shapes it was compiled for.
        bytes: its size.
        sha256: of its bytes. They are code, so nothing of them is loaded unless it is the same.
    """

    id: Annotated[str, Field(pattern=f"^[0-9a-f]{{{SHORT}}}$")]
    device: str
    torch: str
    mode: Mode
    shapes: str
    bytes: int = Field(ge=0)
    sha256: Sha256


class LockedModel(Strict):
    """What the lock file knows of one model.

    Attributes:
        digest: of the manifest that is served.
        conversion: the registry's, as JSON, that made it; None if its files are the origins'.
        origins: as in the registry.
        compiled: artefacts of this digest, sorted by id.
    """

    digest: Sha256 | _Unresolved = UNRESOLVED
    conversion: str | None = None
    origins: tuple[LockedOrigin, ...]
    compiled: tuple[LockedArtefact, ...] = ()


class Lock(Strict):
    """A lock file."""

    schema_: Literal["imagen.lock/1"] = Field(default="imagen.lock/1", alias="schema")
    models: dict[str, LockedModel] = Field(default={})

    def with_model(self, name: str, model: LockedModel) -> Lock:
        """A copy with one model replaced; compiled artefacts stay if the digest does."""
        before = self.models.get(name)
        kept = before.compiled if before and before.digest == model.digest else ()
        return self._with(name, model.model_copy(update={"compiled": kept}))

    def with_artefact(self, name: str, digest: str, artefact: LockedArtefact) -> Lock:
        """A copy with a compiled artefact added, in the place of one with the same id.

        Raises:
            ConfigError: the model has another digest by now.
        """
        model = self.models.get(name)
        if model is None or model.digest != digest:
            raise ConfigError(
                f"The lock file names another content of {name} than the one that was compiled.",
                value=model.digest[:SHORT] if model else "none",
                remedy="Compile it again.",
            )
        others = [other for other in model.compiled if other.id != artefact.id]
        compiled = tuple(sorted([*others, artefact], key=lambda one: one.id))
        return self._with(name, model.model_copy(update={"compiled": compiled}))

    def _with(self, name: str, model: LockedModel) -> Lock:
        return self.model_copy(update={"models": {**self.models, name: model}})


def lock_path(registry: Path) -> Path:
    """`x.lock.json` beside `x.yaml`."""
    return resolve(registry).with_suffix(".lock.json")


def load_lock(*registries: Path) -> Lock:
    """What the lock files of registry files know; nothing where there is none.

    Raises:
        ConfigError: one cannot be read.
    """
    models = [_load_lock(lock_path(registry)).models for registry in registries]
    return Lock(models={name: model for one in models for name, model in one.items()})


def _load_lock(path: Path) -> Lock:
    try:
        return Lock.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Lock()
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"The lock file cannot be read: {str(error).splitlines()[0]}.",
            value=path,
            remedy="Restore it, or write it with `imagen models resolve`.",
        ) from error


def save_lock(registry: Path, lock: Lock) -> None:
    """Write a lock file whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    path = lock_path(registry)
    values = lock.model_dump(mode="json", by_alias=True, exclude_none=True)
    values["models"] = dict(sorted(values["models"].items()))
    for model in values["models"].values():
        if not model["compiled"]:
            del model["compiled"]
    with _writing(path):
        write_whole(path, json.dumps(values, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all; raises OSError."""
    new = path.with_suffix(f".{uuid.uuid4().hex}.new")
    try:
        with new.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def update_lock(registry: Path, change: Callable[[Lock], Lock]) -> None:
    """Change the lock file as it is now; other processes that change it wait meanwhile.

    Raises:
        ConfigError: it cannot be read or written.
    """
    path = lock_path(registry)
    with _writing(path):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a network file system may have no locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        save_lock(registry, change(load_lock(registry)))
    finally:
        os.close(folder)


@contextmanager
def _writing(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"The lock file cannot be written: {error.strerror}.", value=path
        ) from error


def conversion_of(spec: ArtefactSpec) -> str | None:
    """A registry entry's conversion, in the form of the lock file."""
    return spec.convert.model_dump_json() if spec.convert else None


def locked_digest(lock: Lock, spec: ArtefactSpec) -> str:
    """The digest to serve.

    Raises:
        ConfigError: it is unresolved, or the registry has other origins or another conversion.
    """
    locked = lock.models.get(spec.name)
    if locked is None or locked.digest == UNRESOLVED:
        raise _unresolved(spec.name, "no digest")
    _check_agreement(spec, locked)
    if locked.conversion != conversion_of(spec):
        raise ConfigError(
            f"The lock file's digest of {spec.name} comes from another conversion.",
            value=locked.conversion or "none",
            remedy=f"Run `imagen models convert --again {spec.name}`."
            if spec.convert
            else f"Run `imagen models resolve {spec.name}`.",
        )
    return locked.digest


def known_digest(lock: Lock, spec: ArtefactSpec) -> str | None:
    """The digest to serve; None where `locked_digest` raises."""
    try:
        return locked_digest(lock, spec)
    except ConfigError:
        return None


def locked_origins(spec: ArtefactSpec, lock: Lock) -> tuple[LockedOrigin, ...]:
    """The origins of a model, resolved and equal to the registry's.

    Raises:
        ConfigError: something is unresolved, or the registry has changed since.
    """
    locked = lock.models.get(spec.name)
    if locked is None:
        raise _unresolved(spec.name, "no entry in the lock file")
    _check_agreement(spec, locked)
    for origin in locked.origins:
        if origin.source.endswith(f"@{UNRESOLVED}"):
            raise _unresolved(spec.name, "its revision")
        for file in origin.files:
            if not file.resolved:
                raise _unresolved(spec.name, file.path)
    return locked.origins


def origin_manifest(spec: ArtefactSpec, origins: tuple[LockedOrigin, ...]) -> Manifest:
    """The manifest of a model that is served with its origins' files unchanged."""
    files = [
        FileEntry(path=place.target(f.path), size=int(f.size), sha256=f.sha256)
        for place, origin in zip(spec.origins, origins, strict=True)
        for f in origin.files
    ]
    return build_manifest(spec, tuple(o.source for o in origins), files)


def build_manifest(
    spec: ArtefactSpec, sources: tuple[str, ...], files: list[FileEntry], converted: str = ""
) -> Manifest:
    """A manifest of a registry entry."""
    return Manifest(
        model=spec.name,
        sources=sources,
        converted=converted or None,
        licence=Licence(id=spec.licence, commercial=spec.commercial),
        family=spec.family_name,
        variant=spec.file_variant,
        files=tuple(sorted(files, key=lambda f: f.path)),
    )


def _check_agreement(spec: ArtefactSpec, locked: LockedModel) -> None:
    if not _agree(spec, locked):
        raise ConfigError(
            f"The registry's entry of {spec.name} has changed since it was resolved.",
            remedy=f"Run `imagen models resolve {spec.name}`.",
        )


def _agree(spec: ArtefactSpec, locked: LockedModel) -> bool:
    if len(spec.origins) != len(locked.origins):
        return False
    for ours, theirs in zip(spec.origins, locked.origins, strict=True):
        if list(ours.files) != [f.path for f in theirs.files]:
            return False
        if ours.source.endswith(f"@{UNRESOLVED}"):
            if parse_hub(ours.source)[0] != parse_hub(theirs.source)[0]:
                return False
        elif ours.source != theirs.source:
            return False
    return True


def _unresolved(name: str, what: str) -> ConfigError:
    return ConfigError(
        f"Model {name} is unresolved: {what}.",
        remedy=f"Run `imagen models resolve {name}` online, and then, for a model with a"
        f" conversion, `imagen models convert {name}`.",
    )
