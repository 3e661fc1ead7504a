"""`serve deploy` of a changed config while clients keep asking."""

from __future__ import annotations

import time
from copy import deepcopy
from typing import TYPE_CHECKING

from deployments import images
from deployments.tasks import Task
from tests.scale.cluster import wait_until
from tests.scale.load import Load
from tests.scale.service import CLIENT_S, LONG_S, MODELS, TASKS, Service, Stages, by_name

if TYPE_CHECKING:
    from kuberay.render.environment import Values


def test_no_request_fails_while_everything_is_replaced(service: Service, seed: int) -> None:
    service.stay_awake()
    load = Load(service.url, 4, tasks=TASKS, timeout_s=CLIENT_S, seed=seed)
    with Stages(f"Rolling deploy under load, round {seed}") as stages:
        with load:
            before = service.replicas()
            stages.add("user_config: in force", seconds_of_deploy(service, tuned(service.config)))
            assert service.replicas() == before
            written = images.read_metadata(service.ask(Task.COMIC).body)
            assert written["parameters"]["steps"] == 3  # type: ignore[index]
            stages.add(
                "all replicas: deployed", seconds_of_deploy(service, renewed(service.config))
            )
            wait_until(lambda: are_new(service.replicas(), before), LONG_S, "all are replaced")
            seen_s = time.monotonic()
            wait_until(lambda: load.served_since(seen_s) == set(TASKS), LONG_S, "pictures of all")
        stages.say(load.summary())
    assert all(answer.is_picture for answer in load.answers), load.summary()


def seconds_of_deploy(service: Service, config: Values) -> float:
    start_s = time.monotonic()
    service.deploy(config)
    return time.monotonic() - start_s


def tuned(config: Values) -> Values:
    """With another user_config, which replicas take over as they run."""
    changed = deepcopy(config)
    tuning = {"batch_window_s": 0.01, "max_batch_size": 2, "defaults": {"steps": 3}}
    by_name(changed)["Comic"]["user_config"] = tuning
    by_name(changed)["Ingress"]["user_config"]["retry_after_s"] += 1
    return changed


def renewed(config: Values) -> Values:
    """With other args and other actors: every replica is of a new version, Ingress and models."""
    changed = deepcopy(config)
    changed["applications"][0]["args"]["pixel_threads"] += 1
    for deployment in by_name(changed).values():
        deployment["ray_actor_options"]["num_cpus"] *= 0.5
    return changed


def are_new(found: dict[str, set[str]], before: dict[str, set[str]]) -> bool:
    return all(found[name] and not found[name] & before[name] for name in ("Ingress", *MODELS))
