"""GPU nodes come with the first request or job, as many as models and load need, and go when it is
quiet.
"""

from __future__ import annotations

import io
import math
import subprocess
import sys
import time

import pytest
from PIL import Image

from deployments.settings import ROOT
from deployments.store.node_init import PREFIX
from deployments.tasks import Task
from tests.scale.cluster import wait_until
from tests.scale.conftest import ROUNDS
from tests.scale.load import Load, photo
from tests.scale.service import CLIENT_S, LONG_S, MODELS, Service, Stages, Watch, by_name


def test_nodes_come_and_go_with_the_load(service: Service, seed: int) -> None:
    service.go_to_sleep()
    before = {actor["actor_id"] for actor in init_actors(service)}
    held_bytes = service.cluster.plasma_bytes()
    service.be_patient(600)
    with Stages(f"0 -> N -> 0, round {seed}") as stages, Watch(service) as watch:
        wake_from_zero(service, watch, stages)
        assert_packed(service, stages)
        grow(service, watch, stages, seed)
        shrink(service, watch, stages)
    fresh = [actor for actor in init_actors(service) if actor["actor_id"] not in before]
    # A node has one, because its store is its own; a living one would have kept the node. A node
    # that came when the load was over had no replica, and none.
    assert {actor["node_id"] for actor in fresh} <= set(watch.plasma_bytes)
    assert len(fresh) >= 2
    assert {actor["state"] for actor in fresh} == {"DEAD"}
    assert not any(watch.plasma_bytes.values()), watch.plasma_bytes
    assert_no_more_held(service, held_bytes)
    ready = service.client.get("/readyz")
    assert ready.status_code == 200
    assert set(ready.json()["models"].values()) == {"idle"}


def test_a_queued_job_wakes_a_worker_a_model_and_a_node(service: Service, seed: int) -> None:
    """And nothing stays: neither its client nor any process must wait for it."""
    service.go_to_sleep()
    assert (service.gpu_nodes(), service.model_replicas(), service.workers()) == ([], 0, 0)
    with Stages(f"A queued job, round {seed}") as stages, Watch(service) as watch:
        start_s = time.monotonic()
        job = submit(service)
        wait_until(service.workers, LONG_S, "a worker")
        stages.add("job: a worker is up", time.monotonic() - start_s)
        wait_until(lambda: has_ended(service, job), LONG_S, "the job has ended")
        stages.add("job: completed, from zero nodes and workers", time.monotonic() - start_s)
        stages.add("job: a GPU node is there", watch.first(lambda m: m.gpu_nodes > 0) - start_s)
        stages.add("job: its model is up", watch.first(lambda m: m.replicas > 0) - start_s)
        ended_s = time.monotonic()
        picture = service.client.get(f"{job}/result", follow_redirects=True)
        assert Image.open(io.BytesIO(picture.content)).width > 0
        assert service.workers() <= 1
        wait_until(lambda: not service.gpu_nodes(), LONG_S, "no GPU node is left")
        wait_until(lambda: not service.workers(), LONG_S, "no worker is left")
        stages.add("quiet: no GPU node, no worker", time.monotonic() - ended_s)


@pytest.mark.skipif(ROUNDS == 1, reason="the long version: make soak-scale")
def test_an_idle_actor_keeps_its_node(service: Service) -> None:
    """What the init actor must not be, and that this folder could tell."""
    service.go_to_sleep()
    assert service.ask(Task.BACKGROUND).is_picture
    [node] = service.gpu_nodes()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.scale.lingering", service.cluster.address, node],
        cwd=ROOT,
        env=service.cluster.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "lingering\n"
        wait_until(lambda: service.model_replicas() == 0, LONG_S, "no replica is left")
        time.sleep(30)  # many times the idle timeout
        assert service.gpu_nodes() == [node]
        process.stdin.close()
        wait_until(lambda: not service.gpu_nodes(), LONG_S, "the node is gone")


def submit(service: Service) -> str:
    """Where the job is."""
    answer = service.client.post(
        Task.BACKGROUND.route,
        files={"image": ("photo.jpg", photo(seed=1))},
        headers={"Prefer": "respond-async"},
    )
    assert answer.status_code == 202, answer.text
    return answer.headers["location"]


def has_ended(service: Service, job: str) -> bool:
    found = service.client.get(job).json()
    assert found["status"] in ("queued", "processing", "completed"), found
    return found["status"] == "completed"


def assert_no_more_held(service: Service, before_bytes: dict[str, int]) -> None:
    """On the nodes that stay, only Serve's controller keeps something: a megabyte or two."""
    held_bytes = service.cluster.plasma_bytes()
    assert held_bytes.keys() == before_bytes.keys()
    assert all(held <= before_bytes[node] + 2**20 for node, held in held_bytes.items()), held_bytes


def wake_from_zero(service: Service, watch: Watch, stages: Stages) -> None:
    assert service.gpu_nodes() == []
    assert service.model_replicas() == 0
    start_s = time.monotonic()
    first = service.ask(Task.BACKGROUND)
    assert first.is_picture, first
    there_s, up_s = watch.first(lambda m: m.gpu_nodes > 0), watch.first(lambda m: m.replicas > 0)
    stages.add("first request: a GPU node is there", there_s - start_s)
    stages.add("first request: its model is up", up_s - start_s)
    stages.add("first request: picture, from zero nodes", first.seconds)
    slowest = max(service.wake(), key=lambda answer: answer.seconds)
    stages.add(f"one of each at once: last picture ({slowest.task})", slowest.seconds)


def assert_packed(service: Service, stages: Stages) -> None:
    """Ray alone decides which model goes where; the plan's shares must fit the fewest nodes."""
    deployments = by_name(service.config)
    planned = {name: deployments[name]["ray_actor_options"]["num_gpus"] for name in MODELS}
    found = service.shares()
    for node in found.values():
        stages.say("  on one GPU: " + ", ".join(f"{name} {share:g}" for name, share in node))
    assert sorted(one for node in found.values() for one in node) == sorted(planned.items())
    # Whatever the order in which they come: no share is so large that two nodes could have no room.
    assert len(found) == math.ceil(sum(planned.values()))
    assert set(found) == set(service.gpu_nodes())
    assert service.fullest_share() <= 1 + 1e-6


def grow(service: Service, watch: Watch, stages: Stages, seed: int) -> None:
    """More requests at a time than one replica is meant to have: replicas, and a node for them."""
    nodes = len(service.gpu_nodes())
    start_s = time.monotonic()
    # Pictures so large that most of a request's time is the model's: what the proxy and the ingress
    # hold does not count as load of the model.
    load = Load(
        service.url,
        16,
        tasks=[Task.UPSCALE],
        timeout_s=CLIENT_S,
        seed=seed,
        width_px=320,
        pause_s=0,
    )
    with load:
        wait_until(lambda: len(service.gpu_nodes()) > nodes, LONG_S, "a further node")
        wait_until(lambda: len(service.replicas()["Upscale"]) >= 3, LONG_S, "three replicas")
        assert service.fullest_share() <= 1 + 1e-6
    assert all(answer.is_picture for answer in load.answers), load.summary()
    added = watch.first(lambda m: m.gpu_nodes > nodes, start_s) - start_s
    stages.add(f"16 clients: node {nodes + 1} is there", added)
    up = watch.first(lambda m: m.replicas >= len(MODELS) + 2, start_s) - start_s
    stages.add("16 clients: three replicas of the model", up)
    stages.say(load.summary())


def shrink(service: Service, watch: Watch, stages: Stages) -> None:
    service.be_patient(3)
    start_s = time.monotonic()
    wait_until(lambda: not service.gpu_nodes(), LONG_S, "no GPU node is left")
    stages.add("quiet: no replica", watch.first(lambda m: not m.replicas, start_s) - start_s)
    stages.add("quiet: no GPU node", watch.first(lambda m: not m.gpu_nodes, start_s) - start_s)


def init_actors(service: Service) -> list[dict[str, str]]:
    found = service.cluster.actors(class_name="NodeInit")
    assert all(actor["name"].startswith(PREFIX) for actor in found)
    return found
