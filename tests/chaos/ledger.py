"""What Redis holds of the jobs of a test, read beside the application."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np

from serve_app.jobs.connection import connect
from serve_app.jobs.queue import JobQueue
from serve_app.jobs.record import ENDED

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable

OWNER = "anonymous"
_FRESH = 8


@asynccontextmanager
async def ledger(redis_url: str) -> AsyncGenerator[JobQueue]:
    """The application's own queue."""
    redis = connect(redis_url)
    try:
        yield JobQueue(lambda: redis, "imagen", keep_s=3600, lease_s=8)
    finally:
        await redis.aclose()


async def jobs_of(queue: JobQueue, owner: str = OWNER) -> set[str]:
    """The ids of all jobs of an owner."""
    found: set[str] = set()
    cursor: str | None = ""
    while cursor is not None:
        page, cursor = await queue.list(owner, None, cursor, 100)
        found |= {job.spec.job_id for job in page}
    return found


async def assert_one_end_each(queue: JobQueue, job_ids: Iterable[str]) -> None:
    """Each job has ended, once."""
    for job_id in job_ids:
        ends = [event.name for event in await queue.events(job_id) if event.name in ENDED]
        assert len(ends) == 1, (job_id, ends)


async def times_of(queue: JobQueue, job_id: str, event: str) -> list[float]:
    """When an event happened to a job: seconds since 1970."""
    events = await queue.events(job_id)
    return [int(one.event_id.partition("-")[0]) / 1000 for one in events if one.name == event]


async def steps_at_end(queue: JobQueue, job_id: str) -> tuple[float, float]:
    """How many steps a job had made when it ended in Redis, and its steps a second.

    Each word of progress is late: by up to 0.2 s of the model, and up to 0.25 s of the worker. The
    one among the latest that is least late tells how far the job really was.
    """
    events = await queue.events(job_id)
    at_s = [int(one.event_id.partition("-")[0]) / 1000 for one in events]
    words = [
        (when_s, json.loads(one.data)["steps_done"])
        for when_s, one in zip(at_s, events, strict=True)
        if one.name == "progress"
    ]
    times_s, steps = np.array(words).T
    pace = float(np.polyfit(times_s - times_s[0], steps, 1)[0])
    began_s = float(np.min((times_s - steps / pace)[-_FRESH:]))
    return (at_s[-1] - began_s) * pace, pace
