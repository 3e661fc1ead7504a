"""The HTTP application and a worker in one process, with models that stand in for Ray's."""

from __future__ import annotations

import asyncio
import io
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import uvicorn
from PIL import Image

from benchmarks.server import free_port
from deployments.contract import ImageJob, ImageResult, JobProgress
from deployments.errors import NotReady
from deployments.settings import (
    AccessSettings,
    ClientJobSettings,
    ClientSettings,
    JobSettings,
    UploadSettings,
)
from deployments.tasks import Task
from serve_app.access.limits import Limits
from serve_app.api import create_app
from serve_app.intake import Details
from serve_app.jobs.connection import RedisLink
from serve_app.jobs.queue import JobQueue, open_queue
from serve_app.jobs.service import Jobs, open_jobs
from serve_app.jobs.signals import Signals
from serve_app.jobs.sweeping import keep_sweeping
from serve_app.jobs.worker import Worker
from tests.unit.fakes import NAMES, REGISTRY

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from deployments.catalogue import Registry

PATIENCE_S = 60.0
"""For whatever a busy machine may take."""


def picture(seed: int, kind: str = "PNG") -> bytes:
    """A small file that differs by seed."""
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


@dataclass
class StandInModels:
    """Models that do as they are told: `steps` steps, then a picture that the seed determines.

    Attributes:
        step_s: how long a step takes.
        errors: raised by the next calls, one each, instead of an answer.
        jobs: what was received, in order.
        stepped: steps done, by job id.
    """

    step_s: float = 0.0
    errors: list[Exception] = field(default_factory=list)
    jobs: list[ImageJob] = field(default_factory=list)
    stepped: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> StandInModel:
        return StandInModel(self, name)

    def recovery_s(self, name: str) -> float:
        return 1.0

    async def states(self) -> dict[str, Any]:
        return dict.fromkeys(NAMES, "ready")

    async def details(self) -> Details:
        return Details({}, {})


@dataclass
class StandInModel:
    models: StandInModels
    name: str

    async def __call__(self, job: ImageJob) -> ImageResult:
        async for told in self.stream(job):
            if not isinstance(told, JobProgress):
                return told[0]
        raise AssertionError

    async def stream(self, job: ImageJob) -> AsyncGenerator[JobProgress | tuple[ImageResult, ...]]:
        self.models.jobs.append(job)
        error = self.models.errors.pop(0) if self.models.errors else None
        if not isinstance(error, NotReady):
            yield JobProgress(0, 0)  # as a replica that takes a job says at once
        if error:
            raise error
        steps = getattr(job.request, "steps", 1)
        for done in range(1, steps + 1):
            await asyncio.sleep(self.models.step_s)
            self.models.stepped[job.request_id] = done
            preview = picture(done, "JPEG") if job.preview else None
            yield JobProgress(done, steps, (steps - done) * self.models.step_s, preview)
        seed = getattr(job.request, "seed", None)
        yield tuple(_result(job, self.name, seed, k) for k in range(job.n))


def _result(job: ImageJob, name: str, seed: int | None, k: int) -> ImageResult:
    own = None if seed is None else seed + k
    return ImageResult(
        image=picture(own or 0),
        media_type=f"image/{job.output_format}",
        width_px=24,
        height_px=16,
        model=f"{name}@0123abcd",
        seed=own,
        batch_size=job.n,
        gpu_seconds=0.25,
        timings_s={"decode": 0.001, "queue": 0.0, "denoise": 0.5, "vae": 0.1, "encode": 0.001},
        notes=job.notes,
    )


@dataclass
class Application:
    """A running one.

    Attributes:
        url: of the server.
        models: behind it.
        client: at that address; follows no redirects.
        worker: None while there is none.
    """

    url: str
    models: StandInModels
    client: httpx.AsyncClient
    queue: JobQueue
    jobs: Jobs
    settings: JobSettings
    signals: Signals
    registry: Registry
    worker: asyncio.Task[None] | None = None

    async def submit(self, task: Task = Task.COMIC, seed: int = 1, **options: Any) -> str:
        """Make a job; returns its id."""
        headers = {"Prefer": "respond-async"} | options.pop("headers", {})
        data = {"steps": "3", "seed": str(seed)} | options
        answer = await self.client.post(
            task.route, files={"image": ("photo.png", picture(0))}, data=data, headers=headers
        )
        assert answer.status_code == 202, answer.text
        return str(answer.json()["job_id"])

    async def job(self, job_id: str) -> Any:
        answer = await self.client.get(f"/api/v1/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def ended(self, job_id: str) -> Any:
        """The job, once it has ended."""
        async with asyncio.timeout(PATIENCE_S):
            while (job := await self.job(job_id))["status"] in ("queued", "processing"):
                await asyncio.sleep(0.02)
        return job

    async def start_worker(self) -> None:
        models = {spec.name: self.models[spec.name] for spec in self.registry.models}
        worker = Worker(self.queue, self.jobs.files, models, self.registry, self.settings)
        self.signals.on_word = worker.hear
        self.worker = asyncio.create_task(worker.run())

    async def lose_worker(self) -> None:
        """End the worker's loops and its jobs where they stand, as its death does."""
        if self.worker is None:
            return
        self.worker.cancel()
        with suppress(asyncio.CancelledError):
            await self.worker
        for task in asyncio.all_tasks():
            if "_carry" in repr(task.get_coro()):
                task.cancel()
        self.worker = None


@asynccontextmanager
async def application(
    redis_url: str,
    folder: Path,
    *,
    working: bool = True,
    keys: Path | None = None,
    models: StandInModels | None = None,
    uploads: UploadSettings | None = None,
    registry: Registry = REGISTRY,
    **changes: Any,
) -> AsyncGenerator[Application]:
    """An application on a free port, whose jobs are in this Redis and this folder.

    Args:
        redis_url: of the Redis.
        folder: of the pictures.
        working: whether there is a worker.
        keys: file of API keys; None asks for none.
        models: behind it; None makes some.
        uploads: their limits.
        registry: what the models are.
        changes: of the settings of jobs.
    """
    access = AccessSettings(auth="off") if keys is None else AccessSettings(keys=keys)
    of_clients = {
        name: changes.pop(name) for name in ClientJobSettings.model_fields if name in changes
    }
    settings = JobSettings(folder=folder, **changes)
    clients = ClientSettings(
        jobs=ClientJobSettings(**of_clients), access=access, uploads=uploads or UploadSettings()
    )
    models = models or StandInModels()

    async def url() -> str:
        return redis_url

    link = RedisLink(url)
    queue = open_queue(link, settings)
    signals = Signals(link, settings.namespace)
    jobs = open_jobs(link, signals, settings, clients.jobs)
    limits = Limits(lambda: link.current, settings.namespace)
    app = create_app(models, registry, clients, jobs=jobs, limits=limits)
    port = free_port()
    config = uvicorn.Config(
        app, port=port, log_level="warning", lifespan="off", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    # Each part ends, whatever the test or another part's end raises: a socket that stays open would
    # be told to a later test.
    async with AsyncExitStack() as ending:
        ending.push_async_callback(_disconnect, link)
        sweeping = keep_sweeping(queue, jobs.files, settings.keep_s, every_s=0.5)
        for loop in (signals.listen(), sweeping):
            ending.push_async_callback(_cancel, asyncio.create_task(loop))
        serving = asyncio.create_task(server.serve())
        ending.push_async_callback(_stop, server, serving)
        base = f"http://127.0.0.1:{port}"
        client = httpx.AsyncClient(base_url=base, timeout=30, trust_env=False)
        await ending.enter_async_context(client)
        made = Application(base, models, client, queue, jobs, settings, signals, registry)
        ending.push_async_callback(made.lose_worker)
        while not server.started or link.current is None:
            assert not serving.done(), "the server does not start"
            await asyncio.sleep(0.01)
        if working:
            await made.start_worker()
        yield made


async def _disconnect(link: RedisLink) -> None:
    if link.current is not None:
        await link.current.aclose()


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _stop(server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    server.should_exit = True
    await serving
