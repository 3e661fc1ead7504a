"""Fetching files: many ranges at a time, repeated after failures, hashed as they arrive."""

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
from deployments.store.bucket import Reader, RemoteFile, Transient
from deployments.store.events import Event, Listener
from deployments.store.folder import Hashes, compare, mismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from deployments.settings import StoreSettings
    from deployments.store.manifest import FileEntry

T = TypeVar("T")
_READ_BACK_BYTES = 2**20
_LONGEST_SLEEP_S = 1.0
logger = logging.getLogger("ray.serve.imagen.store")


class Download(NamedTuple):
    """A file to fetch: what it must be, and where it is."""

    entry: FileEntry
    reader: Reader
    remote: RemoteFile


class Throttle:
    """Keeps the bytes of all threads together below a rate (a token bucket of one second)."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._rate = bytes_per_s
        self._next_s = 0.0
        self._lock = threading.Lock()

    def take(self, count: int, beat: Callable[[], object] = lambda: None) -> None:
        """Wait until `count` bytes may pass; `beat` is called now and then while waiting."""
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
    progressed: Callable[[], bool] = lambda: False,
    on_retry: Callable[[], object] = lambda: None,
) -> T:
    """Call `work`, and repeat it after each Transient: exponential backoff with full jitter.

    Args:
        settings: attempts and backoff.
        progressed: whether the last try got any further; if so, counting failures starts anew.
        on_retry: called before each further try.

    Raises:
        SourceFailed: `work` failed `settings.attempts` times in a row.
    """
    failures = 0
    while True:
        try:
            return work()
        except Transient as error:
            failures = 1 if progressed() else failures + 1
            if failures >= settings.attempts:
                raise SourceFailed(
                    f"A source failed {failures} times in a row: {error}.",
                    remedy="Try again later; what is already fetched is kept.",
                ) from error
            longest_s = min(settings.backoff_s * 2**failures, 30.0)
            pause_s = max(error.after_s, random.uniform(0, longest_s))  # noqa: S311 - jitter
            logger.warning("%s; trying again in %.1f s", error, pause_s)
            on_retry()
            time.sleep(pause_s)


@dataclass(slots=True)
class _Progress:
    """One file being fetched. Its hash follows the ranges in order and reads back those behind it.

    The file is open only from its first range to its last, because a model may have more files
    than a process may open.

    Attributes:
        ranges_left: how many are not done.
        arrived: stop by start of each range that is written and not hashed yet.
        hashing: whether a thread is hashing.
    """

    download: Download
    path: Path
    ranges_left: int
    descriptor: int = -1
    hashes: Hashes = field(default_factory=Hashes)
    arrived: dict[int, int] = field(default_factory=dict[int, int])
    lock: threading.Lock = field(default_factory=threading.Lock)
    hashing: bool = False

    @property
    def where(self) -> str:
        return f"{self.download.reader.url} {self.download.remote.path}"

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

    def finish_range(self) -> bool:
        """Count a range as done; True for the last."""
        with self.lock:
            self.ranges_left -= 1
            return not self.ranges_left

    def advance(self, start: int, stop: int) -> None:
        """Record a range as written, and hash all that can be, unless another thread is at it."""
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
                raise OSError(errno.EIO, "the bytes just written cannot be read back")
            self.hashes.update(data)


class Fetcher:
    """Fetches the files of one model into a folder.

    Args:
        settings: threads, range size, rate, attempts.
        listener: receives an event for all bytes and further tries.
        beat: called with the bytes so far, as they arrive.
        throttle: shared with other fetchers of this process; None makes a new one.

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

    def fetch(self, downloads: Sequence[Download], folder: Path) -> None:
        """Fetch, check and sync every file; files with wrong bytes are removed again.

        Raises:
            SourceFailed: a source failed for good.
            ModelCorrupt: a source sent wrong bytes; the other files are done.
            OSError: from this disk.
        """
        self._failed.clear()
        # The largest first, so that no thread is left with a long one at the end.
        ordered = sorted(downloads, key=lambda d: -d.entry.size)
        progresses = [self._begin(download, folder) for download in ordered]
        try:
            with ThreadPoolExecutor(self._settings.threads, thread_name_prefix="fetch") as pool:
                # In order, so that at most one file more than there are threads is open.
                ranges = [(p, *span) for p in progresses for span in self._ranges(p.download)]
                tasks = [pool.submit(self._range, *r) for r in ranges]
                try:
                    wrong = [error for task in tasks if (error := task.result())]
                except BaseException:  # Ctrl-C too, which the threads do not see
                    self._failed.set()
                    raise
        finally:
            for progress in progresses:
                progress.close()
        if wrong:
            raise wrong[0]

    def _begin(self, download: Download, folder: Path) -> _Progress:
        path = folder / download.entry.path
        progress = _Progress(download, path, len(self._ranges(download)))
        expected, actual = download.entry.size, download.remote.size
        if actual not in (-1, expected):
            raise mismatch(self._model, progress.where, f"{expected} bytes", f"{actual} bytes")
        return progress

    def _ranges(self, download: Download) -> list[tuple[int, int]]:
        """Start and stop of each range; at least one, so that empty files are made too."""
        size, step = download.entry.size, self._settings.range_bytes
        return [(start, min(start + step, size)) for start in range(0, max(size, 1), step)]

    def _range(self, progress: _Progress, start: int, stop: int) -> ModelCorrupt | None:
        """Fetch a range; after a file's last one, return what is wrong with the file."""
        try:
            if self._failed.is_set():
                return None
            progress.open()
            self._transfer(progress, start, stop)
            if self._failed.is_set():
                return None
            progress.advance(start, stop)
            # Now, beside the other threads' transfers, rather than all at the end.
            os.fdatasync(progress.descriptor)
            return self._finish(progress) if progress.finish_range() else None
        except BaseException:
            self._failed.set()  # the others end soon, and the first error is reported
            raise

    def _transfer(self, progress: _Progress, start: int, stop: int) -> None:
        position = before = start

        def write(data: bytes) -> None:
            nonlocal position
            data = data[: stop - position]
            self._throttle.take(len(data), lambda: self._beat(self._done_bytes))
            while data:  # a disk that is nearly full takes only a part
                written = os.pwrite(progress.descriptor, data, position)
                position += written
                data = data[written:]
                self._count(written)

        def attempt() -> None:
            nonlocal before
            before = position
            if self._failed.is_set() or position == stop:
                return
            progress.download.reader.read(progress.download.remote, position, stop, write)
            if position < stop:
                raise Transient(f"{progress.where} ended early")

        retrying(
            attempt,
            self._settings,
            progressed=lambda: position > before,
            on_retry=lambda: self._listener(Event("retry", self._model)),
        )

    def _finish(self, progress: _Progress) -> ModelCorrupt | None:
        entry, hashes = progress.download.entry, progress.hashes
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
