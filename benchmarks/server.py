"""A server as a child process: started, waited for, and stopped with everything it started."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import httpx
import psutil
import yaml

from deployments.settings import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Mapping

OUR_BIN: Final = ROOT / ".venv/bin"
PEERS_BIN: Final = ROOT / ".venv-peers/bin"
# OpenMP's threads spin while they wait for each other. Several models on a few cores then take ten
# times as long, in every server alike.
PASSIVE_OPENMP: Final = {"OMP_WAIT_POLICY": "PASSIVE"}
LOCAL_CONFIG: Final = ROOT / "configs/local.yaml"
_START_S: Final = 300
_STOP_S: Final = 30
_POLL_S: Final = 0.5
_PORTS: Final = range(20_000, 32_000)
_draws: Final = count(random.randrange(len(_PORTS)))
"""One after the other, from a start by chance: of two processes hardly ever the same."""


class NotStarted(Exception):
    """A server ended, or did not become ready in time."""


@dataclass(frozen=True)
class System:
    """A server to measure.

    Attributes:
        title: its name in tables.
        command: makes its command line from a port and an empty folder of its own.
        ready: the path that answers 200 once every model is loaded.
        target: keys of a load plan's `target`, beside the URL.
        warm_up_rounds: requests of each model before anything is measured.
        environment: makes additional environment variables from its folder.
    """

    title: str
    command: Callable[[int, Path], list[str]]
    ready: str = "/readyz"
    target: dict[str, Any] = field(default_factory=dict[str, Any])
    warm_up_rounds: int = 3
    environment: Callable[[Path], dict[str, str]] = lambda _: {}


class Server(NamedTuple):
    """A server that runs, and the process that was started for it."""

    url: str
    process: psutil.Process


def imagen(
    title: str = "Imagen",
    *,
    args: Mapping[str, Any] | None = None,
    user_config: Mapping[str, Any] | None = None,
    asleep: Collection[str] = (),
    environment: Mapping[str, str] | None = None,
) -> System:
    """Imagen as configs/local.yaml sets it up, with a Ray of its own.

    `imagen run` would join a Ray that already runs on this machine.

    Args:
        title: its name in tables.
        args: overrides of the application's `args`.
        user_config: overrides of every model's `user_config`.
        asleep: deployments that start without a replica.
        environment: additional variables of the server's process.
    """

    def command(port: int, folder: Path) -> list[str]:
        applications = yaml.safe_load(LOCAL_CONFIG.read_text(encoding="utf-8"))["applications"]
        applications[0]["args"] |= args or {}
        for deployment in applications[0]["deployments"]:
            if "user_config" in deployment and deployment["name"] != "Ingress":
                deployment["user_config"] |= user_config or {}
            if deployment["name"] in asleep:
                deployment["autoscaling_config"] = {"min_replicas": 0, "max_replicas": 1}
        return serve_run(OUR_BIN / "serve", applications, port, folder)

    def variables(folder: Path) -> dict[str, str]:
        # As `imagen run` sets it.
        return ray_environment(folder) | {"MALLOC_ARENA_MAX": "1"} | dict(environment or {})

    return System(title, command, environment=variables)


def serve_run(
    serve: Path, applications: list[dict[str, Any]], port: int, folder: Path
) -> list[str]:
    """The command line of `serve run` with these applications; all else as in local.yaml."""
    config = yaml.safe_load(LOCAL_CONFIG.read_text(encoding="utf-8"))
    config["http_options"]["port"] = port
    config["applications"] = applications
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [str(serve), "run", "--address=local", f"--app-dir={ROOT}", str(file)]


def ray_environment(folder: Path) -> dict[str, str]:
    """Variables that give a server a Ray and a model store of its own."""
    return {
        "RAY_TMPDIR": str(folder / "ray"),
        "RAY_ADDRESS": "local",
        "IMAGEN_MODELS": str(folder / "models"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@contextmanager
def running(system: System) -> Generator[Server]:
    """Start a system and yield it once it is ready; stop every process of it at the end.

    Raises:
        NotStarted: with the end of its log.
    """
    # SIGTERM stops the server, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="bench-"))  # a short path: Ray puts sockets below it
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
        yield Server(url, psutil.Process(process.pid))
    finally:
        _stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """A TCP port on which nothing listens at this moment.

    It is none of those that Linux gives to connections and to listeners on port 0, which another
    process could get before a server that takes seconds to start.
    """
    while True:
        port = _PORTS[next(_draws) % len(_PORTS)]
        with suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port


def process_title(process: psutil.Process) -> str:
    """The actor of a Ray worker, such as `ServeReplica:imagen:Ingress`; else the program's name."""
    try:
        title = (process.cmdline() or [""])[0].strip()
        if title.startswith("ray::"):
            # While an actor works, the name of its method follows.
            return title.removeprefix("ray::").partition(".")[0].removesuffix("()")
        return process.name()
    except psutil.Error:
        return "ended"


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds that a process has used; 0 if it has ended."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


def _environment(system: System, folder: Path) -> dict[str, str]:
    # Their own commands come first: BentoML and Ray start others by name.
    own = {"PYTHONPATH": str(ROOT), "PATH": f"{PEERS_BIN}:{os.environ['PATH']}"}
    return {**os.environ, **PASSIVE_OPENMP, **own, **system.environment(folder)}


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            if httpx.get(url, timeout=5, trust_env=False).is_success:
                return
        except httpx.HTTPError:
            pass  # not listening yet
        time.sleep(_POLL_S)
    raise NotStarted(log.read_text(errors="replace")[-3000:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the server, then kill whatever is left of its processes."""
    family = _family(process.pid)
    # `serve run` shuts Serve and its Ray down at SIGINT only.
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(family, timeout=5)
    for member in left:
        member.kill()  # psutil checks that the id still belongs to this process
    psutil.wait_procs(left, timeout=5)


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
