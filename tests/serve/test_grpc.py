"""KServe V2 over Serve's own gRPC proxy, by Triton's client."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from deployments.settings import ROOT, KeyLimits
from deployments.tasks import Task
from serve_app.access.editing import create_key
from tests.serve.conftest import run_models
from tests.serve.scripted import ScriptedModel
from tests.serve.test_http import jpeg

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def seen(scripted: str, grpc_port: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the client saw of an application that asks for keys, and of one without gRPC."""
    folder: Path = tmp_path_factory.mktemp("grpc")
    _, token = create_key(folder / "keys.yaml", "triton", KeyLimits())
    _, once = create_key(folder / "keys.yaml", "rare", KeyLimits(requests_per_s=0.001))
    models = dict.fromkeys(Task, ScriptedModel)
    run_models("grpc", models, replicas=1, wait=True, keys=folder / "keys.yaml")
    picture = folder / "photo.jpg"
    picture.write_bytes(jpeg())
    arguments = [f"127.0.0.1:{grpc_port}", token, once, str(picture)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.serve.triton_grpc", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_clients_find_the_service_and_its_models(seen: dict[str, Any]) -> None:
    assert (seen["live"], seen["ready"], seen["model_ready"]) == (True, True, True)
    assert not seen["nobody_ready"]
    assert (seen["server"], seen["platform"]) == ("imagen", "imagen")


def test_a_picture_comes_back_with_what_the_model_did(seen: dict[str, Any]) -> None:
    assert bytes.fromhex(seen["picture"]) == jpeg(), "which this model gives back"
    assert seen["id"] == "mine"


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        ("without_key", "UNAUTHENTICATED", "API key"),
        ("nobody", "NOT_FOUND", "no such model"),
        ("wrong", "INVALID_ARGUMENT", "steps"),
        ("too_large", "RESOURCE_EXHAUSTED", "larger than max"),
        ("off", "UNIMPLEMENTED", "off"),
        ("busy", "RESOURCE_EXHAUSTED", "Retry-After: "),
    ],
)
def test_a_refusal_has_a_status_and_says_why(
    call: str, code: str, words: str, seen: dict[str, Any]
) -> None:
    status, message = seen[call]
    assert status == f"StatusCode.{code}", message
    assert words in message


def test_a_client_that_must_wait_is_told_how_long(seen: dict[str, Any]) -> None:
    assert 0 < int(seen["trailing"]["retry-after"]) <= 1000


def test_nobody_is_told_of_the_calls_that_there_are(seen: dict[str, Any]) -> None:
    assert seen["reflection"] == "StatusCode.UNIMPLEMENTED"
