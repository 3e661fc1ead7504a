"""A GPU node that vanishes while clients keep asking."""

from __future__ import annotations

import time

from tests.scale.cluster import wait_until
from tests.scale.load import Load
from tests.scale.service import CLIENT_S, DEADLINE_S, LONG_S, TASKS, Service, Stages

SLACK_S = 15
"""What an answer may take beyond its deadline, of a machine that does everything at once."""


def test_a_lost_node_costs_a_pause_and_clean_refusals(service: Service, seed: int) -> None:
    service.stay_awake()
    load = Load(service.url, 4, tasks=TASKS, timeout_s=CLIENT_S, seed=seed)
    with Stages(f"A node lost under load, round {seed}") as stages:
        with load:
            wait_until(lambda: load.served_since(0) == set(TASKS), LONG_S, "pictures of all")
            shares = service.shares()
            fullest = max(shares, key=lambda node: len(shares[node]))
            killed_s = time.monotonic()
            service.cluster.kill(fullest)
            wait_until(lambda: load.served_since(killed_s) == set(TASKS), LONG_S, "pictures again")
            lost = ", ".join(name for name, _ in shares[fullest])
            stages.add(f"lost {lost}: all back", time.monotonic() - killed_s)
            wait_until(lambda: fullest not in service.gpu_nodes(), 60, "Ray knows")
        stages.say(load.summary())
    assert all(a.is_picture or a.is_come_back_later for a in load.answers), load.summary()
    assert max(answer.seconds for answer in load.answers) < DEADLINE_S + SLACK_S
    assert all(answer.is_picture for answer in service.wake())
