"""Compiled artefacts: what `torch.compile` made of a model for one kind of device.

    <root>/compiled/<model>/<digest16>/<id>.bin

An artefact is executable code. The lock file, which is reviewed and committed, has its SHA-256 and
is trusted; the store's disk and the mirror are not. So `find` hands out only bytes that it has
hashed itself. An artefact is a shortcut, never a condition: without it a model is compiled anew or
runs plain.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from deployments.errors import ModelCorrupt, StoreUnwritable
from deployments.gpu.target import Target
from deployments.store.disk import make_folder, sync_path
from deployments.store.folder import compare, hash_file, mismatch
from deployments.store.lockfile import Lock, LockedArtefact, Mode, build_manifest
from deployments.store.manifest import SHORT, FileEntry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deployments.registry import ArtefactSpec
    from deployments.store.bucket import Reader
    from deployments.store.cache import Store
    from deployments.store.events import Outcome

logger = logging.getLogger("ray.serve.imagen.store")


@dataclass(frozen=True, slots=True)
class CompiledKey:
    """What an artefact was made of and for. It fits where all of this is equal, and nowhere else.

    Attributes:
        model: name in the registry.
        digest: of its manifest, 16 hex digits at least; the first 16 count.
        target: the kind of device, and the versions of what compiles.
        mode: what was compiled.
        shapes: fingerprint of the shapes that were compiled for.
    """

    model: str
    digest: str
    target: Target
    mode: Mode
    shapes: str

    @property
    def id(self) -> str:
        """16 hex digits that are the same in every process."""
        text = json.dumps(asdict(self) | {"digest": self.digest[:SHORT]}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:SHORT]


def find(store: Store, lock: Lock, key: CompiledKey) -> bytes | None:
    """The bytes of an artefact, which have the SHA-256 of the lock file.

    Bytes rather than a path, so that nobody can change them between this check and their use.

    Returns:
        None if it is missing, foreign or damaged; the log and the store's listener are told which.
        A damaged file is moved to quarantine.
    """
    known = _known(lock, key.model, key.digest)
    artefact = next((one for one in known if one.id == key.id), None)
    if artefact is None:
        outcome: Outcome = "foreign" if known else "missing"
        others = sorted({f"{one.device}, torch {one.torch}, {one.mode}" for one in known})
        has = f"the lock file has it for {'; '.join(others)}" if known else "none is locked"
        return _refuse(store, key, outcome, has)
    path = place(store, key.model, key.digest, artefact)
    try:
        with path.open("rb") as file:
            data = file.read(artefact.bytes + 1)
    except OSError as error:
        return _refuse(store, key, "missing", error.strerror or "it cannot be read")
    if hashlib.sha256(data).hexdigest() == artefact.sha256:
        return data
    _set_aside(store, key.model, key.digest, path)
    return _refuse(store, key, "damaged", "its bytes are not those of the lock file")


def load(store: Store, lock: Lock, key: CompiledKey, into: Callable[[bytes], object]) -> bool:
    """Hand a verified artefact to what loads it.

    Args:
        store, lock, key: as for `find`.
        into: loads the bytes; returns a false value, or raises, if it cannot use them.

    Returns:
        Whether it is loaded; if not, the log and the store's listener are told why.
    """
    data = find(store, lock, key)
    if data is None:
        return False
    try:
        loaded = into(data)
    except Exception as error:
        logger.warning("Loading an artefact of %s raised %r.", key.model, error)
        loaded = None
    if not loaded:
        _refuse(store, key, "foreign", "this torch cannot use it")
        return False
    store.count_compiled(key.model, "loaded")
    return True


def add(store: Store, key: CompiledKey, blob: bytes) -> LockedArtefact:
    """Write an artefact to the store, whole or not at all; it replaces an earlier one of its key.

    Returns:
        What the lock file has to say of it.

    Raises:
        StoreUnwritable, LockTimeout: as `Store.pull`.
    """
    target = key.target
    artefact = LockedArtefact(
        id=key.id,
        device=target.device,
        torch=target.torch,
        mode=key.mode,
        shapes=key.shapes,
        bytes=len(blob),
        sha256=hashlib.sha256(blob).hexdigest(),
    )
    with store.locked(key.model, key.id):
        folder = store.staging.new(key.id)
        with store.staging.deleted_if_full(folder):
            made = folder / f"{key.id}.bin"
            made.write_bytes(blob)
            _move(made, place(store, key.model, key.digest, artefact))
    return artefact


def pull(
    store: Store, spec: ArtefactSpec, digest: str, artefact: LockedArtefact, reader: Reader
) -> None:
    """Fetch an artefact, hashed as it arrives, unless the store holds it; one process at a time.

    Args:
        store: of this node.
        spec, digest: of its model.
        artefact: of the lock file.
        reader: of the mirror's folder for this model's artefacts.

    Raises:
        SourceFailed, ModelCorrupt, StoreUnwritable, LockTimeout: as `Store.pull`.
    """
    name = published_name(artefact)
    entry = FileEntry(path=name, size=artefact.bytes, sha256=artefact.sha256)
    manifest = build_manifest(spec, (reader.url,), [entry])
    with store.locked(spec.name, manifest.digest) as holder:
        if holds(store, spec.name, digest, artefact):
            return
        folder, _ = store.staging.gather(manifest, {name: (reader, name)}, holder.beat)
        with store.staging.deleted_if_full(folder):
            _move(folder / name, place(store, spec.name, digest, artefact))


def matching(lock: Lock, model: str, digest: str, target: Target) -> list[LockedArtefact]:
    """The artefacts of a model that fit a target, whatever their mode and shapes."""
    locked = lock.models.get(model)
    if locked is None:
        return []
    keyed = [
        (CompiledKey(model, locked.digest, target, one.mode, one.shapes), one)
        for one in _known(lock, model, digest)
    ]
    return [one for key, one in keyed if key.id == one.id]


def holds(
    store: Store,
    model: str,
    digest: str,
    artefact: LockedArtefact,
    verify: Literal["quick", "full"] = "full",
) -> bool:
    """Whether the store has an artefact; quick: with the right size, full: with the right bytes."""
    if verify == "full":
        try:
            return check(store, model, digest, artefact) is not None
        except ModelCorrupt as error:
            logger.error("%s", error)
            return False
    try:
        return place(store, model, digest, artefact).stat().st_size == artefact.bytes
    except OSError:
        return False


def check(store: Store, model: str, digest: str, artefact: LockedArtefact) -> str | None:
    """Compare a file with the lock file; its CRC32C, or None if it is not in the store.

    Raises:
        ModelCorrupt: it has other bytes, or cannot be read.
    """
    path = place(store, model, digest, artefact)
    entry = FileEntry(path=path.name, size=artefact.bytes, sha256=artefact.sha256)
    try:
        hashes = hash_file(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        wrong = error.strerror or "nothing"
        raise mismatch(model, path, f"sha256 {artefact.sha256}", wrong) from error
    compare(model, path, entry, hashes)
    return hashes.crc32c


def place(store: Store, model: str, digest: str, artefact: LockedArtefact) -> Path:
    """The path of an artefact, whether or not it exists."""
    return store.compiled_folder(model, digest) / f"{artefact.id}.bin"


def published_name(artefact: LockedArtefact) -> str:
    """The name of an artefact at a mirror, where nothing is ever overwritten."""
    return f"{artefact.id}-{artefact.sha256[:SHORT]}.bin"


def _known(lock: Lock, model: str, digest: str) -> tuple[LockedArtefact, ...]:
    """The lock file's artefacts of this content of a model."""
    locked = lock.models.get(model)
    return locked.compiled if locked and locked.digest.startswith(digest) else ()


def _refuse(store: Store, key: CompiledKey, outcome: Outcome, reason: str) -> None:
    wanted = f"{key.target.device}, torch {key.target.torch}, {key.mode}"
    logger.warning(
        "%s gets no compiled artefact for %s: %s: %s", key.model, wanted, outcome, reason
    )
    store.count_compiled(key.model, outcome)


def _set_aside(store: Store, model: str, digest: str, path: Path) -> None:
    try:
        store.set_aside(path, model, digest)
    except StoreUnwritable as error:  # a read-only store; the file is refused each time
        logger.warning("%s", error)


def _move(made: Path, final: Path) -> None:
    """Give a file its final name, synced, in the place of a former one."""
    made.chmod(0o444)
    sync_path(made)
    make_folder(final.parent)
    os.replace(made, final)
    sync_path(final.parent)
