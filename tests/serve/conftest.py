"""One local Ray with the application on it, shared by every test of this folder."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
import ray
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from deployments.settings import ROOT, Settings
from serve_app.app import build

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def local_config() -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(
        yaml.safe_load((ROOT / "configs/local.yaml").read_text())
    )


@pytest.fixture(scope="session")
def address(
    local_config: ServeDeploySchema, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The URL of the running application: configs/local.yaml, on a free port."""
    temp: Path = tmp_path_factory.mktemp("ray")
    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=str(temp), log_to_driver=True)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 90})
    settings = Settings.model_validate(local_config.applications[0].args)
    serve.run(build(settings), name="imagen", route_prefix="/", blocking=False)
    url = f"http://127.0.0.1:{port}"
    yield url
    serve.shutdown()
    ray.shutdown()
