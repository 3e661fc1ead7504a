"""A Redis that hangs, one that the application started itself, and who comes first in the queue."""

from __future__ import annotations

import asyncio
import math
import random
import time
from typing import TYPE_CHECKING

from deployments.settings import JobSettings
from deployments.tasks import Task
from serve_app.jobs.files import open_job_files
from serve_app.jobs.record import JobSpec, new_job_id
from tests.chaos.application import REDIS, WORKER, Application, until
from tests.chaos.clients import Client, Order, assert_right_pictures, mixed
from tests.chaos.ledger import assert_one_end_each
from tests.chaos.test_workers import at_work, long

if TYPE_CHECKING:
    import psutil

    from serve_app.jobs.queue import JobQueue
    from tests.jobs.redis_server import RedisServer

HUNG_S = 15.0
"""Longer than the lease of a claim."""
PROMPT_S = 10.0


async def test_a_hung_redis_stalls_neither_the_controller_nor_sync_requests(
    application: Application, client: Client, redis: RedisServer, queue: JobQueue
) -> None:
    order, quick = long(40_000), Order(Task.BACKGROUND, 40_001)
    job_id = await client.submit(order)
    await at_work(client, job_id, 5)
    took_s: dict[str, list[float]] = {"controller": [], "sync": [], "async": []}

    async def timed(what: str, call: object) -> object:
        began_s = time.monotonic()
        answer = await call  # type: ignore[misc]
        took_s[what].append(time.monotonic() - began_s)
        return answer

    with application.dashboard() as controller:
        redis.freeze()
        try:
            until_s = time.monotonic() + HUNG_S
            while time.monotonic() < until_s:
                status = asyncio.to_thread(application.replicas, controller, "JobWorker")
                assert [one["state"] for one in await timed("controller", status)] == ["RUNNING"]  # type: ignore[union-attr]
                answer = await timed("sync", client.once(quick))
                assert answer.status_code == 200, answer.text  # type: ignore[union-attr]
                answer = await timed("async", client.once(quick, Prefer="respond-async"))
                assert answer.status_code == 503, answer.text  # type: ignore[union-attr]
                assert int(answer.headers["Retry-After"]) > 0  # type: ignore[union-attr]
        finally:
            redis.thaw()
    for what, seconds in took_s.items():
        print(f"while Redis hung, {what} took at most {max(seconds):.1f} s, {len(seconds)} times")
    assert max(max(seconds) for seconds in took_s.values()) < PROMPT_S
    job = await client.ended(job_id)
    # Nobody else could take the job meanwhile, so that its worker keeps it.
    assert (job["status"], job["attempts"]) == ("completed", 1), job
    await assert_one_end_each(queue, [job_id])
    await assert_right_pictures(client, order, job)
    after = await client.ended(await client.submit(quick))
    assert after["status"] == "completed", after


async def test_five_jobs_of_one_owner_finish_among_the_next_ten_beside_500_of_another(
    application: Application, queue: JobQueue
) -> None:
    files = open_job_files(JobSettings(folder=application.folder / "jobs"))

    async def stored(owner: str, seed: int) -> JobSpec:
        made = JobSpec(
            job_id=new_job_id(),
            owner=owner,
            task=Task.BACKGROUND,
            request={},
            output_format="png",
            width_px=64,
            height_px=64,
            has_image=True,
        )
        await files.put_input(made.job_id, Order(made.task, seed).picture)
        return made

    async def submit(specs: list[JobSpec]) -> None:
        for one in specs:
            done = await queue.submit(one, max_queued=1000, max_of_owner=1000)
            assert done.outcome == "queued"

    many = [await stored("a", 50_000 + k) for k in range(500)]
    few = [await stored("b", 60_000 + k) for k in range(5)]
    await submit(many)
    await submit(few)
    ids = [one.job_id for one in (*many, *few)]
    async with asyncio.timeout(180):
        while {job.status for job in await queue.read(ids[-5:])} != {"completed"}:
            await asyncio.sleep(0.05)
    jobs = await queue.read(ids)
    for one in many:
        await queue.finish(one.job_id, "canceled", {}, "{}")
    first_s = min(job.created_s for job in jobs if job.spec.owner == "b")
    later = [job for job in jobs if job.started_s and job.started_s > first_s]
    taken, ended = (
        [k for k, job in enumerate(sorted(later, key=when), 1) if job.spec.owner == "b"]
        for when in (lambda job: job.started_s, lambda job: job.ended_s or math.inf)
    )
    print(f"beside 500 jobs of another owner, 5 were taken at places {taken}, ended at {ended}")
    assert taken[-1] <= 10
    # Jobs that run side by side end in any order.
    assert ended[-1] <= 10 + JobSettings().per_model


def own_redis(application: Application) -> psutil.Process:
    """The server, once there is one."""
    until("Redis runs", lambda: bool(application.processes("redis-server")))
    return application.processes("redis-server")[0]


async def test_with_its_own_redis_it_loses_nothing_either() -> None:
    rng = random.Random(3)
    with Application() as application:
        async with Client(application.url) as client:
            made = {await client.submit(order): order for order in [long(70_000), *mixed(8, rng)]}
            for title in (REDIS, WORKER, REDIS):
                (await asyncio.to_thread(own_redis, application)).kill()
                await asyncio.sleep(rng.uniform(0, 2))
                await asyncio.to_thread(application.kill, title)
                made |= {await client.submit(order): order for order in mixed(4, rng)}
            for job_id, order in made.items():
                job = await client.ended(job_id)
                assert job["status"] == "completed", job
                await assert_right_pictures(client, order, job)
            assert len(made) == 21
