"""What a platform engineer relies on: shares of a GPU, changes without a restart, offline."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import ray
from ray import serve

from deployments import images
from tests.serve.conftest import deploy
from tests.serve.test_http import jpeg, post


def replicas(name: str) -> list[str]:
    details: Any = serve.status().applications["imagen"].deployments[name]
    assert details.replica_states == {"RUNNING": 1}
    controller: Any = serve.context._get_global_client()._controller
    found = ray.get(controller._dump_replica_states_for_testing.remote(_id(name)))
    return [str(r.replica_id) for r in found.get()]


def _id(name: str) -> Any:
    from ray.serve._private.common import DeploymentID

    return DeploymentID(name=name, app_name="imagen")


def test_six_models_share_one_gpu(address: str) -> None:
    assert ray.available_resources().get("GPU", 0.0) == pytest.approx(0.0, abs=0.001)


def test_tuning_changes_without_a_restart(address: str, local_config: dict[str, Any]) -> None:
    before = replicas("Comic")
    changed = copy.deepcopy(local_config["applications"][0])
    comic = next(d for d in changed["deployments"] if d["name"] == "Comic")
    comic["user_config"] = {"batch_window_s": 0.05, "max_batch_size": 2, "defaults": {"steps": 6}}
    deploy(changed)
    written = images.read_metadata(post(address, "comic", jpeg()).content)
    assert written["parameters"]["steps"] == 6  # type: ignore[index]
    assert replicas("Comic") == before
    deploy(local_config["applications"][0])


def test_a_wrong_tuning_is_refused_and_the_model_goes_on(
    address: str, local_config: dict[str, Any]
) -> None:
    before = replicas("Comic")
    changed = copy.deepcopy(local_config["applications"][0])
    comic = next(d for d in changed["deployments"] if d["name"] == "Comic")
    comic["user_config"] = {"defaults": {"steps": 100_000}}
    deploy(changed)
    assert post(address, "comic", jpeg()).status_code == 200
    assert replicas("Comic") == before
    deploy(local_config["applications"][0])
