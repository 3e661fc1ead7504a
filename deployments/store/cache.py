"""The store of a node: verified model folders, each whole or absent.

    <root>/store/<model>/<digest16>/   immutable; manifest.json and the model's files
    <root>/compiled/<model>/<digest16>/  compiled artefacts of that model (compiled.py)
    <root>/refs/<model>.json           the digest that the last pull made current
    <root>/.staging/<digest16>.…/      a pull under way, or what a killed one left
    <root>/.locks/  .leases/           one file for each digest, never removed
    <root>/.quarantine/  .trash/       damaged folders, and folders being removed

A folder gets its name in `store` by one rename, after every byte was checked and synced. So a
folder that is present was whole once; loading checks it again.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import time
import uuid
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING

from deployments.errors import ModelCorrupt, ModelNotCached, StoreUnwritable
from deployments.origins import MANIFEST
from deployments.store import locks
from deployments.store.disk import delete_folder, folder_bytes, is_folder, make_folder, sync_path
from deployments.store.events import Event, Kind, Listener, Outcome, Stage, ignore
from deployments.store.folder import Verify, check_files, check_folder, list_files
from deployments.store.manifest import SHORT, Manifest
from deployments.store.staging import Places, Staging

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from deployments.settings import StoreSettings

_SHORT = re.compile(f"[0-9a-f]{{{SHORT}}}")
_REMEDIES = {
    errno.ENOSPC: "Run `imagen models gc`, or give the store a larger disk.",
    errno.EDQUOT: "Raise the quota, or run `imagen models gc`.",
    errno.EROFS: "Mount it writable for pulls, or pull from where it is writable.",
}
logger = logging.getLogger("ray.serve.imagen.store")


class Store:
    """The models of one node.

    Args:
        settings: root, limits.
        listener: receives every event.

    Attributes:
        staging: pulls under way.
    """

    def __init__(self, settings: StoreSettings, listener: Listener = ignore) -> None:
        self.root = settings.folder
        self._settings = settings
        self._listener = listener
        self.staging = Staging(self.root, settings, listener)

    @property
    def hub_cache(self) -> Path | None:
        """Where conversions look first for files of hf://."""
        return self._settings.hub_cache

    @property
    def used_bytes(self) -> int:
        """Bytes of everything in the store."""
        return folder_bytes(self.root)

    @property
    def free_bytes(self) -> int:
        """Bytes left on the disk, or of the store's share of it if that is less."""
        free_bytes, max_bytes = shutil.disk_usage(self.root).free, self._settings.max_bytes
        if max_bytes is None:
            return free_bytes
        return min(free_bytes, max(max_bytes - self.used_bytes, 0))

    def lock_path(self, digest: str) -> Path:
        """The lock of a digest, held while its folder is made or removed."""
        return self.root / ".locks" / f"{digest[:SHORT]}.lock"

    def folder(self, model: str, digest: str) -> Path:
        """The path of a model's folder, whether or not it exists."""
        return self.root / "store" / model / digest[:SHORT]

    def compiled_folder(self, model: str, digest: str) -> Path:
        """The path of the folder of a model's compiled artefacts, whether or not it exists."""
        return self.root / "compiled" / model / digest[:SHORT]

    def size_bytes(self, model: str, digest: str) -> int:
        """Bytes that a model takes, compiled artefacts included."""
        return sum(map(folder_bytes, self._folders(model, digest)))

    def holds(self, model: str, digest: str) -> bool:
        """Whether a model's folder is complete, by names and sizes."""
        try:
            check_folder(self.folder(model, digest), digest, model, "quick")
        except (ModelNotCached, ModelCorrupt):
            return False
        return True

    def check(self, model: str, digest: str, verify: Verify = "crc32c") -> Manifest:
        """Check a folder byte by byte; raises as `check_folder`."""
        start_s = time.monotonic()
        try:
            return check_folder(self.folder(model, digest), digest, model, verify)
        except ModelCorrupt:
            self._emit("verify_failure", model)
            raise
        finally:
            self._emit("seconds", model, time.monotonic() - start_s, "verify")

    def lease(self, digest: str) -> AbstractContextManager[None]:
        """A context in which garbage collection leaves the digest alone."""
        with suppress(OSError):
            make_folder(self.root / ".leases")
        return locks.shared(self._lease_path(digest))

    def find(self, model: str, digest: str, verify: Verify = "quick") -> Path | None:
        """A model's folder, or None. A damaged folder is moved to quarantine and counts as absent.

        Raises:
            ModelCorrupt: the folder is damaged, and the store is read-only.
        """
        folder = self.folder(model, digest)
        if not folder.is_dir():
            return None
        try:
            check_folder(folder, digest, model, verify)
        except (ModelCorrupt, ModelNotCached) as error:
            self._emit("verify_failure", model)
            logger.error("%s", error)
            try:
                self.quarantine(model, digest)
            except StoreUnwritable:
                raise error from None
            return None
        self._emit("hit", model)
        return folder

    def pull(self, manifest: Manifest, places: Places) -> Path:
        """Make sure that a model is in the store; fetch what is missing.

        Several processes may call it at the same time: one fetches, the others wait for it.

        Args:
            places: where each of its files comes from.

        Returns:
            The model's folder.

        Raises:
            SourceFailed, ModelCorrupt: the source failed, or sent other bytes.
            StoreUnwritable: the disk is full or read-only, or access is denied.
            LockTimeout: another process holds the lock and makes no progress.
        """
        with self.locked(manifest.model, manifest.digest) as holder:
            if not self.find(manifest.model, manifest.digest):
                self._emit("miss", manifest.model, manifest.total_bytes)
                self._fetch(manifest, places, holder.beat)
            self._set_ref(manifest)
            self._emit("disk_free", manifest.model, self.free_bytes)
        self._emit("done", manifest.model)
        return self.folder(manifest.model, manifest.digest)

    def add(self, manifest: Manifest, fill: Callable[[Path], None]) -> Path:
        """Add a folder that `fill` writes (a conversion), with the guarantees of `pull`."""
        with self.locked(manifest.model, manifest.digest):
            if not self.find(manifest.model, manifest.digest, "crc32c"):
                self._make(manifest, fill)
            self._set_ref(manifest)
        return self.folder(manifest.model, manifest.digest)

    @contextmanager
    def fetched(
        self, manifest: Manifest, places: Places
    ) -> Generator[tuple[Path, Callable[[int], None]]]:
        """Fetch a manifest's files into a temporary folder, for a conversion; raises as `pull`.

        Yields:
            The folder, which is deleted afterwards with every folder beside it whose name begins
            with its own; and a function to call now and then, which shows processes that wait
            for the lock that the work goes on.
        """
        with self.locked(manifest.model, manifest.digest) as holder:
            self._emit("miss", manifest.model, manifest.total_bytes)
            folder, _ = self.staging.gather(manifest, places, holder.beat)
            try:
                yield folder, holder.beat
            finally:
                for made in folder.parent.glob(f"{folder.name}*"):
                    delete_folder(made)

    def quarantine(self, model: str, digest: str) -> None:
        """Move a damaged folder aside, so that the next pull replaces it; its bytes are kept."""
        self.set_aside(self.folder(model, digest), model, digest)

    def set_aside(self, path: Path, model: str, digest: str) -> None:
        """Move a damaged folder or file of a model to quarantine."""
        with self._writing():
            target = self.root / ".quarantine" / f"{model}.{digest[:SHORT]}.{uuid.uuid4().hex[:8]}"
            kind = "folder" if path.is_dir() else "file"
            with suppress(FileNotFoundError):
                if kind == "folder":
                    path.chmod(0o755)
                path.rename(target)
                logger.error("Quarantined the damaged %s of %s: %s", kind, model, target)

    def models(self) -> list[tuple[str, str]]:
        """(model, 16 digits of the digest) of every model folder; other files are not ours."""
        return self._listed("store")

    def removable(self) -> list[tuple[str, str]]:
        """As `models`, and those of which only compiled artefacts are left."""
        return sorted({*self._listed("store"), *self._listed("compiled")})

    def refs(self) -> dict[str, str]:
        """The digest that was last made current, by model."""
        digests: dict[str, str] = {}
        for path in (self.root / "refs").glob("*.json"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                digests[path.stem] = str(json.loads(path.read_bytes())["digest"])
        return digests

    def remove(self, model: str, digest: str) -> bool:
        """Remove a model and its artefacts unless a process has a lease on it; False if so."""
        with self._writing(), locks.alone(self._lease_path(digest)) as free:
            if not free:
                return False
            for folder in self._folders(model, digest):
                trash = self.root / ".trash" / uuid.uuid4().hex
                with suppress(FileNotFoundError):
                    folder.chmod(0o755)
                    folder.rename(trash)
                delete_folder(trash)
            ref = self.root / "refs" / f"{model}.json"
            if self.refs().get(model, "").startswith(digest):
                ref.unlink(missing_ok=True)
        return True

    @contextmanager
    def locked(self, model: str, digest: str) -> Generator[locks.Holder]:
        """Write under the lock of a digest, and at last delete what interrupted pulls left."""
        what = f"{model}@{digest[:SHORT]}"
        path, timeout_s = self.lock_path(digest), self._settings.lock_timeout_s
        with self._writing(), locks.exclusive(path, what, timeout_s) as holder:
            self._emit("waited", model, holder.waited_s)
            yield holder
            self.staging.reap(digest[:SHORT])

    def count_compiled(self, model: str, outcome: Outcome) -> None:
        """Tell the listener what became of a compiled artefact that was wanted."""
        self._emit("compiled", model, stage=outcome)

    def _folders(self, model: str, digest: str) -> tuple[Path, Path]:
        return self.folder(model, digest), self.compiled_folder(model, digest)

    def _listed(self, name: str) -> list[tuple[str, str]]:
        return sorted(
            (folder.parent.name, folder.name)
            for folder in (self.root / name).glob("*/*")
            if _SHORT.fullmatch(folder.name) and is_folder(folder.parent) and is_folder(folder)
        )

    def _make(self, manifest: Manifest, fill: Callable[[Path], None]) -> None:
        staging = self.staging.new(manifest.short)
        try:
            fill(staging)
            check_files(staging, manifest, "full")
            self._publish(staging, manifest)
        except BaseException:
            delete_folder(staging)
            raise

    def _fetch(self, manifest: Manifest, places: Places, beat: Callable[[int], None]) -> None:
        staging, files = self.staging.gather(manifest, places, beat)
        # Everything is checked and synced: give it its name.
        with self.staging.deleted_if_full(staging):
            self._publish(staging, manifest.model_copy(update={"files": tuple(files)}))

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
        make_folder(target.parent)
        self._make_lease(manifest.digest)
        try:
            staging.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            # Locks mean nothing here, and another pull was faster: its folder stays if it is whole.
            if self.find(manifest.model, manifest.digest, "crc32c"):
                delete_folder(staging)
            else:
                staging.rename(target)
        # Only now, because a folder without write permission cannot be moved.
        target.chmod(0o555)
        sync_path(target.parent)
        self._emit("seconds", manifest.model, time.monotonic() - start_s, "sync")

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

    def _make_lease(self, digest: str) -> None:
        """Make the file for users who may only read the store, and so cannot make it."""
        path = self._lease_path(digest)
        if not path.exists():
            path.touch()
            path.chmod(0o644)

    def _lease_path(self, digest: str) -> Path:
        return self.root / ".leases" / f"{digest[:SHORT]}.lock"

    @contextmanager
    def _writing(self) -> Generator[None]:
        """Make the store's folders, and turn the disk's errors into ours."""
        try:
            for name in ("store", "refs", ".staging", ".locks", ".leases", ".quarantine", ".trash"):
                make_folder(self.root / name)
            yield
        except OSError as error:
            raise StoreUnwritable(
                f"The model store cannot be written: {error.strerror or error}.",
                value=error.filename or self.root,
                remedy=_REMEDIES.get(error.errno or 0, "Give this user write access to it."),
            ) from error

    def _emit(self, kind: Kind, model: str, amount: float = 0, stage: Stage = "") -> None:
        self._listener(Event(kind, model, amount, stage))
