"""A head and one other node; prints whether the other counts as idle, in three situations.

Run by test_idle.py in a process of its own, because it needs a Ray of its own.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.cluster_utils import Cluster

from deployments.catalogue import load_registry
from deployments.settings import Settings, StoreSettings
from deployments.store.lockfile import load_lock
from deployments.store.node_init import ensure_on_node
from deployments.store.provider import Provider

MODELS = Path("configs/models/starter.yaml")


@ray.remote(num_cpus=0.1, resources={"worker": 0.1})
def pull(settings: Settings) -> int:
    """A replica's start and end."""
    totals: list[Any] = []
    spec = next(iter(load_registry(*settings.models).values()))
    digest = Provider(load_lock(*settings.models), settings.store).digest(spec)
    ensure_on_node(spec.name, digest, settings, totals.extend)
    while not totals:
        time.sleep(0.1)
    return sum(count for kind, _, _, count, _ in totals if kind == "done")


@ray.remote(num_cpus=0, resources={"worker": 0.001})
class Lingering:
    """What the init actor must not be."""

    def ready(self) -> bool:
        return True


def idle_s(address: str) -> float:
    """For how long the other node has been idle; 0 if it is busy."""
    nodes = [n for n in get_cluster_status(address).idle_nodes if "worker" in n.total_resources()]
    return nodes[0].resource_usage.idle_time_ms / 1000 if nodes else 0


def wait(address: str, *, idle: bool) -> float:
    deadline_s = time.monotonic() + 40
    while time.monotonic() < deadline_s:
        seconds = idle_s(address)
        if (seconds > 3) == idle:
            return seconds
        time.sleep(0.5)
    return idle_s(address)


def main(root: str) -> None:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False},
    )
    try:
        cluster.add_node(num_cpus=1, resources={"worker": 1})
        ray.init(cluster.address, log_to_driver=False)
        found: dict[str, Any] = {"before_s": wait(cluster.address, idle=True)}
        settings = Settings(models=(MODELS,), store=StoreSettings(root=Path(root)))
        found["pulled"] = ray.get(pull.remote(settings))
        found["after_pull_s"] = wait(cluster.address, idle=True)
        actor: Any = Lingering.remote()
        ray.get(actor.ready.remote())
        time.sleep(5)
        found["with_a_living_actor_s"] = idle_s(cluster.address)
        print(json.dumps(found))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
