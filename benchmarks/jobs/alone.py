"""Parts of Imagen without Ray, each as a process of its own: an Ingress, a worker.

    python -m benchmarks.jobs.alone {ingress PORT | worker | finisher} REDIS_URL FOLDER

The worker's model is a stand-in that answers at once with the picture that it got. The finisher
only claims jobs and ends them.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import psutil
import typer
import uvicorn

from benchmarks.jobs.clients import TASK
from deployments.catalogue import Registry, load_registry
from deployments.contract import ImageJob, ImageResult, JobProgress
from deployments.settings import (
    AccessSettings,
    ClientJobSettings,
    ClientSettings,
    JobSettings,
    Settings,
)
from serve_app.access.limits import Limits
from serve_app.api import create_app
from serve_app.intake import Details
from serve_app.jobs.connection import RedisLink
from serve_app.jobs.files import open_job_files
from serve_app.jobs.outbox import Outbox, deliver_forever
from serve_app.jobs.queue import open_queue
from serve_app.jobs.record import Job, job_view
from serve_app.jobs.redis_process import RedisProcess
from serve_app.jobs.service import open_jobs
from serve_app.jobs.signals import Signals
from serve_app.jobs.sweeping import keep_sweeping
from serve_app.jobs.webhooks import Sender
from serve_app.jobs.worker import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    from serve_app.jobs.queue import JobQueue
    from serve_app.jobs.service import Jobs

_ROOM: Final = 16
_IDLE_S: Final = 0.002
app = typer.Typer()
Redis = Annotated[str, typer.Argument(help="URL of the Redis")]
Folder = Annotated[Path, typer.Argument(help="Of the pictures")]


class Echo:
    """A model that needs no time."""

    async def stream(self, job: ImageJob) -> AsyncGenerator[JobProgress | tuple[ImageResult, ...]]:
        yield JobProgress(20, 20, 0.0)
        result = ImageResult(
            image=job.image or b"",
            media_type=f"image/{job.output_format}",
            width_px=job.width_px,
            height_px=job.height_px,
            model=f"{TASK}-starter@0123abcd",
            seed=None,
            batch_size=1,
            gpu_seconds=0.0,
            timings_s={"decode": 0.0, "queue": 0.0, "denoise": 0.0, "vae": 0.0, "encode": 0.0},
        )
        yield (result,)


class Ready:
    """Models of an Ingress that only takes jobs."""

    def __getitem__(self, name: str) -> Any:
        raise NotImplementedError  # no request asks for an answer in the same call

    def recovery_s(self, name: str) -> float:
        return 1.0

    async def states(self) -> dict[str, Any]:
        return {}

    async def details(self) -> Details:
        return Details({}, {})


def settings_of(folder: Path) -> Settings:
    """All jobs of a benchmark are kept."""
    return Settings(jobs=JobSettings(folder=folder, max_kept=1_000_000))


CLIENTS = ClientSettings(
    jobs=ClientJobSettings(max_queued=1_000_000), access=AccessSettings(auth="off")
)
"""As an application on loopback has them; all jobs of a benchmark fit the queue."""


async def linked(redis: str) -> RedisLink:
    """A link to this Redis, connected."""

    async def url() -> str:
        return redis

    link = RedisLink(url)
    await link.refresh()
    return link


@asynccontextmanager
async def jobs_of(redis: str, folder: Path) -> AsyncGenerator[Jobs]:
    """Jobs as an Ingress opens them; nobody listens to their signals."""
    link, settings = await linked(redis), settings_of(folder).jobs
    jobs = open_jobs(link, Signals(link, settings.namespace), settings, CLIENTS.jobs)
    try:
        yield jobs
    finally:
        jobs.files.close()
        await link().aclose()


@app.command()
def ingress(redis: Redis, folder: Folder, port: int) -> None:
    """The HTTP application."""

    async def serve() -> None:
        link, settings = await linked(redis), settings_of(folder)
        signals = Signals(link, settings.jobs.namespace)
        registry = load_registry(*settings.models)
        limits = Limits(lambda: link.current, settings.jobs.namespace)
        jobs = open_jobs(link, signals, settings.jobs, CLIENTS.jobs)
        api = create_app(Ready(), registry, CLIENTS, jobs=jobs, limits=limits)
        server = uvicorn.Server(uvicorn.Config(api, port=port, log_level="error", lifespan="off"))
        sweeping = keep_sweeping(jobs.queue, jobs.files, settings.jobs.keep_s)
        loops = [asyncio.create_task(loop) for loop in (signals.listen(), sweeping)]
        await server.serve()
        for loop in loops:
            loop.cancel()

    asyncio.run(serve())


@app.command()
def worker(redis: Redis, folder: Folder) -> None:
    """A worker as JobWorker runs it."""

    async def work() -> None:
        whole = settings_of(folder)
        link, settings = await linked(redis), whole.jobs
        queue = open_queue(link, settings)
        registry = Registry([load_registry(*whole.models)[TASK]], {})
        models = {registry[TASK].name: Echo()}
        carrier = Worker(queue, open_job_files(settings), models, registry, settings)
        outbox = Outbox(link, settings.namespace, settings.webhooks, settings.lease_s)
        sender = Sender(settings.webhooks, await queue.webhook_master())
        async with asyncio.TaskGroup() as loops:
            loops.create_task(Signals(link, settings.namespace, carrier.hear).listen())
            loops.create_task(carrier.run())
            loops.create_task(deliver_forever(outbox, sender))

    asyncio.run(work())


@app.command()
def finisher(redis: Redis, folder: Folder) -> None:
    """Claims and ends jobs, as a worker does, but carries none."""

    async def work() -> None:
        queue = open_queue(await linked(redis), settings_of(folder).jobs)
        while True:
            if jobs := await queue.claim({TASK: _ROOM}):
                await asyncio.gather(*(_finish(queue, job) for job in jobs))
            else:
                await asyncio.sleep(_IDLE_S)

    asyncio.run(work())


async def _finish(queue: JobQueue, job: Job) -> None:
    fields = {"results": "[]", "timings_s": "{}", "gpu_seconds": "0"}
    view = json.dumps(job_view(job, 1.0, None))
    await queue.finish(job.spec.job_id, "completed", fields, view, claim=job.claim)


@contextmanager
def redis_server(folder: Path) -> Generator[str]:
    """The URL of a Redis of its own, set up as Imagen sets it up."""
    server = RedisProcess(folder)
    try:
        yield server.ensure()
    finally:
        server.close()


@contextmanager
def part(kind: str, redis: str, folder: Path, *words: str) -> Generator[psutil.Process]:
    """A process of this module."""
    command = [sys.executable, "-m", "benchmarks.jobs.alone", kind, redis, str(folder), *words]
    process = subprocess.Popen(command, env={**os.environ, "MALLOC_ARENA_MAX": "1"})
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


async def until_ended(jobs: Jobs, owner: str, count: int) -> float:
    """When so many jobs of an owner are completed, on `time.perf_counter`.

    Raises:
        RuntimeError: one has failed.
    """
    while (ended := await jobs.queue.count(owner))["completed"] < count:
        if ended["failed"]:
            raise RuntimeError(f"{ended['failed']} jobs failed.")
        await asyncio.sleep(0.02)
    return time.perf_counter()


if __name__ == "__main__":
    app()
