"""What comes before and after a row's steps, on a thread of its own."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from deployments.engine.row import Row

    Pieces = Generator[None, None, Any]


_NICENESS = 10
"""A tenth of the share of a core that others get who want it at the same time."""


@dataclass(slots=True, eq=False)
class Job:
    """Work on one row, in bounded pieces.

    Attributes:
        make: begins the work; called again to repeat it.
        then: takes what the work returns.
        after: a CUDA event the work must wait for.
    """

    row: Row
    make: Callable[[], Pieces]
    then: Callable[[Any], None]
    after: Any = None
    pieces: Pieces | None = None
    repeated: bool = False


class Staging:
    """Runs jobs piece by piece, in turns, so that a large picture holds up no small one.

    On a GPU it has a stream of its own, so that steps go on beside it.

    Args:
        wanted: whether somebody still waits for a row.
        failed: takes a row and the error that ended its job.
        died: takes an error that no row can be blamed for; the thread ends.
        is_fatal: tells those errors apart.
    """

    def __init__(
        self,
        *,
        wanted: Callable[[Row], bool],
        failed: Callable[[Row, Exception], None],
        died: Callable[[BaseException], None],
        is_fatal: Callable[[BaseException], bool],
    ) -> None:
        self._wanted = wanted
        self._failed = failed
        self._died = died
        self._is_fatal = is_fatal
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: deque[Job] = deque()
        self._closed = False
        self.thread = threading.Thread(target=self._run, name="staging", daemon=True)
        self.thread.start()

    def put(self, job: Job) -> None:
        """Thread-safe; returns at once."""
        self._inbox.put(job)

    def close(self) -> None:
        """End the thread once its jobs are done."""
        self._inbox.put(None)

    def _run(self) -> None:
        try:
            use_own_stream()
            give_way()
            while self._receive():
                self._turn()
        # Whatever ends this thread must end every row's wait too.
        except BaseException as error:
            self._died(error)
        self._jobs.clear()

    def _receive(self) -> bool:
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
        """One piece of the job whose turn it is."""
        if not self._jobs:
            return
        job = self._jobs.popleft()
        if not self._wanted(job.row):
            return
        try:
            done, result = _next_piece(job)
            if done:
                job.then(result)
        except Exception as error:
            if self._is_fatal(error):
                raise
            if job.repeated or not isinstance(error, torch.OutOfMemoryError):
                self._failed(job.row, error)
                return
            done = False
        else:
            if not done:
                self._take_all()  # whoever came meanwhile is next
                self._jobs.append(job)
            return
        # Outside the handler: the error's traceback holds the memory that the second try needs.
        job.pieces, job.repeated = None, True
        free_memory()
        self._jobs.append(job)


def _next_piece(job: Job) -> tuple[bool, Any]:
    if job.pieces is None:
        wait_for(job.after)
        job.pieces = job.make()
    start_s = time.monotonic()
    try:
        next(job.pieces)
    except StopIteration as end:
        # Another stream is to read what this one has written.
        finish_stream()
        return True, end.value
    finally:
        seconds = time.monotonic() - start_s
        job.row.vae_s += seconds
        job.row.compute_s += seconds
    return False, None


def use_own_stream() -> None:
    """Give the calling thread a CUDA stream of its own; nothing without CUDA."""
    if torch.cuda.is_initialized():
        torch.cuda.set_stream(torch.cuda.Stream())


def give_way() -> None:
    """On a CPU, let the threads and processes that carry requests go before the calling thread.

    They need little, and requests are read and refused at once though passes take every core. The
    threads that the caller starts inherit it.
    """
    if not torch.cuda.is_initialized():
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def finish_stream() -> None:
    """Wait until the device has done what this thread asked of it."""
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()


def mark() -> Any:
    """An event at this point of the thread's stream; None without CUDA."""
    if not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event(blocking=True)  # who waits for it leaves the core to others
    event.record()
    return event


def wait_for(event: Any) -> None:
    """Have this thread's stream wait for another's event."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def free_memory() -> None:
    """Give cached blocks back, for a second try after running out of memory."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
