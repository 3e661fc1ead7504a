"""Webhooks of jobs whose workers die between two attempts."""

from __future__ import annotations

import asyncio
import json
import random
from collections import defaultdict
from typing import TYPE_CHECKING

from tests.chaos.application import WORKER
from tests.chaos.clients import mixed
from tests.jobs.receiver import Receiver, status, until

if TYPE_CHECKING:
    from tests.chaos.application import Application
    from tests.chaos.clients import Client
    from tests.jobs.receiver import Answer, Received
    from tests.jobs.redis_server import RedisServer

JOBS, KILLS = 12, 3


def failing_once() -> Answer:
    """Refuses the first attempt of each event."""
    seen: set[str] = set()

    async def answer(received: Received, writer: asyncio.StreamWriter) -> None:
        is_first = received.id not in seen
        seen.add(received.id)
        await status(500 if is_first else 204)(received, writer)

    return answer


async def test_every_event_arrives_and_no_id_has_two_contents_whatever_dies(
    application: Application, client: Client, redis: RedisServer
) -> None:
    async with Receiver(failing_once()) as receiver:
        orders = mixed(JOBS, random.Random(21))
        made = {await client.submit(order, webhook=receiver.url) for order in orders}
        for number in range(KILLS):
            await until(lambda seen=2 * number + 1: len(receiver.received) >= seen)
            await asyncio.to_thread(application.kill, WORKER)
            await asyncio.to_thread(redis.kill)
            await asyncio.to_thread(redis.start)
        for job_id in made:
            assert (await client.ended(job_id))["status"] == "completed"

        def told() -> set[str]:
            ended = [one for one in receiver.received if "job.completed" in one.body]
            return {json.loads(one.body)["data"]["job_id"] for one in ended}

        async with asyncio.timeout(120):
            while told() != made:
                await asyncio.sleep(0.5)
    contents: dict[str, set[str]] = defaultdict(set)
    for one in receiver.received:
        contents[one.id].add(one.body)
    print(f"{len(contents)} events arrived in {len(receiver.received)} attempts")
    assert {len(bodies) for bodies in contents.values()} == {1}
