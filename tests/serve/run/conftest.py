"""Two `imagen run` beside each other, shared by every test of this folder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from benchmarks.server import free_port
from deployments.settings import ROOT
from deployments.tasks import Task
from tests.chaos.application import with_models
from tests.serve.conftest import clients_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BIN = Path(sys.executable).parent
COLUMNS = 80
DEADLINE_S = 20
"""Of a request to the first of the two."""


class Server:
    """A command that serves until it is interrupted."""

    def __init__(self, address: str, log: Path, environment: dict[str, str]) -> None:
        self.address = address
        self.log = log
        self.environment = environment

    @property
    def dashboard(self) -> str:
        [found] = re.findall(r"^Dashboard +(\S+)", self.log.read_text(), re.MULTILINE)
        return found

    def shell(self, command: str, folder: Path = ROOT) -> str:
        """What a command prints, in the environment that the server was started in."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            env=self.environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="package")
def environment(models_root: Path) -> Iterator[dict[str, str]]:
    """A user's whose home is empty; sockets of Ray want short paths."""
    with tempfile.TemporaryDirectory(prefix="run-") as home:
        ours = ("RAY_ADDRESS", "RAY_AUTH", "RAY_DASHBOARD")
        yield {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {
            "HOME": home,
            "RAY_TMPDIR": home,
            "IMAGEN_MODELS": str(models_root),
            "PYTHONPATH": str(ROOT),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "COLUMNS": str(COLUMNS),
            "TRITON_URL": "triton:8001",
        }


def hurried(application: dict[str, Any]) -> dict[str, Any]:
    """The same application with a short deadline."""
    changed = deepcopy(application)
    clients_of(changed)["request_timeout_s"] = DEADLINE_S
    return changed


@contextmanager
def serving(
    command: list[str], port: int, log: Path, environment: dict[str, str]
) -> Iterator[Server]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    try:
        yield Server(f"http://127.0.0.1:{port}", log, environment)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def wait_until(ready: Callable[[], bool], server: Server) -> None:
    deadline_s = time.monotonic() + 300
    while not ready():
        assert time.monotonic() < deadline_s, server.log.read_text()
        time.sleep(0.5)


@pytest.fixture(scope="package")
def pair(environment: dict[str, str], tmp_path_factory: Any) -> Iterator[list[Server]]:
    """The first has a short deadline; the second has a prefix, and two models to start sooner."""
    folder = tmp_path_factory.mktemp("pair")
    local_config: dict[str, Any] = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
    usual = local_config["applications"][0]
    applications = {
        "first": hurried(usual),
        "second": with_models(usual, (Task.COMIC, Task.BACKGROUND), folder)
        | {"route_prefix": "/second"},
    }
    servers: list[Server] = []
    with ExitStack() as stack:
        for name, application in applications.items():
            port, config = free_port(), folder / f"{name}.yaml"
            options = local_config["http_options"] | {"port": port}
            values = {"http_options": options, "applications": [application]}
            config.write_text(yaml.safe_dump(local_config | values))
            command = [str(BIN / "imagen"), "run", str(config)]
            log = folder / f"{name}.log"
            servers.append(stack.enter_context(serving(command, port, log, environment)))
        for server in servers:
            wait_until(lambda log=server.log: "Stop with Ctrl-C" in log.read_text(), server)
        servers[1].address += "/second"
        yield servers
