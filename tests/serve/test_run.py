"""`imagen run`, `serve run` and `serve build`, as a newcomer types them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from PIL import Image
from ray.serve.schema import ServeDeploySchema

from deployments.settings import ROOT, KeyLimits
from serve_app.access.editing import create_key
from tests.serve.conftest import free_port
from tests.serve.test_http import jpeg, post

if TYPE_CHECKING:
    from collections.abc import Iterator

BIN = Path(sys.executable).parent
COLUMNS = 80
CORES = 2
# As `serve run`, but for the port, which it takes from a config file only, and the cores.
SERVE_RUN = f"""
import signal, sys, ray
from ray import serve
from ray.serve.scripts import cli
# A shell's background jobs ignore Ctrl-C, and so does whatever they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
ray.init(namespace="serve", num_cpus={CORES}, include_dashboard=False)
serve.start(http_options={{"port": int(sys.argv[1])}})
cli(["run", sys.argv[2]])
"""


pytestmark = pytest.mark.slow
LONG_VERSION = pytest.mark.skipif(
    "IMAGEN_SOAK_ROUNDS" not in os.environ, reason="the long version: make soak-scale"
)


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


@pytest.fixture(scope="module")
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
        }


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


def wait_until(ready: Any, server: Server) -> None:
    deadline_s = time.monotonic() + 300
    while not ready():
        assert time.monotonic() < deadline_s, server.log.read_text()
        time.sleep(0.5)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=30).is_success
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def pair(environment: dict[str, str], tmp_path_factory: Any) -> Iterator[list[Server]]:
    """Two `imagen run` beside each other; the second one's application has a prefix."""
    folder = tmp_path_factory.mktemp("pair")
    local_config: dict[str, Any] = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
    servers: list[Server] = []
    with ExitStack() as stack:
        for name, prefix in (("first", "/"), ("second", "/second")):
            port, config = free_port(), folder / f"{name}.yaml"
            application = local_config["applications"][0] | {"route_prefix": prefix}
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


def test_each_serves_its_own_models(pair: list[Server]) -> None:
    for server in pair:
        response = post(server.address, "background", jpeg())
        assert response.status_code == 200, response.text


def test_each_announces_its_own_dashboard_and_how_to_get_in(pair: list[Server]) -> None:
    for server in pair:
        url = f"{server.dashboard}/api/serve/applications/"
        assert httpx.get(url, timeout=30).status_code == 401
        [command] = re.findall(r"token: (.+)", server.log.read_text())
        headers = {"Authorization": f"Bearer {server.shell(command)}"}
        listening = httpx.get(url, headers=headers, timeout=30).json()["http_options"]["port"]
        assert f":{listening}" in server.address


def test_serve_status_works_as_the_readme_has_it(pair: list[Server]) -> None:
    for server in pair:
        place = f"RAY_AUTH_MODE=token RAY_DASHBOARD_ADDRESS={server.dashboard}"
        status = yaml.safe_load(server.shell(f"{place} serve status"))
        assert status["applications"]["imagen"]["status"] == "RUNNING"


def test_the_command_to_try_is_copied_whole(pair: list[Server], tmp_path: Path) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    for server in pair:
        announced = server.log.read_text().partition("Imagen is ready")[2].partition("Stop with")[0]
        # Ray prints the logs of replicas between ours.
        ours = [line for line in announced.splitlines() if "pid=" not in line]
        assert max(map(len, ours)) <= COLUMNS
        command = "\n".join(ours).partition("Try:\n")[2]
        server.shell(command, tmp_path)
        [name] = re.findall(r"-o (\S+)", command)
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (451, 300)


def test_what_is_announced_is_there(pair: list[Server]) -> None:
    for server in pair:
        text = server.log.read_text()
        assert re.findall(r"^API +(\S+)", text, re.MULTILINE) == [server.address]
        [reference] = re.findall(r"^Reference +(\S+)", text, re.MULTILINE)
        assert httpx.get(reference, timeout=30).is_success


@pytest.mark.parametrize(
    "target",
    [
        "serve_app.app:app",
        # Half a minute for what the configs of other tests show too.
        pytest.param("serve_app.app:build", marks=LONG_VERSION),
    ],
)
def test_without_a_config_it_fits_two_cores(
    environment: dict[str, str], target: str, tmp_path: Path
) -> None:
    port = free_port()
    command = [sys.executable, "-c", SERVE_RUN, str(port), target]
    _, token = create_key(tmp_path / "keys.yaml", "test", KeyLimits())
    own = environment | {"IMAGEN_KEYS": str(tmp_path / "keys.yaml")}
    with serving(command, port, tmp_path / "log", own) as server:
        wait_until(lambda: answers(f"{server.address}/readyz"), server)
        assert post(server.address, "background", jpeg()).status_code == 401
        headers = {"Authorization": f"Bearer {token}"}
        url = f"{server.address}/api/v1/images/background/remove"
        done = httpx.post(url, files={"image": jpeg()}, headers=headers, timeout=120)
        assert done.status_code == 200


def test_serve_build_writes_a_config(environment: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "built.yaml"
    server = Server("", tmp_path, environment)
    server.shell(f"serve build serve_app.app:app -o {shlex.quote(str(config))}")
    [application] = ServeDeploySchema.model_validate(
        yaml.safe_load(config.read_text())
    ).applications
    assert application.import_path == "serve_app.app:app"
    # The Ingress, five models, and for jobs a worker and its Redis.
    assert len(application.deployments) == 8
