"""Workers that follow the queue; writes what was seen to found.json.

Run by test_scaling.py in a process of its own, because Serve's controller must know a REDIS_URL.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from deployments.catalogue import Registry, load_registry
from deployments.contract import ImageResult
from deployments.settings import JOBS_VARIABLE, ROOT, JobSettings, Settings
from deployments.tasks import Task
from serve_app.app import job_worker
from serve_app.jobs.connection import URL_VARIABLE, connect
from serve_app.jobs.queue import JobQueue
from tests.jobs.redis_server import RedisServer
from tests.jobs.test_queue import spec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from ray.serve import Application

    from deployments.contract import ImageJob
    from serve_app.jobs.record import Job

SETTINGS = Settings(jobs=JobSettings(lease_s=30))
LONG_S = 120
DELAY_S = 1
"""After which Serve lets a worker go for which there is no work."""
RUNS_S = 20 * DELAY_S


class Slow:
    """A model that takes its time."""

    async def stream(self, job: ImageJob) -> AsyncIterator[tuple[ImageResult, ...]]:
        await asyncio.sleep(RUNS_S)
        yield (ImageResult(b"picture", "image/png", 1, 1, "slow@0", 0, 1, 0.0),)


def build(_: dict[str, Any]) -> Application:
    model: Any = serve.deployment(Slow)
    comic = model.options(name="Comic", ray_actor_options={"num_cpus": 0}).bind()
    registry = Registry([load_registry(*SETTINGS.models)[Task.COMIC]], {})
    return job_worker({registry[Task.COMIC].name: comic}, registry, SETTINGS, None)


CONFIG: dict[str, Any] = {
    "http_options": {"host": "127.0.0.1", "port": 0},
    "applications": [
        {
            "name": "imagen",
            "import_path": "tests.chaos.workers_from_zero:build",
            "deployments": [
                {
                    # As configs/gke.yaml has it: what a config file says of scaling replaces
                    # what the code says as a whole.
                    "name": "JobWorker",
                    "autoscaling_config": {
                        "min_replicas": 0,
                        "max_replicas": 2,
                        "target_ongoing_requests": 8,
                        "downscale_delay_s": DELAY_S,
                        "policy": {
                            "policy_function": "serve_app.jobs.autoscaling.JobWorkerPolicy",
                            "policy_kwargs": {"namespace": "imagen", "poll_s": 0.5},
                        },
                    },
                }
            ],
        }
    ],
}


def workers(state: str = "RUNNING") -> int:
    """Replicas of JobWorker, as Serve's controller says."""
    deployment = serve.status().applications["imagen"].deployments.get("JobWorker")
    return deployment.replica_states.get(state, 0) if deployment else 0


def is_running() -> bool:
    return serve.status().applications["imagen"].status == "RUNNING"


async def until(reached: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + LONG_S
    while not reached():
        assert time.monotonic() < deadline_s, what
        await asyncio.sleep(0.1)


async def run_one(queue: JobQueue, seen: list[int]) -> Job:
    """A job at its end; `seen` gets the running workers while it runs."""
    job = spec(has_image=False)
    await queue.submit(job, max_queued=9, max_of_owner=9)
    while not (now := await queue.get(job.job_id)).has_ended:
        if now.status == "processing":
            seen.append(workers())
        await asyncio.sleep(0.2)
    return now


async def frozen(server: RedisServer) -> tuple[int, float]:
    """Running workers while Redis hangs, and how long the controller took to say so at most."""
    server.freeze()
    longest_s = 0.0
    until_s = time.monotonic() + 6 * DELAY_S
    while time.monotonic() < until_s:
        before_s = time.monotonic()
        running = workers()
        longest_s = max(longest_s, time.monotonic() - before_s)
        await asyncio.sleep(0.1)
    server.thaw()
    return running, longest_s


async def scaled_down(queue: JobQueue) -> tuple[Job, list[int]]:
    """A job whose worker Serve scales down while it runs, because the policy looks elsewhere."""
    seen: list[int] = []
    work = asyncio.create_task(run_one(queue, seen))
    await until(lambda: bool(seen), "a worker has it")
    elsewhere = deepcopy(CONFIG)
    [application] = elsewhere["applications"]
    [worker] = application["deployments"]
    worker["autoscaling_config"]["policy"]["policy_kwargs"]["namespace"] = "elsewhere"
    deploy(elsewhere)
    return await work, seen


async def watch(queue: JobQueue, server: RedisServer) -> dict[str, Any]:
    found: dict[str, Any] = {"at_first": workers()}
    seen: list[int] = []
    work = asyncio.create_task(run_one(queue, seen))
    await until(lambda: bool(seen), "a worker has it")
    found["while_frozen"], found["controller_answered_within_s"] = await frozen(server)
    job = await work
    found |= {"ended": [job.status, job.attempts, job.error], "while_it_ran": sorted(set(seen))}
    await until(lambda: workers() == 0, "no worker is left")
    job, seen = await scaled_down(queue)
    found |= {"scaled_down": [job.status, job.attempts, job.error], "then": seen[-1]}
    await until(lambda: workers("STOPPING") == 0, "no worker is left")
    return found


def deploy(config: dict[str, Any]) -> None:
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))


async def main(server: RedisServer) -> dict[str, Any]:
    deploy(CONFIG)
    await until(is_running, "the application runs")
    redis = connect(server.url, timeout_s=30)  # longer than it hangs
    try:
        return await watch(JobQueue(lambda: redis, "imagen", keep_s=60, lease_s=8), server)
    finally:
        await redis.aclose()


if __name__ == "__main__":
    home = Path(sys.argv[1])
    with (
        RedisServer(home / "redis") as redis_server,
        # Short, because Ray keeps sockets there.
        tempfile.TemporaryDirectory(prefix="workers") as ray_folder,
    ):
        os.environ |= {URL_VARIABLE: redis_server.url, JOBS_VARIABLE: str(home / "jobs")}
        os.environ |= {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=ray_folder)
        try:
            serve.start(http_options={"location": "NoServer"})
            found_there = asyncio.run(main(redis_server))
            (home / "found.json").write_text(json.dumps(found_there))
        finally:
            serve.shutdown()
            ray.shutdown()
