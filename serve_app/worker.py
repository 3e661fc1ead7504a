"""The Serve class that carries jobs: a thin worker without a GPU, which asks the models."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from deployments.errors import JobsUnavailable
from deployments.telemetry import JobMetrics
from serve_app.backends import HandleBackend
from serve_app.jobs.connection import away, open_link
from serve_app.jobs.files import open_job_files
from serve_app.jobs.outbox import Outbox, deliver_forever
from serve_app.jobs.queue import open_queue
from serve_app.jobs.signals import Signals
from serve_app.jobs.webhooks import Sender
from serve_app.jobs.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from deployments.catalogue import Registry
    from deployments.settings import Settings
    from serve_app.backends import Handle

_ASK_S = 5.0


class JobWorker:
    """Carries jobs from the queue to the models, and their results to storage.

    Args:
        handles: by model.
        registry: what each model is.
        settings: of the application.
        redis: the application's own Redis; None if REDIS_URL names one.
    """

    def __init__(
        self,
        handles: dict[str, Handle],
        registry: Registry,
        settings: Settings,
        redis: Handle | None,
    ) -> None:
        jobs = settings.jobs
        link = open_link(own_url(redis))
        self._settings = jobs
        self._queue = open_queue(link, jobs)
        self._outbox = Outbox(link, jobs.namespace, jobs.webhooks, jobs.lease_s)
        models = {n: HandleBackend(n, h) for n, h in handles.items()}
        files, metrics = open_job_files(jobs), JobMetrics()
        self._worker = Worker(self._queue, files, models, registry, jobs, metrics.count_end)
        self._signals = Signals(link, jobs.namespace, self._worker.hear)
        self._loops: asyncio.Task[None] | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve on the event loop, after `__init__`: the work begins."""
        if self._loops is None:
            self._loops = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as loops:
            loops.create_task(self._signals.listen())
            loops.create_task(self._worker.run())
            loops.create_task(self._deliver())

    async def _deliver(self) -> None:
        """Send webhooks, once Redis has told the secret that signs them."""
        while True:
            with suppress(JobsUnavailable):
                sender = Sender(self._settings.webhooks, await self._queue.webhook_master())
                break
            await asyncio.sleep(_ASK_S)
        await deliver_forever(self._outbox, sender)

    async def check_health(self) -> None:
        """Called by Serve, which replaces this replica if it raises."""
        if self._loops is not None and self._loops.done():
            self._loops.result()

    async def status(self) -> dict[str, int]:
        """Jobs at hand."""
        return {"jobs": self._worker.carried}

    async def __del__(self) -> None:
        """Called by Serve when this replica is to end: it finishes the jobs at hand."""
        if getattr(self, "_loops", None):
            await self._worker.drain()


def own_url(redis: Handle | None) -> Callable[[], Awaitable[str]] | None:
    """What asks a LocalRedis deployment where its server is; None without one."""
    if redis is None:
        return None

    async def url() -> str:
        try:
            async with asyncio.timeout(_ASK_S):
                return await redis.url.remote()
        except (RayServeException, RayError, TimeoutError) as error:
            ours: Any = getattr(error, "cause", None)
            raise (
                ours if isinstance(ours, JobsUnavailable) else away(type(error).__name__)
            ) from None

    return url
