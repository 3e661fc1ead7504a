"""What comes before and after a row's steps, on a thread of its own."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from deployments.engine.device import (
    finish_stream,
    free_cached_memory,
    lower_priority,
    use_own_stream,
    wait_for_event,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from deployments.engine.row import Row

    Pieces = Generator[None, None, Any]


@dataclass(slots=True, eq=False)
class Job:
    """Work on one row, in bounded pieces.

    Attributes:
        row: whose work it is.
        start: makes the pieces; called again to repeat the work.
        on_done: takes what the last piece returned.
        after: a CUDA event that the work must wait for.
        pieces: the work, once it has started.
        repeated: whether this is the second try.
    """

    row: Row
    start: Callable[[], Pieces]
    on_done: Callable[[Any], None]
    after: Any = None
    pieces: Pieces | None = None
    repeated: bool = False


class Staging:
    """Runs jobs piece by piece, in turns, so that a large picture never holds up a small one.

    On a GPU the thread has a stream of its own, so that steps go on beside it.

    Args:
        is_live: whether someone still waits for a row.
        on_failed: takes a row and the error that ended its job.
        on_died: takes an error that is no row's fault; the thread ends.
        is_fatal: tells those errors apart.
    """

    def __init__(
        self,
        *,
        is_live: Callable[[Row], bool],
        on_failed: Callable[[Row, Exception], None],
        on_died: Callable[[BaseException], None],
        is_fatal: Callable[[BaseException], bool],
    ) -> None:
        self._is_live = is_live
        self._on_failed = on_failed
        self._on_died = on_died
        self._is_fatal = is_fatal
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: deque[Job] = deque()
        self._closed = False
        self.thread = threading.Thread(target=self._run, name="staging", daemon=True)
        self.thread.start()

    def put(self, job: Job) -> None:
        """Add a job. Thread-safe; returns at once."""
        self._inbox.put(job)

    def close(self) -> None:
        """End the thread once its jobs are done."""
        self._inbox.put(None)

    def _run(self) -> None:
        try:
            use_own_stream()
            lower_priority()
            while self._receive():
                self._turn()
        # Whatever ends this thread must end every row's wait too.
        except BaseException as error:
            self._on_died(error)
        self._jobs.clear()

    def _receive(self) -> bool:
        """Take in new jobs, and wait only if there is nothing to do; False to end."""
        if not self._jobs and not self._closed:
            self._take(self._inbox.get())
        self._take_all()
        return bool(self._jobs) or not self._closed

    def _take_all(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._take(self._inbox.get_nowait())

    def _take(self, job: Job | None) -> None:
        if job is None:
            self._closed = True
        else:
            self._jobs.append(job)

    def _turn(self) -> None:
        """Do one piece of the next job."""
        if not self._jobs:
            return
        job = self._jobs.popleft()
        if not self._is_live(job.row):
            return
        try:
            done, result = _next_piece(job)
            if done:
                job.on_done(result)
        except Exception as error:
            if self._is_fatal(error):
                raise
            if job.repeated or not isinstance(error, torch.OutOfMemoryError):
                self._on_failed(job.row, error)
                return
            done = False
        else:
            if not done:
                self._take_all()  # jobs that came meanwhile go first
                self._jobs.append(job)
            return
        # Outside the handler: the error's traceback holds the memory that the second try needs.
        job.pieces, job.repeated = None, True
        free_cached_memory()
        self._jobs.append(job)


def _next_piece(job: Job) -> tuple[bool, Any]:
    """Whether the work is done, and its result."""
    if job.pieces is None:
        wait_for_event(job.after)
        job.pieces = job.start()
    start_s = time.monotonic()
    try:
        next(job.pieces)
    except StopIteration as end:
        # Another stream reads what this one has written.
        finish_stream()
        return True, end.value
    finally:
        seconds = time.monotonic() - start_s
        job.row.progress.staging_s += seconds
        job.row.progress.compute_s += seconds
    return False, None
