"""Tells the metrics how the queue is. Ingress replicas do it, because there may be no worker."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NoReturn

from deployments.errors import JobsUnavailable

if TYPE_CHECKING:
    from deployments.telemetry import JobMetrics
    from serve_app.jobs.queue import JobQueue

EVERY_S = 5.0
"""Ray's agent forgets a gauge that is not set for a while."""


async def watch(queue: JobQueue, metrics: JobMetrics, every_s: float = EVERY_S) -> NoReturn:
    """Look at the queue now and then, until cancelled.

    Args:
        queue: to look at.
        metrics: to tell.
        every_s: pause between two looks.
    """
    while True:
        try:
            queue.seen = await queue.depth()
            metrics.set_queue(queue.seen)
            metrics.set_backlog(*await queue.backlog())
        except JobsUnavailable:
            queue.seen = None
            metrics.set_away()
        await asyncio.sleep(every_s)
