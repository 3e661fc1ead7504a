"""Pulls under way: folders below `.staging` that are filled, checked and then given their name."""

from __future__ import annotations

import errno
import logging
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from deployments.errors import ModelCorrupt, StoreUnwritable
from deployments.store.bucket import Reader
from deployments.store.disk import (
    delete_folder,
    is_folder,
    network_filesystem,
    sync_path,
    unprotect,
)
from deployments.store.events import Event, Listener
from deployments.store.folder import compare, hash_file
from deployments.store.transfer import Download, Fetcher, Throttle, retrying

if TYPE_CHECKING:
    from pathlib import Path

    from deployments.settings import StoreSettings
    from deployments.store.manifest import FileEntry, Manifest

    Beat = Callable[[int], None]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HEADROOM_SHARE = 0.05
_HEADROOM_BYTES = 2 * 2**30
logger = logging.getLogger("ray.serve.imagen.store")
Places = Mapping[str, tuple[Reader, str]]
"""For each file of a manifest: the reader of its source, and its path there."""


class Staging:
    """The staging folders of one store.

    Args:
        root: of the store.
        settings: limits.
        listener: receives every event.
    """

    def __init__(self, root: Path, settings: StoreSettings, listener: Listener) -> None:
        self._root = root
        self._settings = settings
        self._emit = listener
        self._throttle = Throttle(settings.max_bytes_per_s)

    def new(self, short: str) -> Path:
        """Make an empty folder for a digest, with a name of its own."""
        name = f"{short}.{socket.gethostname()}.{uuid.uuid4().hex}"
        folder = self._root / ".staging" / name
        folder.mkdir(parents=True)
        return folder

    def reap(self, short: str) -> None:
        """Delete what interrupted pulls of this digest left; the caller holds its lock."""
        # On a network file system the lock proves nothing, and another pull may be alive.
        if not network_filesystem(self._root):
            for old in (self._root / ".staging").glob(f"{short}.*"):
                delete_folder(old)

    def gather(
        self, manifest: Manifest, places: Places, beat: Beat
    ) -> tuple[Path, list[FileEntry]]:
        """Fetch every file into a new folder, checked and synced.

        Returns:
            The folder, and the manifest's entries with their CRC32Cs.

        Raises:
            SourceFailed, ModelCorrupt, StoreUnwritable, OSError: what is already fetched is left
                for the next pull, unless the disk is full.
        """
        folder = self.new(manifest.short)
        with self.deleted_if_full(folder):
            # 1) Take over what an interrupted pull left, and check that the rest fits.
            adopted = self._adopt(manifest, folder, beat)
            self._check_space(manifest, sum(f.size for f in adopted.values()))
            # 2) Fetch the rest; files with wrong bytes once more.
            absent = [f for f in manifest.files if f.path not in adopted]
            files = [*adopted.values(), *self._fetch_twice(manifest, absent, places, folder, beat)]
        return folder, sorted(files, key=lambda f: f.path)

    @contextmanager
    def deleted_if_full(self, folder: Path) -> Generator[None]:
        """Delete the folder if the disk has no room for it; after other errors it stays."""
        try:
            yield
        except StoreUnwritable:
            delete_folder(folder)
            raise
        except OSError as error:
            if error.errno in _FULL:
                delete_folder(folder)
            raise

    def _adopt(self, manifest: Manifest, folder: Path, beat: Beat) -> dict[str, FileEntry]:
        """Move whole files out of older folders, and delete the rest: it may fill the disk."""
        adopted: dict[str, FileEntry] = {}
        if network_filesystem(self._root):  # another pull may be alive there, despite our lock
            return adopted
        for old in (self._root / ".staging").glob(f"{manifest.short}.*"):
            if old == folder or not is_folder(old):
                continue
            unprotect(old)  # the other may have died just before its last rename
            for entry in manifest.files:
                if entry.path not in adopted and _has_size(old / entry.path, entry.size):
                    beat(0)
                    with suppress(ModelCorrupt):
                        adopted[entry.path] = _take(manifest.model, entry, old, folder)
                        self._emit(Event("adopted", manifest.model, entry.size))
            delete_folder(old)
        return adopted

    def _check_space(self, manifest: Manifest, adopted_bytes: int) -> None:
        usage = shutil.disk_usage(self._root)
        needed = manifest.total_bytes - adopted_bytes
        # A small disk keeps a share of itself free, a large one no more than is useful.
        headroom = min(_HEADROOM_SHARE * usage.total, _HEADROOM_BYTES)
        if usage.free < needed + headroom:
            raise StoreUnwritable(
                f"{manifest.model} does not fit the disk: {needed} bytes needed,"
                f" {headroom:.0f} kept free, {usage.free} available.",
                value=self._root,
                remedy="Run `imagen models gc`, or give the store a larger disk.",
            )

    def _fetch_twice(
        self,
        manifest: Manifest,
        files: list[FileEntry],
        places: Places,
        folder: Path,
        beat: Beat,
    ) -> list[FileEntry]:
        model, start_s = manifest.model, time.monotonic()
        fetcher = Fetcher(model, self._settings, self._emit, beat, self._throttle)
        try:
            try:
                fetcher.fetch(self._locate(model, files, places), folder)
            except ModelCorrupt as error:
                self._emit(Event("verify_failure", model))
                logger.warning("%s Fetching it once more.", error)
                wrong = [f for f in files if f.path not in fetcher.done]
                fetcher.fetch(self._locate(model, wrong, places), folder)
            return list(fetcher.done.values())
        finally:
            self._emit(Event("seconds", model, time.monotonic() - start_s, "fetch"))

    def _locate(self, model: str, files: list[FileEntry], places: Places) -> list[Download]:
        """Ask each source once for all of its files."""
        by_reader: dict[int, tuple[Reader, list[tuple[FileEntry, str]]]] = {}
        for entry in files:
            reader, path = places[entry.path]
            by_reader.setdefault(id(reader), (reader, []))[1].append((entry, path))
        downloads: list[Download] = []
        for reader, items in by_reader.values():
            paths = [path for _, path in items]
            remotes = retrying(
                lambda reader=reader, paths=paths: reader.stat(paths),
                self._settings,
                on_retry=lambda: self._emit(Event("retry", model)),
            )
            pairs = zip(items, remotes, strict=True)
            downloads += [Download(entry, reader, remote) for (entry, _), remote in pairs]
        return downloads


def _has_size(path: Path, size: int) -> bool:
    return not path.is_symlink() and path.is_file() and path.stat().st_size == size


def _take(model: str, entry: FileEntry, old: Path, folder: Path) -> FileEntry:
    """Move a file that has the right bytes from one folder to another; its entry with CRC32C.

    Raises:
        ModelCorrupt: it has other bytes.
    """
    hashes = hash_file(old / entry.path)
    compare(model, old / entry.path, entry, hashes)
    target = folder / entry.path
    target.parent.mkdir(parents=True, exist_ok=True)
    (old / entry.path).rename(target)
    sync_path(target)
    return entry.model_copy(update={"crc32c": hashes.crc32c})
