"""What clients may do changes under traffic, and no replica is replaced."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from ray import serve

from tests.serve.conftest import clients_of, deploy
from tests.serve.test_http import jpeg, post

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = "https://app.example.com"
LARGE = jpeg(400, 300)


def processes() -> dict[str, set[int]]:
    """The process of each replica, by deployment."""
    client: Any = serve.context._get_global_client()
    found = client.get_serve_details()["applications"]["imagen"]["deployments"]
    return {name: {one["pid"] for one in found[name]["replicas"]} for name in found}


@pytest.fixture
def change(address: str, local_config: dict[str, Any]) -> Iterator[Callable[..., None]]:
    """Deploys the application with other settings of clients; at the end with its own again."""
    application = local_config["applications"][0]

    def change_to(**settings: Any) -> None:
        changed = deepcopy(application)
        clients_of(changed).update(settings)
        deploy(changed)

    yield change_to
    deploy(application)


def test_a_change_of_what_clients_may_do_replaces_no_replica(
    address: str, change: Callable[..., None]
) -> None:
    before = processes()
    assert {"Ingress", "Comic", "Upscale", "JobWorker"} <= before.keys()
    access = {"auth": "off", "cors_origins": [PAGE]}
    change(request_timeout_s=1, limits={"max_input_px": 100_000}, access=access)
    # The Ingress, a model, and a middleware have the new settings.
    assert post(address, "comic", LARGE).status_code == 413
    long = post(address, "comic", jpeg(), steps="150", strength="1")
    assert long.status_code == 422
    assert "a request may take 1 s" in long.json()["value"]
    health = httpx.get(f"{address}/healthz", headers={"Origin": PAGE}, timeout=30)
    assert health.headers["access-control-allow-origin"] == PAGE
    # A mistake is logged, and what is in force stays.
    change(limits={"max_input_px": 0})
    assert post(address, "comic", LARGE).status_code == 413
    change()
    assert post(address, "comic", LARGE).status_code == 200
    assert processes() == before
