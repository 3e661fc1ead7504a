"""A server as a process that is started, waited for, and stopped with everything it started."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil

from benchmarks.peers.systems import CALM, PEERS_BIN
from deployments.settings import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.peers.systems import System

_START_S = 300
_STOP_S = 30


class NotStarted(Exception):
    """A server ended, or did not become ready in time."""


@contextmanager
def running(system: System) -> Iterator[str]:
    """The URL of a system, ready; afterwards nothing of it is left.

    Raises:
        NotStarted: with the end of its log.
    """
    folder = Path(tempfile.mkdtemp(prefix="peers-"))  # short: Ray puts sockets below it
    port = free_port()
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            system.command(port, folder),
            cwd=ROOT,
            env=_environment(system, folder),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_ready(process, url + system.ready, log)
        yield url
    finally:
        _stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _environment(system: System, folder: Path) -> dict[str, str]:
    # Its own commands first: BentoML and Ray start others by name.
    own = {"PYTHONPATH": str(ROOT), "PATH": f"{PEERS_BIN}:{os.environ['PATH']}"}
    return {**os.environ, **CALM, **own, **system.environment(folder)}


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            if httpx.get(url, timeout=5, trust_env=False).is_success:
                return
        except httpx.HTTPError:
            pass  # not listening yet
        time.sleep(0.5)
    raise NotStarted(log.read_text(errors="replace")[-3000:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, then end whatever is left of it, by process."""
    family = _family(process.pid)
    # As Ctrl-C does: `serve run` shuts Serve and its Ray down at this signal only.
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(family, timeout=5)
    for member in left:
        member.kill()  # psutil checks that the id still is this process
    psutil.wait_procs(left, timeout=5)


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
