"""What metrics are told of the queue, and of jobs that end."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from deployments.contract import ImageResult
from deployments.errors import DamagedImage
from deployments.settings import ClientJobSettings, JobSettings
from deployments.tasks import Task
from serve_app.jobs.connection import connect
from serve_app.jobs.files import open_job_files
from serve_app.jobs.queue import JobQueue
from serve_app.jobs.service import Jobs
from serve_app.jobs.watching import watch
from serve_app.jobs.worker import Worker
from tests.jobs.redis_server import RedisServer
from tests.jobs.test_queue import spec, submit
from tests.unit.fakes import COMIC_ALONE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator
    from pathlib import Path

    from deployments.contract import ImageJob


class Told:
    """What JobMetrics was told; Ray's metrics cannot be read back."""

    def __init__(self) -> None:
        self.is_up: bool | None = None
        self.depth: dict[Task, tuple[int, int, float]] = {}
        self.backlog: tuple[int, int, float] | None = None
        self.ends: list[tuple[Task, str]] = []

    def set_queue(self, depth: dict[Task, tuple[int, int, float]]) -> None:
        self.is_up, self.depth = True, depth

    def set_backlog(self, *backlog: Any) -> None:
        self.backlog = backlog

    def set_away(self) -> None:
        self.is_up = False

    def count_end(self, task: Task, outcome: str, seconds: float) -> None:
        assert 0 <= seconds < 60
        self.ends.append((task, outcome))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
async def queue(server: RedisServer) -> AsyncGenerator[JobQueue]:
    redis = connect(server.url)
    await redis.flushall()
    yield JobQueue(lambda: redis, "test", keep_s=60, lease_s=30)
    await redis.aclose()


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    yield
    task.cancel()
    await asyncio.wait([task])


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not reached():
            await asyncio.sleep(0.02)


async def test_the_queue_is_told_again_and_again_even_if_redis_goes(
    queue: JobQueue, server: RedisServer
) -> None:
    told: Any = Told()
    hook = spec(task=Task.AGED, webhook="https://example.com", webhook_events=("failed",))
    [_, aged] = await submit(queue, spec(), hook)
    [job] = await queue.claim({Task.AGED: 1})
    async with running(watch(queue, told, 0.05)):
        await until(lambda: bool(told.depth) and told.depth[Task.AGED][:2] == (0, 1))
        assert told.depth[Task.COMIC][:2] == (1, 0)
        assert queue.seen == told.depth
        assert told.depth[Task.COMIC][2] > 0
        assert told.backlog == (0, 0, 0)
        await queue.finish(aged, "failed", {}, "{}", claim=job.claim, dead=True)
        await until(lambda: told.backlog[:2] == (1, 1))
        await until(lambda: told.backlog[2] > 0)
        server.kill()
        await until(lambda: told.is_up is False)
        assert queue.seen is None
        server.start()
        await until(lambda: told.is_up is True)


class Model:
    """Refuses wide pictures."""

    async def stream(self, job: ImageJob) -> AsyncGenerator[tuple[ImageResult, ...]]:
        if job.width_px > 100:
            raise DamagedImage("It breaks.", value="1 px", remedy="Send another.")
        yield (ImageResult(b"png", "image/png", 1, 1, "model@0", 0, 1, 0.0),)


async def test_each_end_of_a_job_is_counted_once_with_its_outcome(
    queue: JobQueue, tmp_path: Path
) -> None:
    told: Any = Told()
    settings = JobSettings(folder=tmp_path)
    files = open_job_files(settings)
    models = {"comic-starter": Model()}
    worker = Worker(queue, files, models, COMIC_ALONE, settings, told.count_end)
    jobs = Jobs(queue, files, None, settings, ClientJobSettings(), told.count_end)  # type: ignore[arg-type]
    [canceled] = await submit(queue, spec(task=Task.AGED, has_image=False))
    for _ in range(2):
        await jobs.cancel("a", canceled)
    await submit(queue, spec(has_image=False), spec(has_image=False, width_px=101))
    async with running(worker.run()):
        await until(lambda: len(told.ends) == 3)
    assert sorted(told.ends) == [
        (Task.AGED, "canceled"),
        (Task.COMIC, "completed"),
        (Task.COMIC, "damaged_image"),
    ]
