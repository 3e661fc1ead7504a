"""Holds a detached actor without a CPU on a node until stdin ends: `lingering ADDRESS NODE`."""

from __future__ import annotations

import sys
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(num_cpus=0)
class Lingering:
    def ready(self) -> bool:
        return True


def main(address: str, node: str) -> None:
    ray.init(address, namespace="scale", log_to_driver=False)
    actor: Any = Lingering.options(
        name="lingering",
        lifetime="detached",
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    ).remote()
    ray.get(actor.ready.remote())
    print("lingering", flush=True)
    sys.stdin.read()
    ray.kill(actor)


if __name__ == "__main__":
    main(*sys.argv[1:])
