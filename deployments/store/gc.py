"""Garbage collection: models that nothing refers to, and what dead processes left behind."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from deployments.errors import LockTimeout, StoreUnwritable
from deployments.store import locks
from deployments.store.disk import delete_folder, folder_bytes, network_filesystem
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
        kind: model: a whole model, with its compiled artefacts. staging: left by an interrupted
            pull. trash: left by an interrupted removal. quarantine: damaged, and older than a week.
        name: of the model, or of the folder.
        digest: 16 hex digits; empty where they are unknown.
        bytes: that it occupied.
    """

    kind: Literal["model", "staging", "trash", "quarantine"]
    name: str
    digest: str
    bytes: int


def used_percent(root: Path) -> float:
    """How full a disk is for users other than root, in percent, as df shows it."""
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
    """Remove leftovers; then, if the disk is too full, unused models, the oldest first.

    A model is unused if its digest is not in `keep`, not the one its ref names, not leased, and not
    being pulled. On a network file system leases and locks may mean nothing, so models are removed
    only if `now` is set, and staging folders never.

    Args:
        store: to clean.
        keep: digests to leave alone: those of the lock file.
        settings: at what use of the disk to start and stop.
        now: remove every unused model, however full the disk is.
        resumable: digests whose interrupted pulls are left for the next pull to take over.
        used: how full the disk is, percent.

    Raises:
        StoreUnwritable: the store is read-only, or this user may not write it.
    """
    if not store.root.is_dir():
        return []
    removed = list(_leftovers(store, resumable))
    if not now and _full_percent(store, settings, used) < settings.gc_start_percent:
        return removed
    stop_percent = -1.0 if now else settings.gc_stop_percent

    def enough() -> bool:
        return _full_percent(store, settings, used) <= stop_percent

    return removed + _models(store, keep, enough, now=now)


def _full_percent(store: Store, settings: StoreSettings, used: UsedPercent) -> float:
    """How full the disk is, or the store's share of it if that is fuller."""
    if settings.max_bytes is None:
        return used(store.root)
    return max(used(store.root), 100 * store.used_bytes / settings.max_bytes)


def _models(
    store: Store, keep: Collection[str], enough: Callable[[], bool], *, now: bool
) -> list[Removed]:
    removed: list[Removed] = []
    network = network_filesystem(store.root)
    if network and not now:
        logger.warning("No model is removed: on %s, leases may mean nothing.", network)
        return removed
    for model, short in _unused(store, keep):
        if enough():
            break
        size = store.size_bytes(model, short)
        if _if_free(store, short, lambda m=model, s=short: store.remove(m, s)):
            removed.append(Removed("model", model, short, size))
            logger.info("Removed %s@%s, which nothing uses: %d bytes", model, short, size)
    return removed


def make_room(
    store: Store, keep: Collection[str], settings: StoreSettings, used: UsedPercent = used_percent
) -> list[Removed]:
    """Call `collect` before a pull if the disk is over the watermark; spares resumable pulls.

    Never raises: a pull that does not fit reports that itself.
    """
    try:
        if (
            store.root.is_dir()
            and _full_percent(store, settings, used) >= settings.gc_start_percent
        ):
            return collect(store, keep, settings, resumable=keep, used=used)
    except StoreUnwritable as error:
        logger.warning("Garbage collection before the pull failed: %s", error)
    return []


def _unused(store: Store, keep: Collection[str]) -> list[tuple[str, str]]:
    """Model and digest of each folder that nothing refers to, the oldest first."""
    kept = {digest[:SHORT] for digest in (*keep, *store.refs().values())}
    unused: list[tuple[float, str, str]] = []
    for model, short in store.removable():
        for folder in (store.folder(model, short), store.compiled_folder(model, short)):
            with suppress(OSError):
                if short not in kept:
                    unused.append((folder.stat().st_mtime, model, short))
                    break
    return [(model, short) for _, model, short in sorted(unused)]


def _leftovers(store: Store, resumable: Collection[str]) -> Iterator[Removed]:
    """Remove what dead processes left, and what was damaged over a week ago."""
    for folder in (store.root / ".trash").glob("*"):
        yield _drop("trash", folder)
    spared = {digest[:SHORT] for digest in resumable}
    network = network_filesystem(store.root)
    for folder in [] if network else sorted((store.root / ".staging").glob("*")):
        short = folder.name.partition(".")[0]
        if short not in spared:
            done = _if_free(store, short, lambda f=folder, s=short: _drop("staging", f, s))
            yield from [done] if done else []
    for folder in sorted((store.root / ".quarantine").glob("*")):
        with suppress(FileNotFoundError):
            # The time of the move to quarantine is the change time; the bytes may be much older.
            if time.time() - folder.lstat().st_ctime > _QUARANTINE_S:
                yield _drop("quarantine", folder)


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
    """Call `work` while no process pulls that digest; None if one does."""
    with suppress(OSError):  # taking the lock gives the better error
        store.lock_path(short).parent.mkdir(exist_ok=True)
    try:
        with locks.exclusive(store.lock_path(short), short, 0):
            return work()
    except LockTimeout:
        return None
