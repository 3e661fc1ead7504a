"""The head dies while clients keep asking: replicas outlive it, and the next head keeps them."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import pytest

from deployments.tasks import Task
from tests.scale.cluster import wait_until
from tests.scale.conftest import ROUNDS
from tests.scale.load import Load
from tests.scale.pods import Pods
from tests.scale.service import CLIENT_S, LONG_S, TASKS, Service, Stages

if TYPE_CHECKING:
    from collections.abc import Iterator

LATE_S = 35
"""Longer than the 30 s after which Serve by default ends replicas that it does not hear of."""
DEPLOYMENTS = {"Ingress", *(task.deployment for task in Task if task.needs_picture)}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    if sys.platform != "linux":
        pytest.skip("processes are found by /proc")
    with Service(Pods) as service:
        for _ in range(2):
            pods(service).start_node("models")
        yield service


LONG_VERSION = pytest.mark.skipif(ROUNDS == 1, reason="the long version: make soak-scale")


@pytest.mark.parametrize(
    "late_s",
    [
        pytest.param(0, marks=LONG_VERSION),
        5,
        pytest.param(LATE_S, marks=LONG_VERSION),
    ],
)
def test_a_lost_head_costs_no_replica_and_no_request(
    service: Service, seed: int, late_s: float
) -> None:
    service.stay_awake()
    before = service.processes()
    load = Load(service.url, 2, tasks=TASKS, timeout_s=CLIENT_S, seed=seed)
    with Stages(f"The head lost under load, round {seed}") as stages:
        with load:
            wait_until(lambda: load.served_since(0) == set(TASKS), LONG_S, "pictures of all")
            killed_s = time.monotonic()
            pods(service).kill_head()
            pods(service).gate.is_open = not late_s
            pods(service).start_head()
            wait_until(service.processes, LONG_S, "Serve's controller is back")
            back_s = time.monotonic()
            stages.add("the controller is back", back_s - killed_s)
            time.sleep(late_s)
            pods(service).gate.is_open = True
            wait_until(lambda: is_settled(service), LONG_S, "it knows its replicas")
            stages.add("it knows its replicas", time.monotonic() - back_s)
            seen_s = time.monotonic()
            wait_until(lambda: load.served_since(seen_s) == set(TASKS), LONG_S, "pictures of all")
        stages.say(load.summary())
    assert service.processes() == before
    assert all(answer.is_picture for answer in load.answers), load.summary()


def test_a_node_that_is_lost_with_the_head_is_replaced(service: Service, seed: int) -> None:
    service.stay_awake()
    before, shares = service.processes(), service.shares()
    lost = max(shares, key=lambda node: len(shares[node]))
    kept = {one for one in before if one.deployment not in dict(shares[lost])}
    load = Load(service.url, 2, tasks=TASKS, timeout_s=CLIENT_S, seed=seed)
    with Stages(f"The head and a node lost under load, round {seed}") as stages:
        with load:
            wait_until(lambda: load.served_since(0) == set(TASKS), LONG_S, "pictures of all")
            pods(service).kill_head()
            service.cluster.kill(lost)
            pods(service).start_head()
            pods(service).start_node("models")
            wait_until(service.processes, LONG_S, "Serve's controller is back")
            back_s = time.monotonic()
            wait_until(lambda: load.served_since(back_s) == set(TASKS), LONG_S, "pictures of all")
            names = ", ".join(name for name, _ in shares[lost])
            stages.add(f"lost {names}: all back", time.monotonic() - back_s)
        stages.say(load.summary())
    assert kept < service.processes()
    assert all(a.is_picture or a.is_come_back_later for a in load.answers), load.summary()


def pods(service: Service) -> Pods:
    assert isinstance(service.cluster, Pods)
    return service.cluster


def is_settled(service: Service) -> bool:
    found = service.processes()
    running = {one.deployment for one in found if one.state == "RUNNING"}
    return running == DEPLOYMENTS and {one.state for one in found} == {"RUNNING"}
