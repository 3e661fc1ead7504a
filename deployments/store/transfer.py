"""Fetching files: many ranges at a time, tried again after failures, hashed while they come."""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from deployments.errors import ModelCorrupt, SourceFailed
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
_LONGEST_SLEEP_S = 1.0
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

    def take(self, count: int, beat: Callable[[], object] = lambda: None) -> None:
        """Wait until so many bytes may pass; `beat` is called while that lasts."""
        if self._rate is None:
            return
        with self._lock:
            self._next_s = max(self._next_s, time.monotonic() - 1) + count / self._rate
            free_s = self._next_s
        while (pause_s := free_s - time.monotonic()) > 0:
            time.sleep(min(pause_s, _LONGEST_SLEEP_S))
            beat()


def retrying(
    work: Callable[[], T],
    settings: StoreSettings,
    moved: Callable[[], bool] = lambda: False,
    again: Callable[[], object] = lambda: None,
) -> T:
    """Do `work`, again after each Transient: exponential backoff with full jitter.

    Args:
        moved: whether the last try got any further; then the count of failures starts anew.
        again: called before each further try.

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
            again()
            time.sleep(pause_s)


@dataclass(slots=True)
class _Progress:
    """One file on its way: a hash follows the ranges in order, reading back what came early.

    It is open only from its first range to its last: a model may have more files than a process
    may open.
    """

    wanted: Wanted
    path: Path
    left: int
    """Ranges that are not done."""
    descriptor: int = -1
    hashes: Hashes = field(default_factory=Hashes)
    arrived: dict[int, int] = field(default_factory=dict[int, int])
    lock: threading.Lock = field(default_factory=threading.Lock)
    hashing: bool = False

    @property
    def where(self) -> str:
        return f"{self.wanted.source.url} {self.wanted.remote.path}"

    def open(self) -> None:
        with self.lock:
            if self.descriptor < 0:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
                self.descriptor = os.open(self.path, flags, 0o644)

    def close(self) -> None:
        with self.lock:
            if self.descriptor >= 0:
                os.close(self.descriptor)
            self.descriptor = -1

    def leave(self) -> bool:
        """Note that a range is done; True for the last."""
        with self.lock:
            self.left -= 1
            return not self.left

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
        listener: hears of bytes and of tries.
        beat: called as bytes come.
        throttle: shared with other fetchers of this process; None for one of its own.

    Attributes:
        done: entries with CRC32C, by path, of the files that are fetched, checked and synced.
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
        self.done: dict[str, FileEntry] = {}
        self._done_bytes = 0
        self._failed = threading.Event()

    def fetch(self, files: Sequence[Wanted], folder: Path) -> None:
        """Fetch, check and sync every file; what has other bytes than expected is removed again.

        Raises:
            SourceFailed: a source failed for good.
            ModelCorrupt: it sent other bytes than expected; the other files are done.
            OSError: of this disk.
        """
        self._failed.clear()
        # The largest first, so that no long one is left alone at the end.
        ordered = sorted(files, key=lambda f: -f.entry.size)
        progresses = [self._plan(wanted, folder) for wanted in ordered]
        try:
            with ThreadPoolExecutor(self._settings.threads, thread_name_prefix="fetch") as pool:
                # In order, so that no more files are open than there are threads, and one.
                ranges = [(p, *span) for p in progresses for span in self._ranges(p.wanted)]
                tasks = [pool.submit(self._range, *r) for r in ranges]
                try:
                    wrong = [error for task in tasks if (error := task.result())]
                except BaseException:  # Ctrl-C too, of which the threads know nothing
                    self._failed.set()
                    raise
        finally:
            for progress in progresses:
                progress.close()
        if wrong:
            raise wrong[0]

    def _plan(self, wanted: Wanted, folder: Path) -> _Progress:
        progress = _Progress(wanted, folder / wanted.entry.path, len(self._ranges(wanted)))
        expected, actual = wanted.entry.size, wanted.remote.size
        if actual not in (-1, expected):
            raise mismatch(self._model, progress.where, f"{expected} bytes", f"{actual} bytes")
        return progress

    def _ranges(self, wanted: Wanted) -> list[tuple[int, int]]:
        """At least one: an empty file is made too."""
        size, step = wanted.entry.size, self._settings.range_bytes
        return [(start, min(start + step, size)) for start in range(0, max(size, 1), step)]

    def _range(self, progress: _Progress, start: int, stop: int) -> ModelCorrupt | None:
        """Fetch a range; whoever has a file's last one gives what is wrong with the file."""
        try:
            if self._failed.is_set():
                return None
            progress.open()
            self._transfer(progress, start, stop)
            if self._failed.is_set():
                return None
            progress.advance(start, stop)
            # Now, beside the others' transfers, rather than all at the end.
            os.fdatasync(progress.descriptor)
            return self._finish(progress) if progress.leave() else None
        except BaseException:
            self._failed.set()  # the others end soon; the first error is the one that is told
            raise

    def _transfer(self, progress: _Progress, start: int, stop: int) -> None:
        position = before = start

        def write(data: bytes) -> None:
            nonlocal position
            data = data[: stop - position]
            self._throttle.take(len(data), lambda: self._beat(self._done_bytes))
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

        again = lambda: self._listener(Event("retry", self._model))  # noqa: E731
        retrying(attempt, self._settings, lambda: position > before, again)

    def _finish(self, progress: _Progress) -> ModelCorrupt | None:
        entry, hashes = progress.wanted.entry, progress.hashes
        try:
            compare(self._model, progress.where, entry, hashes)
        except ModelCorrupt as error:
            progress.close()
            progress.path.unlink()
            return error
        os.fsync(progress.descriptor)
        progress.close()
        self.done[entry.path] = entry.model_copy(update={"crc32c": hashes.crc32c})
        return None

    def _count(self, count: int) -> None:
        self._done_bytes += count
        self._listener(Event("bytes", self._model, count))
        self._beat(self._done_bytes)
