"""Locks between processes that share a disk: one process pulls, many read.

They only save work: correctness never depends on them, because some network file systems ignore
them.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from deployments.errors import LockTimeout, StoreUnwritable

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

logger = logging.getLogger("ray.serve.imagen.store")
_POLL_S = 0.1
_BEAT_S = 1.0


class Holder:
    """The holder of a lock; `beat` shows waiting processes that it is alive."""

    def __init__(self, descriptor: int, waited_s: float) -> None:
        self.waited_s = waited_s
        self._descriptor = descriptor
        self._started_s = time.time()
        self._next_s = 0.0
        self.beat(0)

    def beat(self, done_bytes: int) -> None:
        """Record how far the work is, once a second at most; cheap to call often."""
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + _BEAT_S
        body = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": self._started_s,
            "bytes": done_bytes,
            "updated": time.time(),
        }
        # Padded, so that a reader never sees the tail of an older, longer body. Errors are ignored,
        # because garbage collection needs its locks on a full disk too.
        with suppress(OSError):
            os.pwrite(self._descriptor, json.dumps(body).ljust(256).encode(), 0)


@contextmanager
def exclusive(path: Path, what: str, timeout_s: float) -> Generator[Holder]:
    """Hold the lock file at `path`. The file is never deleted: that would split the lock in two.

    Args:
        path: of the lock file.
        what: names what is locked, for errors.
        timeout_s: how long to wait for a holder that shows no progress.

    Raises:
        LockTimeout: the holder showed no progress for `timeout_s`.
        StoreUnwritable: the lock file cannot be made or opened.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StoreUnwritable(
            f"The lock of {what} cannot be opened: {error.strerror}.",
            value=path,
            remedy="Give this user write access to the store, or pull as a user that has it.",
        ) from error
    try:
        start_s = time.monotonic()
        _wait(descriptor, path, what, timeout_s)
        yield Holder(descriptor, time.monotonic() - start_s)
    finally:
        os.close(descriptor)


@contextmanager
def shared(path: Path) -> Generator[None]:
    """Hold a lease. Meanwhile `alone` yields False to other processes.

    A store that this user may only read has had the file since the pull; reading it is enough.
    """
    with ExitStack() as held:
        for mode in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):
            with suppress(OSError):
                descriptor = os.open(path, mode | os.O_CLOEXEC, 0o644)
                held.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                break
        else:
            logger.warning("No lease at %s: another process may remove what is loaded.", path)
        yield


@contextmanager
def alone(path: Path) -> Generator[bool]:
    """Whether no process holds a lease; if so, none gets one until the context ends.

    Raises:
        OSError: the file cannot be made or opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError:
            free = False
        yield free
    finally:
        os.close(descriptor)


def _wait(descriptor: int, path: Path, what: str, timeout_s: float) -> None:
    last_body = b""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            body = os.pread(descriptor, 256, 0)
            if body != last_body:
                last_body, deadline_s = body, time.monotonic() + timeout_s
            if time.monotonic() >= deadline_s:
                break
            time.sleep(_POLL_S)
        else:
            return
    raise LockTimeout(
        f"Another process holds the lock of {what} and made no progress for {timeout_s:g} s:"
        f" {_describe(last_body)}.",
        value=path,
        remedy="If that process hangs, end it; the lock ends with it.",
    )


def _describe(body: bytes) -> str:
    try:
        holder = json.loads(body)
        return f"pid {holder['pid']} on {holder['host']}, {holder['bytes']} bytes done"
    except (ValueError, KeyError, TypeError):
        return "holder unknown"
