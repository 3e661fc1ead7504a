"""How many workers there are: Serve's controller asks this policy, and the policy asks Redis.

It does not subclass Ray's AsyncInferenceAutoscalingPolicy, whose module (Ray 2.60) imports tornado,
which is not among Ray's dependencies.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import TYPE_CHECKING, Any

from deployments.errors import ConfigError, JobsUnavailable
from serve_app.jobs.connection import TIMEOUT_S, away, connect, url_of_environment
from serve_app.jobs.queue import JobQueue

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext
    from redis.asyncio import Redis

logger = logging.getLogger("ray.serve.imagen.jobs")


class JobWorkerPolicy:
    """One worker for every `target_ongoing_requests` unfinished jobs and webhooks.

    Running jobs count as well as waiting ones, so that a worker with its last job stays. As long as
    anything is unfinished there is at least one worker. While Redis does not answer, the number of
    workers stays as it is.

    Serve calls it several times a second on the loop of its controller, and logs its arguments.
    So it waits for nothing: each look at Redis is a task of its own, one at a time. The URL comes
    from the environment of the controller, because it holds a password. No connection is open
    between two looks, so that none is left when Serve drops the policy.

    Args:
        namespace: begins every Redis key (`jobs.namespace`).
        poll_s: from the start of a look to the start of the next one, at least.
        timeout_s: of a look.
    """

    def __init__(self, namespace: str, poll_s: float = 2, timeout_s: float = TIMEOUT_S) -> None:
        self._namespace = namespace
        self._poll_s = poll_s
        self._timeout_s = timeout_s
        self._redis: Redis | None = None
        self._look: asyncio.Task[None] | None = None
        self._looked_s = -math.inf
        self._unfinished: int | None = None
        self._is_away = False

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of workers that there should be, and no state for Serve to keep."""
        self._look_now_and_then()
        if self._unfinished is None or context.config is None:
            return context.target_num_replicas, {}
        workers = math.ceil(self._unfinished / context.config.get_target_ongoing_requests())
        most = max(workers, context.capacity_adjusted_min_replicas)
        return min(most, context.capacity_adjusted_max_replicas), {}

    def _look_now_and_then(self) -> None:
        is_busy = self._look is not None and not self._look.done()
        now_s = time.monotonic()
        if not is_busy and now_s - self._looked_s >= self._poll_s:
            self._looked_s = now_s
            self._look = asyncio.get_running_loop().create_task(self._count())

    async def _count(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                self._unfinished = await self._ask()
            self._is_away = False
        except (JobsUnavailable, ConfigError, TimeoutError) as error:
            self._unfinished = None
            if not self._is_away:
                logger.warning("The number of workers stays as it is: %s", error or "no answer")
            self._is_away = True

    async def _ask(self) -> int:
        """Jobs that wait or run, and jobs with a webhook that is not delivered yet."""
        if self._redis is None:
            url = url_of_environment()
            if url is None:
                raise away("no REDIS_URL in the environment of Serve's controller")
            self._redis = connect(url, timeout_s=self._timeout_s)
        redis = self._redis
        queue = JobQueue(lambda: redis, self._namespace, keep_s=0, lease_s=0)
        try:
            depth, backlog = await queue.depth(), await queue.backlog()
        finally:
            await redis.connection_pool.disconnect()
        return sum(waiting + running for waiting, running, _ in depth.values()) + backlog.webhooks
