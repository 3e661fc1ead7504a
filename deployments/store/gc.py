"""Garbage collection: models that nobody wants any more, and what dead processes left behind."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from deployments.errors import LockTimeout, StoreUnwritable
from deployments.store import locks
from deployments.store.cache import delete_folder, network_filesystem
from deployments.store.folder import folder_bytes
from deployments.store.manifest import SHORT

if TYPE_CHECKING:
    from deployments.settings import StoreSettings
    from deployments.store.cache import Store

_QUARANTINE_S = 7 * 24 * 3600
logger = logging.getLogger("ray.serve.imagen.store")
T = TypeVar("T")
UsedPercent = Callable[[Path], float]


class Removed(NamedTuple):
    """Something that garbage collection removed.

    Attributes:
        kind: model: a whole one. staging: of an interrupted pull. trash: of an interrupted removal.
            quarantine: damaged, and a week old.
        name: of the model, or of the folder.
        digest: 16 hex digits; empty where the folder tells none.
        bytes: it took up.
    """

    kind: Literal["model", "staging", "trash", "quarantine"]
    name: str
    digest: str
    bytes: int


def used_percent(root: Path) -> float:
    """How full a disk is for those who are not root, as df says."""
    usage = shutil.disk_usage(root)
    return 100 * usage.used / (usage.used + usage.free)


def collect(
    store: Store,
    keep: Collection[str],
    settings: StoreSettings,
    *,
    now: bool = False,
    resumable: Collection[str] = (),
    used: UsedPercent = used_percent,
) -> list[Removed]:
    """Remove leftovers, then, on a disk that is too full, unused models, the oldest first.

    A model is unused if its digest is neither in `keep`, nor the one its ref names, nor leased, nor
    being pulled. On a network file system leases and locks may mean nothing: there, models go only
    by `now`, and staging never.

    Args:
        keep: digests to leave alone: those of the lock file.
        now: remove every unused model, however full the disk is.
        resumable: digests whose interrupted pulls are left for the next one to take over.
        used: how full the disk is, percent.

    Raises:
        StoreUnwritable: the store is read-only, or not ours to write.
    """
    if not store.root.is_dir():
        return []
    removed = [*_trash(store), *_staging(store, resumable), *_quarantine(store)]
    if not now and _full_percent(store, settings, used) < settings.gc_start_percent:
        return removed
    stop_percent = -1.0 if now else settings.gc_stop_percent

    def enough() -> bool:
        return _full_percent(store, settings, used) <= stop_percent

    return removed + _models(store, keep, enough, now=now)


def _full_percent(store: Store, settings: StoreSettings, used: UsedPercent) -> float:
    """Of the disk or of what the store may have of it, whichever is fuller."""
    if settings.max_bytes is None:
        return used(store.root)
    return max(used(store.root), 100 * store.used_bytes / settings.max_bytes)


def _models(
    store: Store, keep: Collection[str], enough: Callable[[], bool], *, now: bool
) -> list[Removed]:
    removed: list[Removed] = []
    network = network_filesystem(store.root)
    if network and not now:
        logger.warning("Leases may mean nothing on %s: no model is removed unasked.", network)
        return removed
    for model, short in _unused(store, keep):
        if enough():
            break
        size = folder_bytes(store.folder(model, short))
        if _if_free(store, short, lambda m=model, s=short: store.remove(m, s)):
            removed.append(Removed("model", model, short, size))
            logger.info("Removed %s@%s, which nothing uses: %d bytes", model, short, size)
    return removed


def make_room(
    store: Store, keep: Collection[str], settings: StoreSettings, used: UsedPercent = used_percent
) -> list[Removed]:
    """Before a pull: `collect` if the disk is over the watermark, sparing what it may resume.

    Never raises: a pull that does not fit says so itself.
    """
    try:
        if (
            store.root.is_dir()
            and _full_percent(store, settings, used) >= settings.gc_start_percent
        ):
            return collect(store, keep, settings, resumable=keep, used=used)
    except StoreUnwritable as error:
        logger.warning("No room could be made: %s", error)
    return []


def _unused(store: Store, keep: Collection[str]) -> list[tuple[str, str]]:
    wanted = {digest[:SHORT] for digest in (*keep, *store.refs().values())}
    found: list[tuple[float, str, str]] = []
    for model, short in store.models():
        with suppress(OSError):
            if short not in wanted:
                found.append((store.folder(model, short).stat().st_mtime, model, short))
    return [(model, short) for _, model, short in sorted(found)]


def _trash(store: Store) -> list[Removed]:
    return [_drop("trash", folder) for folder in (store.root / ".trash").glob("*")]


def _staging(store: Store, resumable: Collection[str]) -> list[Removed]:
    removed: list[Removed] = []
    if network_filesystem(store.root):
        return removed
    spared = {digest[:SHORT] for digest in resumable}
    for folder in sorted((store.root / ".staging").glob("*")):
        short = folder.name.partition(".")[0]
        if short not in spared:
            done = _if_free(store, short, lambda f=folder, s=short: _drop("staging", f, s))
            removed += [done] if done else []
    return removed


def _quarantine(store: Store) -> list[Removed]:
    removed: list[Removed] = []
    for folder in sorted((store.root / ".quarantine").glob("*")):
        with suppress(FileNotFoundError):
            # The change time is that of its move there; the bytes may be much older.
            if time.time() - folder.lstat().st_ctime > _QUARANTINE_S:
                removed.append(_drop("quarantine", folder))
    return removed


def _drop(
    kind: Literal["staging", "trash", "quarantine"], folder: Path, digest: str = ""
) -> Removed:
    size = folder_bytes(folder)
    try:
        delete_folder(folder)
    except OSError as error:
        raise StoreUnwritable(
            f"A leftover of the model store cannot be removed: {error.strerror or error}.",
            value=folder,
            remedy="Give this user write access to the store.",
        ) from error
    return Removed(kind, folder.name, digest, size)


def _if_free(store: Store, short: str, work: Callable[[], T]) -> T | None:
    """Do `work` while no one pulls that digest; None if someone does."""
    with suppress(OSError):  # the lock says it better
        store.lock_path(short).parent.mkdir(exist_ok=True)
    try:
        with locks.exclusive(store.lock_path(short), short, 0):
            return work()
    except LockTimeout:
        return None
