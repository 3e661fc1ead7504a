"""`imagen run`, `serve run` and `serve build`, as a newcomer types them."""

from __future__ import annotations

import os
import re
import shlex
import sys
from typing import TYPE_CHECKING

import httpx
import pytest
import yaml
from PIL import Image
from ray.serve.schema import ServeDeploySchema

from benchmarks.server import free_port
from deployments.settings import ROOT, KeyLimits
from serve_app.access.editing import create_key
from tests.serve.run.conftest import COLUMNS, Server, serving, wait_until
from tests.serve.test_http import jpeg, post

if TYPE_CHECKING:
    from pathlib import Path

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


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=30).is_success
    except httpx.TransportError:
        return False


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


def test_a_variable_of_a_former_stack_is_not_ignored_in_silence(pair: list[Server]) -> None:
    for server in pair:
        [line] = [line for line in server.log.read_text().splitlines() if "TRITON_URL" in line]
        assert "TRITON_URL is set, and Imagen does not read it." in line


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
    # The Ingress, six models, and for jobs a worker and its Redis.
    assert len(application.deployments) == 9
