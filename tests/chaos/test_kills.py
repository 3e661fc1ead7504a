"""kill -9 of every process in random order, under load: nothing that was accepted is lost."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.chaos.application import BACKGROUND, COMIC, CONTROLLER, INGRESS, WORKER
from tests.chaos.clients import Order, assert_right_pictures, mixed
from tests.chaos.ledger import assert_one_end_each, jobs_of

if TYPE_CHECKING:
    from serve_app.jobs.queue import JobQueue
    from tests.chaos.application import Application
    from tests.chaos.clients import Client
    from tests.jobs.redis_server import RedisServer

pytestmark = pytest.mark.slow
FULL = bool(os.environ.get("IMAGEN_CHAOS"))
JOBS, ROUNDS, PAUSE_S = (200, 4, 6.0) if FULL else (40, 1, 3.0)
SEED = int(os.environ.get("IMAGEN_CHAOS_SEED", "14"))
PROCESSES = (WORKER, COMIC, BACKGROUND, INGRESS, CONTROLLER, "redis")


async def kill_all(application: Application, redis: RedisServer, rng: random.Random) -> None:
    for number in range(ROUNDS):
        for title in rng.sample(PROCESSES, len(PROCESSES)):
            await asyncio.sleep(PAUSE_S * rng.uniform(0.5, 1.5))
            print(f"round {number + 1}: kill -9 {title}")
            if title == "redis":
                await asyncio.to_thread(redis.kill)
                await asyncio.sleep(rng.uniform(0.2, 2))
                await asyncio.to_thread(redis.start)
            else:
                await asyncio.to_thread(application.kill, title)


async def submit_all(client: Client, orders: list[Order], seconds: float) -> dict[str, Order]:
    """Submit orders over a while, by clients who do not wait for each other."""

    async def one(order: Order, after_s: float) -> tuple[str, Order]:
        await asyncio.sleep(after_s)
        return await client.submit(order), order

    pace_s = seconds / len(orders)
    return dict(await asyncio.gather(*(one(o, i * pace_s) for i, o in enumerate(orders))))


async def test_every_accepted_job_ends_once_with_its_picture_whatever_dies(
    application: Application, redis: RedisServer, client: Client, queue: JobQueue
) -> None:
    rng = random.Random(SEED)
    orders = mixed(JOBS, rng)
    kills = asyncio.create_task(kill_all(application, redis, rng))
    made = await submit_all(client, orders, ROUNDS * len(PROCESSES) * PAUSE_S)
    await kills
    ends: dict[str, dict[str, Any]] = {job_id: await client.ended(job_id) for job_id in made}
    print("ends:", Counter(job["status"] for job in ends.values()))
    print("attempts:", Counter(job["attempts"] for job in ends.values()))
    print("answers while processes were away:", client.refused)
    assert {job["status"] for job in ends.values()} == {"completed"}, [
        job["error"] for job in ends.values() if job["error"]
    ]
    assert await jobs_of(queue) == set(made), "a key made two jobs, or none"
    await assert_one_end_each(queue, made)
    await asyncio.gather(
        *(assert_right_pictures(client, made[job_id], job) for job_id, job in ends.items())
    )
