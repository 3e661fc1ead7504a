"""Fetching files: many ranges at a time, tried again after failures, hashed while they come."""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from deployments.errors import SourceFailed
from deployments.store.events import Event
from deployments.store.folder import Hashes, compare, mismatch
from deployments.store.sources import Remote, Source, Transient

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from deployments.settings import StoreSettings
    from deployments.store.events import Listener
    from deployments.store.manifest import FileEntry

T = TypeVar("T")
_READ_BACK_BYTES = 2**20
logger = logging.getLogger("ray.serve.imagen.store")


class Wanted(NamedTuple):
    """A file to fetch: what it must be, and where it is."""

    entry: FileEntry
    source: Source
    remote: Remote


class Throttle:
    """Keeps the bytes of all threads together below a rate (a token bucket of one second)."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._rate = bytes_per_s
        self._next_s = 0.0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        if self._rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._next_s = max(self._next_s, now - 1) + count / self._rate
            pause_s = self._next_s - now
        if pause_s > 0:
            time.sleep(pause_s)


def retrying(
    work: Callable[[], T], settings: StoreSettings, moved: Callable[[], bool] = lambda: False
) -> T:
    """Do `work`, again after each Transient: exponential backoff with full jitter.

    Args:
        moved: whether the last try got any further; then the count of failures starts anew.

    Raises:
        SourceFailed: it failed `settings.attempts` times in a row.
    """
    failures = 0
    while True:
        try:
            return work()
        except Transient as error:
            failures = 1 if moved() else failures + 1
            if failures >= settings.attempts:
                raise SourceFailed(
                    f"A source failed {failures} times in a row: {error}.",
                    remedy="Try again later; what is already fetched is kept.",
                ) from error
            longest_s = min(settings.backoff_s * 2**failures, 30.0)
            pause_s = max(error.after_s, random.uniform(0, longest_s))  # noqa: S311 - jitter
            logger.warning("%s; trying again in %.1f s", error, pause_s)
            time.sleep(pause_s)


@dataclass(slots=True)
class _Progress:
    """One file on its way: a hash follows the ranges in order, reading back what came early."""

    wanted: Wanted
    descriptor: int
    hashes: Hashes = field(default_factory=Hashes)
    arrived: dict[int, int] = field(default_factory=dict[int, int])
    lock: threading.Lock = field(default_factory=threading.Lock)
    hashing: bool = False

    def advance(self, start: int, stop: int) -> None:
        """Note a range, and hash what follows on; whoever finds another at it leaves it to him."""
        with self.lock:
            self.arrived[start] = stop
            if self.hashing:
                return
            self.hashing = True
        while True:
            with self.lock:
                end = self.arrived.pop(self.hashes.size, None)
                if end is None:
                    self.hashing = False
                    return
            self._hash(end)

    def _hash(self, stop: int) -> None:
        while (position := self.hashes.size) < stop:
            data = os.pread(self.descriptor, min(_READ_BACK_BYTES, stop - position), position)
            if not data:
                raise OSError(errno.EIO, "what was written is gone")
            self.hashes.update(data)


class Fetcher:
    """Fetches the files of one model into a folder.

    Args:
        settings: threads, range size, rate, attempts.
        listener: hears of bytes.
        beat: called as bytes come.
        throttle: shared with other fetchers of this process; None for one of its own.
    """

    def __init__(
        self,
        model: str,
        settings: StoreSettings,
        listener: Listener,
        beat: Callable[[int], None],
        throttle: Throttle | None = None,
    ) -> None:
        self._model = model
        self._settings = settings
        self._listener = listener
        self._beat = beat
        self._throttle = throttle or Throttle(settings.max_bytes_per_s)
        self._done_bytes = 0
        self._failed = threading.Event()

    def fetch(self, files: Sequence[Wanted], folder: Path) -> list[FileEntry]:
        """Fetch, check and sync every file; their entries with CRC32C.

        Raises:
            SourceFailed: a source failed for good.
            ModelCorrupt: it sent other bytes than expected.
            OSError: of this disk.
        """
        # The largest first, so that no long one is left alone at the end.
        ordered = sorted(files, key=lambda f: -f.entry.size)
        with ExitStack() as opened:
            progresses = [self._open(wanted, folder, opened) for wanted in ordered]
            with ThreadPoolExecutor(self._settings.threads, thread_name_prefix="fetch") as pool:
                ranges = [(p, *span) for p in progresses for span in self._ranges(p)]
                tasks = [pool.submit(self._range, *r) for r in ranges]
                try:
                    for task in tasks:
                        task.result()
                except BaseException:  # Ctrl-C too, of which the threads know nothing
                    self._failed.set()
                    raise
            return [self._finish(p) for p in progresses]

    def _open(self, wanted: Wanted, folder: Path, opened: ExitStack) -> _Progress:
        if wanted.remote.size not in (-1, wanted.entry.size):
            raise mismatch(
                self._model,
                f"{wanted.source.url} {wanted.remote.path}",
                f"{wanted.entry.size} bytes",
                f"{wanted.remote.size} bytes",
            )
        path = folder / wanted.entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o644)
        opened.callback(os.close, descriptor)
        return _Progress(wanted, descriptor)

    def _ranges(self, progress: _Progress) -> list[tuple[int, int]]:
        size, step = progress.wanted.entry.size, self._settings.range_bytes
        return [(start, min(start + step, size)) for start in range(0, size, step)]

    def _range(self, progress: _Progress, start: int, stop: int) -> None:
        position = before = start

        def write(data: bytes) -> None:
            nonlocal position
            data = data[: stop - position]
            self._throttle.take(len(data))
            while data:  # a disk that is nearly full takes a part
                written = os.pwrite(progress.descriptor, data, position)
                position += written
                data = data[written:]
                self._count(written)

        def attempt() -> None:
            nonlocal before
            before = position
            if self._failed.is_set() or position == stop:
                return
            source, remote = progress.wanted.source, progress.wanted.remote
            source.read(remote, position, stop, write)
            if position < stop:
                raise Transient(f"{source.url} {remote.path} ended early")

        try:
            retrying(attempt, self._settings, lambda: position > before)
            if self._failed.is_set():
                return
            progress.advance(start, stop)
            # Now, beside the others' transfers, rather than all at the end.
            os.fdatasync(progress.descriptor)
        except BaseException:
            self._failed.set()  # the others end soon; the first error is the one that is told
            raise

    def _finish(self, progress: _Progress) -> FileEntry:
        wanted = progress.wanted
        where = f"{wanted.source.url} {wanted.remote.path}"
        compare(self._model, where, wanted.entry, progress.hashes)
        os.fsync(progress.descriptor)
        return wanted.entry.model_copy(update={"crc32c": progress.hashes.crc32c})

    def _count(self, count: int) -> None:
        self._done_bytes += count
        self._listener(Event("bytes", self._model, count))
        self._beat(self._done_bytes)
