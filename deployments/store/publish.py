"""Publishing: copying a verified model of this store to a bucket that nodes pull from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from deployments.errors import ModelCorrupt
from deployments.origins import MANIFEST
from deployments.registry import ArtefactSpec, ModelSpec
from deployments.settings import StoreSettings
from deployments.store import compiled
from deployments.store.bucket import Bucket, RemoteFile, find
from deployments.store.events import Event, Listener, ignore
from deployments.store.folder import Hashes, hash_file
from deployments.store.provider import compiled_url, make_bucket, mirror_url, open_bucket
from deployments.store.smoke import smoke_load
from deployments.store.transfer import retrying

if TYPE_CHECKING:
    from deployments.store.cache import Store
    from deployments.store.lockfile import LockedModel
    from deployments.store.manifest import Manifest

_REFUSED = "has the right bytes but does not load, so it is not published"
Upload = Literal["published", "present", "absent"]


class Published(NamedTuple):
    """The result of publishing.

    Attributes:
        url: of the model's folder.
        files, bytes: that were uploaded; 0 if everything was already there.
    """

    url: str
    files: int
    bytes: int


def publish(
    spec: ArtefactSpec,
    digest: str,
    store: Store,
    target_url: str,
    settings: StoreSettings,
    *,
    smoke: bool = True,
    listener: Listener = ignore,
) -> Published:
    """Upload a model of the store, after checking every byte and loading the model once.

    The manifest comes last, so that nodes never see half a model. Nothing is ever overwritten.

    Args:
        spec: of the model.
        digest: which content of it.
        store: that holds it.
        target_url: gs://, s3:// or file:// folder, which nodes name as `store.mirror`.
        settings: threads, attempts and backoff.
        smoke: load it first, on the CPU and without a network; artefacts are never loaded.
        listener: receives events for progress.

    Raises:
        ConfigError: the target is neither gs://, s3:// nor file://.
        ModelNotCached: the model is not in the store.
        ModelCorrupt: it is damaged or does not load, or the target holds other bytes.
        SourceFailed: the target failed for good.
        StoreUnwritable: a target folder cannot be written.
    """
    url = mirror_url(target_url, spec.name, digest)
    bucket = open_bucket(url, settings)
    with store.lease(digest):
        manifest = store.check(spec.name, digest, "full")
        folder = store.folder(spec.name, digest)
        known = retrying(lambda: find(bucket, MANIFEST), settings)
        if smoke and isinstance(spec, ModelSpec) and not known:
            smoke_load(spec, folder, _REFUSED)
        sizes = _upload(bucket, folder, manifest, settings, listener)
    return Published(url, len(sizes), sum(sizes))


def publish_compiled(
    model: str, locked: LockedModel, store: Store, target_url: str, settings: StoreSettings
) -> dict[str, Upload]:
    """Upload the lock file's compiled artefacts of a model, as far as this store holds them.

    Machines of other kinds publish the others. Nothing is ever overwritten: the name of an
    artefact holds a part of its SHA-256, so one that was compiled again gets another name.

    Returns:
        What became of each artefact, by id; absent: neither in this store nor at the target.

    Raises:
        ModelCorrupt: one is damaged in this store, or the target holds other bytes.
        ConfigError, SourceFailed, StoreUnwritable: as `publish`.
    """
    bucket = make_bucket(compiled_url(target_url, model, locked.digest))
    done: dict[str, Upload] = {}
    with store.lease(locked.digest):
        for artefact in locked.compiled:
            path = compiled.published_name(artefact)
            crc32c = compiled.check(store, model, locked.digest, artefact)
            if crc32c is None:
                there = retrying(lambda path=path: find(bucket, path), settings)
                done[artefact.id] = "present" if there else "absent"
                continue
            file, size = compiled.place(store, model, locked.digest, artefact), artefact.bytes
            send = partial(_put, bucket, path, file, size, crc32c)
            done[artefact.id] = "published" if retrying(send, settings) else "present"
    return done


def _upload(
    bucket: Bucket, folder: Path, manifest: Manifest, settings: StoreSettings, listener: Listener
) -> list[int]:
    """Upload what is not there; the bytes of each file that was uploaded."""
    model = manifest.model

    def send(path: str, size: int, known: str | None) -> int | None:
        crc32c = known or hash_file(folder / path, sha256=False).crc32c
        sent = retrying(lambda: _put(bucket, path, folder / path, size, crc32c), settings)
        listener(Event("bytes" if sent else "adopted", model, size))
        return size if sent else None

    listener(Event("miss", model, manifest.total_bytes))
    with ThreadPoolExecutor(settings.threads, thread_name_prefix="publish") as pool:
        tasks = [pool.submit(send, f.path, f.size, f.crc32c) for f in manifest.files]
        try:
            sizes = [task.result() for task in tasks]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    sizes.append(send(MANIFEST, (folder / MANIFEST).stat().st_size, None))
    listener(Event("done", model))
    return [size for size in sizes if size is not None]


def _put(bucket: Bucket, path: str, file: Path, size: int, crc32c: str) -> bool:
    """Upload one file, or check that the file that is already there has the same bytes."""
    there = find(bucket, path)
    if there is None:
        if bucket.put(path, file):
            return True
        there = find(bucket, path)  # another process was faster
    actual = (there.size, _crc32c(bucket, there)) if there else (0, "nothing")
    if actual != (size, crc32c):
        raise ModelCorrupt(
            f"The target holds another file under this name: {bucket.url}/{path}:"
            f" expected {size} bytes, crc32c {crc32c};"
            f" actual {actual[0]} bytes, crc32c {actual[1]}.",
            remedy="Nothing is overwritten. Find out who wrote it; delete it there if it is wrong.",
        )
    return False


def _crc32c(bucket: Bucket, file: RemoteFile) -> str:
    if file.crc32c:
        return file.crc32c
    hashes = Hashes(sha256=False)
    bucket.read(file, 0, file.size, hashes.update)
    return hashes.crc32c
