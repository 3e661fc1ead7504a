"""The store of a node: verified model folders, each whole or not there.

    <root>/store/<model>/<digest16>/   immutable; manifest.json and the model's files
    <root>/refs/<model>.json           the digest a pull last made current
    <root>/.staging/<digest16>.…/      a pull under way, or what a dead one left
    <root>/.locks/  .leases/           one file a digest, never removed
    <root>/.quarantine/  .trash/       damaged, and on its way out

A folder gets its name in `store` by one rename, after every byte was checked and synced. So
presence means that it was whole once; loading checks it again.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from deployments.errors import ModelCorrupt, ModelNotCached, StoreUnwritable
from deployments.store import locks
from deployments.store.events import Event, Kind, Stage, ignore
from deployments.store.folder import (
    check_files,
    check_folder,
    compare,
    folder_bytes,
    hash_file,
    list_files,
)
from deployments.store.manifest import MANIFEST, SHORT
from deployments.store.sources import Source
from deployments.store.transfer import Fetcher, Throttle, Wanted, retrying

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from deployments.settings import StoreSettings
    from deployments.store.events import Listener
    from deployments.store.folder import Verify
    from deployments.store.manifest import FileEntry, Manifest

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHORT = re.compile(f"[0-9a-f]{{{SHORT}}}")
_HEADROOM_SHARE = 0.05
_HEADROOM_BYTES = 2 * 2**30
_NETWORK = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "gpfs",
    "ceph",
    "fuse",
    "9p",
    "beegfs",
    "gluster",
    "afs",
)
logger = logging.getLogger("ray.serve.imagen.store")
Places = Mapping[str, tuple[Source, str]]
"""Of each file of a manifest: its source, and its path there."""


class Store:
    """The models of one node.

    Args:
        settings: root, limits.
        listener: hears of everything.
    """

    def __init__(self, settings: StoreSettings, listener: Listener = ignore) -> None:
        self.root = settings.folder
        self._settings = settings
        self._listener = listener
        self._throttle = Throttle(settings.max_bytes_per_s)

    @property
    def used_bytes(self) -> int:
        """Of everything in it."""
        return folder_bytes(self.root)

    @property
    def free_bytes(self) -> int:
        """Left on the disk, or of what the store may have of it, whichever is less."""
        free_bytes, most_bytes = shutil.disk_usage(self.root).free, self._settings.max_bytes
        if most_bytes is None:
            return free_bytes
        return min(free_bytes, max(most_bytes - self.used_bytes, 0))

    def lock_path(self, digest: str) -> Path:
        """The lock of a digest, held while its folder is made or removed."""
        return self.root / ".locks" / f"{digest[:SHORT]}.lock"

    def folder(self, model: str, digest: str) -> Path:
        """Where a model lies, or would."""
        return self.root / "store" / model / digest[:SHORT]

    def holds(self, model: str, digest: str) -> bool:
        """Whether a whole folder is there, by names and sizes."""
        try:
            check_folder(self.folder(model, digest), digest, model, "quick")
        except (ModelNotCached, ModelCorrupt):
            return False
        return True

    def check(self, model: str, digest: str, verify: Verify = "crc32c") -> Manifest:
        """Prove a folder byte for byte; raises as `check_folder`."""
        start_s = time.monotonic()
        try:
            return check_folder(self.folder(model, digest), digest, model, verify)
        except ModelCorrupt:
            self._tell("verify_failure", model)
            raise
        finally:
            self._tell("seconds", model, time.monotonic() - start_s, "verify")

    def lease(self, digest: str) -> AbstractContextManager[None]:
        """While it is held, garbage collection leaves the digest alone."""
        with suppress(OSError):
            _make_folder(self.root / ".leases")
        return locks.shared(self._lease_path(digest))

    def find(self, model: str, digest: str, verify: Verify = "quick") -> Path | None:
        """A model's folder, if it is there; a damaged one goes to quarantine, as if it were not.

        Raises:
            ModelCorrupt: it is damaged, and the store is read-only.
        """
        folder = self.folder(model, digest)
        if not folder.is_dir():
            return None
        try:
            check_folder(folder, digest, model, verify)
        except (ModelCorrupt, ModelNotCached) as error:
            self._tell("verify_failure", model)
            logger.error("%s", error)
            try:
                self.quarantine(model, digest)
            except StoreUnwritable:
                raise error from None
            return None
        self._tell("hit", model)
        return folder

    def pull(self, manifest: Manifest, places: Places) -> Path:
        """Make sure that a model is in the store; fetch what is missing.

        Any number of processes may call it at a time: one fetches, the others wait for it.

        Args:
            places: where each of its files comes from.

        Returns:
            Its folder.

        Raises:
            SourceFailed, ModelCorrupt: the source failed, or sent other bytes.
            StoreUnwritable: disk full, read-only, not permitted.
            LockTimeout: another process holds the lock and stands still.
        """
        with self._writing():
            self._make_folders()
            with self._locked(manifest) as holder:
                if not self.find(manifest.model, manifest.digest):
                    self._tell("miss", manifest.model, manifest.total_bytes)
                    self._fetch(manifest, places, holder.beat)
                self._reap(manifest.short)
            self._set_ref(manifest)
            self._tell("disk_free", manifest.model, self.free_bytes)
        self._tell("done", manifest.model)
        return self.folder(manifest.model, manifest.digest)

    def add(self, manifest: Manifest, fill: Callable[[Path], None]) -> Path:
        """Publish a folder that `fill` makes (a conversion), as `pull` does a fetched one."""
        with self._writing():
            self._make_folders()
            with self._locked(manifest):
                if not self.find(manifest.model, manifest.digest, "crc32c"):
                    self._make(manifest, fill)
                self._reap(manifest.short)
            self._set_ref(manifest)
        return self.folder(manifest.model, manifest.digest)

    @contextmanager
    def fetched(
        self, manifest: Manifest, places: Places
    ) -> Generator[tuple[Path, Callable[[int], None]]]:
        """A manifest's files in a temporary folder, for a conversion; raises as `pull`.

        Yields:
            The folder, gone afterwards with every one beside it whose name begins with its own;
            and what to call now and then so that those who wait know that the work goes on.
        """
        with self._writing():
            self._make_folders()
            with self._locked(manifest) as holder:
                self._tell("miss", manifest.model, manifest.total_bytes)
                folder, _ = self._gather(manifest, places, holder.beat)
                try:
                    yield folder, holder.beat
                finally:
                    for made in folder.parent.glob(f"{folder.name}*"):
                        delete_folder(made)
                    self._reap(manifest.short)

    def quarantine(self, model: str, digest: str) -> None:
        """Take a damaged folder out of the way, for the next pull to replace; keeps its bytes."""
        folder = self.folder(model, digest)
        with self._writing():
            self._make_folders()
            target = self.root / ".quarantine" / f"{model}.{digest[:SHORT]}.{uuid.uuid4().hex[:8]}"
            with suppress(FileNotFoundError):
                folder.chmod(0o755)
                folder.rename(target)
                logger.error("Quarantined the damaged folder of %s: %s", model, target)

    def models(self) -> list[tuple[str, str]]:
        """(model, short digest) of every folder there is; what else lies there is not ours."""
        return sorted(
            (folder.parent.name, folder.name)
            for folder in (self.root / "store").glob("*/*")
            if _SHORT.fullmatch(folder.name) and _is_folder(folder.parent) and _is_folder(folder)
        )

    def refs(self) -> dict[str, str]:
        """Digest last made current, by model."""
        found: dict[str, str] = {}
        for path in (self.root / "refs").glob("*.json"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                found[path.stem] = str(json.loads(path.read_bytes())["digest"])
        return found

    def remove(self, model: str, digest: str) -> bool:
        """Remove a folder that nobody has a lease on; False if somebody has."""
        with self._writing(), self._unleased(digest) as free:
            if not free:
                return False
            trash = self.root / ".trash" / uuid.uuid4().hex
            folder = self.folder(model, digest)
            with suppress(FileNotFoundError):
                folder.chmod(0o755)
                folder.rename(trash)
            delete_folder(trash)
            ref = self.root / "refs" / f"{model}.json"
            if self.refs().get(model, "").startswith(digest):
                ref.unlink(missing_ok=True)
        return True

    @contextmanager
    def _locked(self, manifest: Manifest) -> Generator[locks.Holder]:
        what = f"{manifest.model}@{manifest.short}"
        timeout_s = self._settings.lock_timeout_s
        with locks.exclusive(self.lock_path(manifest.digest), what, timeout_s) as holder:
            self._tell("waited", manifest.model, holder.waited_s)
            yield holder

    def _make(self, manifest: Manifest, fill: Callable[[Path], None]) -> None:
        staging = self._new_staging(manifest.short)
        try:
            fill(staging)
            check_files(staging, manifest, "full")
            self._publish(staging, manifest)
        except BaseException:
            delete_folder(staging)
            raise

    def _fetch(self, manifest: Manifest, places: Places, beat: Callable[[int], None]) -> None:
        staging, files = self._gather(manifest, places, beat)
        # 3) Everything is checked and synced: give it its name.
        with self._clearing(staging):
            self._publish(staging, manifest.model_copy(update={"files": tuple(files)}))

    def _gather(
        self, manifest: Manifest, places: Places, beat: Callable[[int], None]
    ) -> tuple[Path, list[FileEntry]]:
        """A staging folder with every file, checked and synced."""
        # 1) Take over what an interrupted pull left, and look whether the rest fits.
        staging = self._new_staging(manifest.short)
        with self._clearing(staging):
            have = self._adopt(manifest, staging, beat)
            self._check_space(manifest, sum(f.size for f in have.values()))
            # 2) Fetch; once more those whose bytes were wrong.
            missing = [f for f in manifest.files if f.path not in have]
            files = [*have.values(), *self._fetch_twice(manifest, missing, places, staging, beat)]
        return staging, sorted(files, key=lambda f: f.path)

    @contextmanager
    def _clearing(self, staging: Path) -> Generator[None]:
        """Delete what is too much for the disk; the rest is left to be taken over."""
        try:
            yield
        except StoreUnwritable:
            delete_folder(staging)
            raise
        except OSError as error:
            if error.errno in _FULL:
                delete_folder(staging)
            raise

    def _fetch_twice(
        self,
        manifest: Manifest,
        files: list[FileEntry],
        places: Places,
        staging: Path,
        beat: Callable[[int], None],
    ) -> list[FileEntry]:
        start_s = time.monotonic()
        fetcher = Fetcher(manifest.model, self._settings, self._listener, beat, self._throttle)
        try:
            wanted = self._locate(manifest.model, files, places)
            try:
                fetcher.fetch(wanted, staging)
            except ModelCorrupt as error:
                self._tell("verify_failure", manifest.model)
                logger.warning("%s Fetching it once more.", error)
                wrong = [f for f in files if f.path not in fetcher.done]
                fetcher.fetch(self._locate(manifest.model, wrong, places), staging)
            return list(fetcher.done.values())
        finally:
            self._tell("seconds", manifest.model, time.monotonic() - start_s, "fetch")

    def _locate(self, model: str, files: list[FileEntry], places: Places) -> list[Wanted]:
        """Ask each source once for all of its files."""
        by_source: dict[int, tuple[Source, list[tuple[FileEntry, str]]]] = {}
        for entry in files:
            source, path = places[entry.path]
            by_source.setdefault(id(source), (source, []))[1].append((entry, path))
        wanted: list[Wanted] = []
        again = lambda: self._tell("retry", model)  # noqa: E731
        for source, items in by_source.values():
            paths = [path for _, path in items]
            remotes = retrying(lambda s=source, p=paths: s.stat(p), self._settings, again=again)
            wanted += [Wanted(e, source, r) for (e, _), r in zip(items, remotes, strict=True)]
        return wanted

    def _adopt(
        self, manifest: Manifest, staging: Path, beat: Callable[[int], None]
    ) -> dict[str, FileEntry]:
        """Move whole files out of stale staging folders, which go: they may be what fills the disk.

        We hold the lock, so they are stale.
        """
        adopted: dict[str, FileEntry] = {}
        if network_filesystem(self.root):  # where locks may mean nothing, another pull may live
            return adopted
        for old in (self.root / ".staging").glob(f"{manifest.short}.*"):
            if old == staging or not _is_folder(old):
                continue
            _unprotect(old)  # the other may have died just before its last rename
            for entry in manifest.files:
                path = old / entry.path
                if entry.path in adopted or path.is_symlink() or not path.is_file():
                    continue
                if path.stat().st_size != entry.size:
                    continue
                beat(0)
                hashes = hash_file(path)
                with suppress(ModelCorrupt):
                    compare(manifest.model, path, entry, hashes)
                    target = staging / entry.path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    path.rename(target)
                    sync_path(target)
                    adopted[entry.path] = entry.model_copy(update={"crc32c": hashes.crc32c})
                    self._tell("adopted", manifest.model, entry.size)
            delete_folder(old)
        return adopted

    def _check_space(self, manifest: Manifest, have_bytes: int) -> None:
        usage = shutil.disk_usage(self.root)
        needed = manifest.total_bytes - have_bytes
        # A small disk keeps a share of itself free, a large one no more than is useful.
        headroom = min(_HEADROOM_SHARE * usage.total, _HEADROOM_BYTES)
        if usage.free < needed + headroom:
            raise StoreUnwritable(
                f"{manifest.model} does not fit the disk: {needed} bytes needed,"
                f" {headroom:.0f} kept free, {usage.free} available.",
                value=self.root,
                remedy="Run `imagen models gc`, or give the store a larger disk.",
            )

    def _publish(self, staging: Path, manifest: Manifest) -> None:
        start_s = time.monotonic()
        (staging / MANIFEST).write_bytes(manifest.encode())
        for path in list_files(staging):
            (staging / path).chmod(0o444)
            sync_path(staging / path)
        for parent, _, _ in os.walk(staging, topdown=False):
            sync_path(parent)
            if parent != str(staging):
                os.chmod(parent, 0o555)  # noqa: S103 - read-only for all is the point
        target = self.folder(manifest.model, manifest.digest)
        _make_folder(target.parent)
        self._make_lease(manifest.digest)
        try:
            staging.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            # Somebody was faster, where locks mean nothing. Theirs is kept if it is whole.
            if self.find(manifest.model, manifest.digest, "crc32c"):
                delete_folder(staging)
            else:
                staging.rename(target)
        # Only now: a folder without write permission cannot be moved.
        target.chmod(0o555)
        sync_path(target.parent)
        self._tell("seconds", manifest.model, time.monotonic() - start_s, "sync")

    def _set_ref(self, manifest: Manifest) -> None:
        path = self.root / "refs" / f"{manifest.model}.json"
        if self.refs().get(manifest.model) == manifest.digest:
            return
        new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        new.write_text(json.dumps({"digest": manifest.digest, "promoted_at": time.time()}))
        new.chmod(0o644)
        sync_path(new)
        new.replace(path)
        sync_path(path.parent)

    def _reap(self, short: str) -> None:
        """Remove what interrupted pulls of this digest left; we hold its lock."""
        if not network_filesystem(self.root):
            for old in (self.root / ".staging").glob(f"{short}.*"):
                delete_folder(old)

    def _new_staging(self, short: str) -> Path:
        name = f"{short}.{socket.gethostname()}.{uuid.uuid4().hex}"
        staging = self.root / ".staging" / name
        staging.mkdir(parents=True)
        return staging

    def _make_folders(self) -> None:
        _make_folder(self.root)
        for name in ("store", "refs", ".staging", ".locks", ".leases", ".quarantine", ".trash"):
            _make_folder(self.root / name)

    def _make_lease(self, digest: str) -> None:
        """For those who may only read the store; they cannot make the file themselves."""
        path = self._lease_path(digest)
        if not path.exists():
            path.touch()
            path.chmod(0o644)

    def _unleased(self, digest: str) -> AbstractContextManager[bool]:
        self._make_folders()
        return locks.alone(self._lease_path(digest))

    def _lease_path(self, digest: str) -> Path:
        return self.root / ".leases" / f"{digest[:SHORT]}.lock"

    @contextmanager
    def _writing(self) -> Generator[None]:
        """Turn what a disk refuses into our error."""
        try:
            yield
        except OSError as error:
            remedies = {
                errno.ENOSPC: "Run `imagen models gc`, or give the store a larger disk.",
                errno.EDQUOT: "Raise the quota, or run `imagen models gc`.",
                errno.EROFS: "Mount it writable for pulls, or pull from where it is.",
            }
            raise StoreUnwritable(
                f"The model store cannot be written: {error.strerror or error}.",
                value=error.filename or self.root,
                remedy=remedies.get(error.errno or 0, "Give this user write access to it."),
            ) from error

    def _tell(self, kind: Kind, model: str, amount: float = 0, stage: Stage = "") -> None:
        self._listener(Event(kind, model, amount, stage))


def _make_folder(path: Path) -> None:
    """Make a folder that others may read, whatever the umask: replicas run as another user."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o755)


def network_filesystem(path: Path, table: str = "/proc/mounts") -> str | None:
    """The type of the network file system a path is on; None for a local one or an unknown."""
    kind = filesystem(path, table)
    return kind if kind.startswith(_NETWORK) else None


def filesystem(path: Path, table: str = "/proc/mounts") -> str:
    """The type of the file system a path is on, such as ext4; empty where nobody knows."""
    best, kind = -1, ""
    here = os.path.realpath(path)
    with suppress(OSError), open(table, encoding="utf-8") as mounts:
        for line in mounts:
            _, place, name, *_ = line.split()
            # A space is written \\040 there; letters beyond Latin-1 must come through unharmed.
            place = place.encode("latin-1", "backslashreplace").decode("unicode_escape")
            inside = here == place or here.startswith(place.rstrip("/") + "/")
            if inside and len(place) >= best:
                best, kind = len(place), name
    return kind


def sync_path(path: Path | str) -> None:
    """Bring a file, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete_folder(folder: Path) -> None:
    """Delete a folder whose folders may be read-only; of a link, itself alone; a file too."""
    with suppress(FileNotFoundError):
        if not _is_folder(folder):
            folder.unlink()
            return
        _unprotect(folder)
        shutil.rmtree(folder)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _unprotect(folder: Path) -> None:
    if not _is_folder(folder):  # walking a link would change what it points to
        return
    for parent, _, _ in os.walk(folder):
        os.chmod(parent, 0o755)  # noqa: S103 - was 0555
