"""Publishing: a verified model of this store to a bucket or folder that nodes pull from."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from deployments.errors import ConfigError, ModelCorrupt, SetupError, StoreUnwritable
from deployments.registry import ArtefactSpec, ModelSpec
from deployments.settings import ROOT, Settings
from deployments.store.cache import sync_path
from deployments.store.events import Event, ignore
from deployments.store.folder import hash_file
from deployments.store.manifest import MANIFEST
from deployments.store.provider import mirror_url
from deployments.store.sources import local_folder
from deployments.store.transfer import retrying

if TYPE_CHECKING:
    from deployments.settings import StoreSettings
    from deployments.store.cache import Store
    from deployments.store.events import Listener
    from deployments.store.manifest import Manifest

_TARGET = re.compile(r"^(gs|file)://.+")
_SMOKE_TIMEOUT_S = 900
_BLOCK_BYTES = 8 * 2**20
_NETWORK = frozenset(
    {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo"}
    | {"socket.gethostbyname"}
)


class Target(Protocol):
    """Where models are published. Its methods may be called from several threads at a time."""

    def find(self, path: str) -> tuple[int, str] | None:
        """Size and CRC32C (hex) of a file that is there."""
        ...

    def upload(self, path: str, local: Path) -> bool:
        """Put a file there, whole or not at all; False if there is one of that name already."""
        ...


class Published(NamedTuple):
    """What publishing did.

    Attributes:
        url: of the model's folder.
        files, bytes: that were uploaded; none if all of it was there already.
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
    """Upload a model that is in the store, after every byte was verified and the model was loaded.

    Its manifest comes last: a model that is half there is not seen. Nothing is ever overwritten.

    Args:
        target_url: gs:// or file:// folder; `store.mirror` of those who are to pull from it.
        smoke: load it first, on the CPU and without a network; artefacts have nothing to load.

    Raises:
        ConfigError: no such kind of target.
        ModelNotCached: it is not in the store.
        ModelCorrupt: it is damaged, does not load, or the target holds something else there.
        SourceFailed: the target failed for good.
        StoreUnwritable: a target folder cannot be written.
    """
    url = mirror_url(target_url, spec.name, digest)
    target = open_target(url, settings)
    with store.lease(digest):
        manifest = store.check(spec.name, digest, "full")
        folder = store.folder(spec.name, digest)
        known = retrying(lambda: target.find(MANIFEST), settings)
        if smoke and isinstance(spec, ModelSpec) and not known:
            smoke_load(spec, folder)
        sent = _upload(manifest, folder, target, url, settings, listener)
    return Published(url, len(sent), sum(sent))


def open_target(url: str, settings: StoreSettings) -> Target:
    """The target of a URL; a bucket is listed once, so that a wrong one is known at once.

    Raises:
        ConfigError: it is neither gs:// nor file://.
        SourceFailed: there is no such bucket, or no access to it.
    """
    if not _TARGET.match(url):
        raise ConfigError(
            "Models cannot be published there.",
            value=url,
            remedy="Use gs://bucket/prefix or file:///folder.",
        )
    if url.startswith("file:"):
        return FolderTarget(local_folder(url))
    from deployments.store.gcs import BucketSource

    bucket = BucketSource(url)
    retrying(lambda: bucket.stat([]), settings)
    return bucket


class FolderTarget:
    """A folder, perhaps on a disk that many nodes mount."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, path: str) -> tuple[int, str] | None:
        try:
            hashes = hash_file(self._folder / path, sha256=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unwritable(error) from error
        return hashes.size, hashes.crc32c

    def upload(self, path: str, local: Path) -> bool:
        final = self._folder / path
        # Beside the models, so that what a killed process left is in no model's folder.
        part = self._folder.parents[1] / f".upload-{uuid.uuid4().hex}"
        try:
            _make_folder(final.parent)
            try:
                with local.open("rb") as source, part.open("xb") as sink:
                    os.fchmod(sink.fileno(), 0o644)  # others pull it, whatever our umask
                    shutil.copyfileobj(source, sink, _BLOCK_BYTES)
                sync_path(part)
                os.link(part, final)  # which, unlike a rename, replaces nothing
                sync_path(final.parent)
            finally:
                part.unlink(missing_ok=True)
        except FileExistsError:
            return False
        except OSError as error:
            raise self._unwritable(error) from error
        return True

    def _unwritable(self, error: OSError) -> StoreUnwritable:
        return StoreUnwritable(
            f"The target folder cannot be written: {error.strerror}.",
            value=error.filename or self._folder,
            remedy="Give this user write access, and the disk room; it must know hard links.",
        )


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, readable for others whatever our umask."""
    for missing in reversed([f for f in (folder, *folder.parents) if not f.exists()]):
        with suppress(FileExistsError):  # another thread was faster
            missing.mkdir()
            missing.chmod(0o755)


def _upload(
    manifest: Manifest,
    folder: Path,
    target: Target,
    url: str,
    settings: StoreSettings,
    listener: Listener,
) -> list[int]:
    """Sizes of the files that had to be uploaded."""
    listener(Event("miss", manifest.model, manifest.total_bytes))

    def send(path: str, size: int, crc32c: str) -> int | None:
        sent = retrying(lambda: _send(target, folder, path, (size, crc32c), url), settings)
        listener(Event("bytes" if sent else "adopted", manifest.model, size))
        return size if sent else None

    with ThreadPoolExecutor(settings.threads, thread_name_prefix="publish") as pool:
        tasks = [
            pool.submit(send, f.path, f.size, f.crc32c or hash_file(folder / f.path).crc32c)
            for f in manifest.files
        ]
        try:
            results = [task.result() for task in tasks]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    hashes = hash_file(folder / MANIFEST)
    results.append(send(MANIFEST, hashes.size, hashes.crc32c))
    listener(Event("done", manifest.model))
    return [size for size in results if size is not None]


def _send(target: Target, folder: Path, path: str, expected: tuple[int, str], url: str) -> bool:
    """Upload one file, or make sure that the one that is there has the same bytes."""
    there = target.find(path)
    if there is None:
        if target.upload(path, folder / path):
            return True
        there = target.find(path)  # somebody was faster
    if there != expected:
        size, crc32c = there or (0, "nothing")
        raise ModelCorrupt(
            f"The target holds another file under this name: {url}/{path}:"
            f" expected {expected[0]} bytes, crc32c {expected[1]};"
            f" actual {size} bytes, crc32c {crc32c}.",
            remedy="Nothing is overwritten. Find out who wrote it; remove it there if it is wrong.",
        )
    return False


def smoke_load(spec: ModelSpec, folder: Path) -> None:
    """Load a model in a process of its own that cannot reach the network.

    Raises:
        ModelCorrupt: it does not load.
    """
    work = json.dumps({"spec": spec.model_dump(mode="json"), "folder": str(folder)})
    command = [sys.executable, "-m", "deployments.store.publish"]
    try:
        done = subprocess.run(  # noqa: S603 - ourselves
            command,
            input=work,
            text=True,
            capture_output=True,
            cwd=ROOT,
            timeout=_SMOKE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _unloadable(spec, f"not done after {_SMOKE_TIMEOUT_S} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise _unloadable(spec, lines[-1])


def _unloadable(spec: ModelSpec, reason: str) -> ModelCorrupt:
    return ModelCorrupt(
        f"{spec.name} is whole, but does not load, so it is not published: {reason}",
        remedy="Correct the entry in the model registry (files, family, variant, convert).",
    )


def _refuse_network(event: str, _: tuple[Any, ...]) -> None:
    if event in _NETWORK:
        raise OSError(f"no network while a model is tried: {event}")


def _smoke_main() -> None:
    sys.addaudithook(_refuse_network)
    work = json.load(sys.stdin)
    # The publishing machine may have no GPU, and attention changes no weights.
    spec = ModelSpec.model_validate(work["spec"]).model_copy(update={"attention": "sdpa"})
    from deployments.loader import build

    try:
        build(spec, Path(work["folder"]), Settings(device="cpu"))
    except SetupError as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    _smoke_main()
