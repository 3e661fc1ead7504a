"""Workers on a real Redis: one at a time has a job, and keeps it."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

from deployments.catalogue import Registry
from deployments.contract import ImageResult, JobProgress
from deployments.errors import Full, ImagenError, NotReady
from deployments.settings import JobSettings
from deployments.tasks import Task
from serve_app.jobs.connection import connect
from serve_app.jobs.files import open_job_files
from serve_app.jobs.queue import JobQueue
from serve_app.jobs.record import JobSpec
from serve_app.jobs.worker import Worker
from tests.jobs.redis_server import RedisServer
from tests.jobs.test_queue import spec, submit
from tests.unit.fakes import COMIC_ALONE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator
    from pathlib import Path

    from deployments.contract import ImageJob
    from serve_app.jobs.record import Job, Priority

LEASE_S = 2.0
_PAUSES = ("REAP", "IDLE", "BEAT")
RESULT = ImageResult(b"picture", "image/png", 8, 8, "comic@0", 7, 1, 0.0)
COMIC = COMIC_ALONE[Task.COMIC]
TWO_COMICS = Registry([COMIC, COMIC.model_copy(update={"name": "comic-further"})], {})
LOST = NotReady("The replica was lost.", value="comic", remedy="Try again.")


class Model:
    """Takes a request, and answers once it may.

    Attributes:
        inside, most, taken: requests at this moment, at most at a time, and in all.
        timeouts_s: of the requests.
        errors: raised by the next requests, before or after the model has taken them.
    """

    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.may.set()
        self.inside = self.most = self.taken = 0
        self.timeouts_s: list[float] = []
        self.errors: list[tuple[ImagenError, bool]] = []

    async def stream(self, job: ImageJob) -> AsyncGenerator[JobProgress | tuple[ImageResult, ...]]:
        self.taken += 1
        self.timeouts_s.append(job.timeout_s)
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            error, is_taken = self.errors.pop(0) if self.errors else (None, True)
            if is_taken:
                yield JobProgress(0, 0)
            if error:
                raise error
            await self.may.wait()
            yield (RESULT,) * job.n
        finally:
            self.inside -= 1


@pytest.fixture
def server(tmp_path: Path) -> Generator[RedisServer]:
    with RedisServer(tmp_path / "redis") as running:
        yield running


@pytest.fixture
async def queue(server: RedisServer) -> AsyncGenerator[JobQueue]:
    link = cache(lambda: connect(server.url, timeout_s=0.5))
    yield JobQueue(link, "test", keep_s=60, lease_s=LEASE_S)
    await link().aclose()


@pytest.fixture
def settings(tmp_path: Path) -> JobSettings:
    return JobSettings(folder=tmp_path, lease_s=LEASE_S, attempts=2)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("worker.AGAIN_S", "carrier.AGAIN_S", *(f"worker._{n}_S" for n in _PAUSES)):
        monkeypatch.setattr(f"serve_app.jobs.{name}", 0.05)


@asynccontextmanager
async def at_work(
    queue: JobQueue, settings: JobSettings, model: Model, further: Model | None = None
) -> AsyncGenerator[Worker]:
    """A worker with one model, or with a further one of the same task."""
    models, registry = {"comic-starter": model}, COMIC_ALONE
    if further:
        models["comic-further"] = further
        registry = TWO_COMICS
    worker = Worker(queue, open_job_files(settings), models, registry, settings)
    loops = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        model.may.set()
        loops.cancel()
        async with asyncio.timeout(30):
            await asyncio.gather(loops, return_exceptions=True)
            await worker.drain()


async def when(queue: JobQueue, job_id: str, true: Callable[[Job], bool]) -> Job:
    async with asyncio.timeout(30):
        while not ((job := await queue.get(job_id)) and true(job)):
            await asyncio.sleep(0.02)
    return job


async def age(queue: JobQueue, jobs: list[JobSpec], seconds: float) -> None:
    """Make jobs look as if they had been submitted so long ago."""
    for one in jobs:
        name = f"test:job:{one.job_id}"
        created_s = float(str(await queue._redis().hget(name, "created")))  # type: ignore[misc]
        await queue._redis().hset(name, "created", created_s - seconds)  # type: ignore[misc]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.02)


async def test_a_worker_keeps_its_job_while_redis_hangs_for_longer_than_a_claim_holds(
    queue: JobQueue, settings: JobSettings, server: RedisServer
) -> None:
    model = Model()
    model.may.clear()
    async with at_work(queue, settings, model):
        [job_id] = await submit(queue, spec(has_image=False))
        await until(lambda: model.inside == 1)
        server.freeze()
        await asyncio.sleep(settings.lease_s * 2)
        server.thaw()
        await asyncio.sleep(settings.lease_s * 2)
        model.may.set()
        job = await when(queue, job_id, lambda job: job.has_ended)
    assert (job.status, job.attempts, model.taken) == ("completed", 1, 1)


async def test_a_worker_that_gets_its_own_job_again_runs_it_once_at_a_time(
    queue: JobQueue, settings: JobSettings
) -> None:
    model = Model()
    model.may.clear()
    async with at_work(queue, settings, model) as worker:
        [job_id] = await submit(queue, spec(has_image=False))
        await when(queue, job_id, lambda job: job.attempts == 1)
        # What a worker on another machine does to a claim that it takes for void.
        await queue._redis().zadd("test:running:comic", {job_id: 0})
        await queue.reap(9)
        await when(queue, job_id, lambda job: job.attempts == 2)
        await until(lambda: model.taken == 2)
        assert (model.inside, worker.carried) == (1, 1)
        # The second claim is renewed, although the first run has ended meanwhile.
        await asyncio.sleep(settings.lease_s * 2)
        model.may.set()
        job = await when(queue, job_id, lambda job: job.has_ended)
    assert (job.status, job.attempts) == ("completed", 2)


async def test_a_job_waits_for_a_model_however_long_it_is_away(
    queue: JobQueue, settings: JobSettings
) -> None:
    model = Model()
    model.errors = [(LOST, False)] * 4
    async with at_work(queue, settings, model):
        [job_id] = await submit(queue, spec(has_image=False))
        job = await when(queue, job_id, lambda job: job.has_ended)
    assert (job.status, job.attempts, model.taken) == ("completed", 1, 5)


async def test_a_model_that_is_away_holds_up_no_other_model_of_its_task(
    queue: JobQueue, settings: JobSettings
) -> None:
    model, away = Model(), Model()
    away.errors = [(LOST, False)] * 10_000
    named = [spec(has_image=False, model="comic-further") for _ in range(settings.per_model + 2)]
    first = [spec(has_image=False), spec(has_image=False, model="comic-starter")]
    async with at_work(queue, settings, model, away) as worker:
        await submit(queue, *named)
        await until(lambda: worker.carried == settings.per_model)
        ended = [
            await when(queue, job_id, lambda job: job.has_ended)
            for job_id in await submit(queue, *first)
        ]
        assert worker.carried == settings.per_model
        away.errors.clear()
        ended += [await when(queue, one.job_id, lambda job: job.has_ended) for one in named]
    assert {job.status for job in ended} == {"completed"}
    assert model.taken == len(first)


async def test_jobs_that_name_the_default_share_its_places_with_those_that_name_none(
    queue: JobQueue, settings: JobSettings
) -> None:
    model, most = Model(), settings.per_model
    model.may.clear()
    both = [spec(has_image=False, model=name) for name in ("", "comic-starter") * most]
    async with at_work(queue, settings, model) as worker:
        await submit(queue, *both)
        await until(lambda: worker.carried == most and model.inside == most)
        await asyncio.sleep(0.3)  # in which more would come, too
        assert worker.carried == most
        model.may.set()
        ended = [await when(queue, one.job_id, lambda job: job.has_ended) for one in both]
    assert {job.status for job in ended} == {"completed"}
    assert model.most == most


@pytest.mark.parametrize("gone", [{"task": Task.GENERATE}, {"model": "comic-gone"}])
async def test_a_job_whose_task_or_model_is_served_no_longer_fails_after_ten_minutes(
    gone: dict[str, Any], queue: JobQueue, settings: JobSettings
) -> None:
    priorities: tuple[Priority, ...] = ("interactive", "batch", "batch") * 3
    jobs = [spec(has_image=False, priority=priority, **gone) for priority in priorities]
    young = spec(owner="b", has_image=False, **gone)
    await submit(queue, young, *jobs)
    await age(queue, jobs, 601)
    await age(queue, [young], 500)
    async with at_work(queue, settings, Model()):
        ended = [await when(queue, one.job_id, lambda job: job.has_ended) for one in jobs]
    assert {job.status for job in ended} == {"failed"}
    assert {job.error["code"] for job in ended if job.error} == {"invalid_parameter"}
    assert not await queue.dead()  # sent again unchanged, it fails again
    left = await queue.get(young.job_id)
    assert left
    assert left.status == "queued"


async def test_while_a_further_model_rolls_out_workers_of_the_former_version_leave_its_jobs(
    queue: JobQueue, settings: JobSettings
) -> None:
    model, further = Model(), Model()
    async with at_work(queue, settings, model):
        early = await submit(
            queue, *(spec(has_image=False, model="comic-further") for _ in range(6))
        )
        # A worker that has carried another one meanwhile has seen these.
        [own] = await submit(queue, spec(has_image=False))
        await when(queue, own, lambda job: job.has_ended)
        seen = await queue.read(early)
        assert {(job.status, job.claim) for job in seen} == {("queued", "0")}
        async with at_work(queue, settings, model, further):
            ended = [await when(queue, job_id, lambda job: job.has_ended) for job_id in early]
    assert {job.status for job in ended} == {"completed"}
    assert further.taken == len(early)


async def test_a_claim_without_work_is_no_attempt(queue: JobQueue, settings: JobSettings) -> None:
    model = Model()
    [job_id] = await submit(queue, spec(has_image=False))
    # Of a worker that dies before it begins, or whose claim Redis answers too late.
    impatient = JobQueue(queue._redis, "test", keep_s=60, lease_s=0)
    await impatient.claim({Task.COMIC: 1})
    model.may.clear()
    async with at_work(queue, settings, model):
        running = await when(queue, job_id, lambda job: job.attempts > 0)
        assert (running.status, running.attempts, running.claim) == ("processing", 1, "2")
        model.may.set()
        job = await when(queue, job_id, lambda job: job.has_ended)
    assert (job.status, job.attempts, model.taken) == ("completed", 1, 1)


async def test_a_busy_model_has_not_begun_the_job(queue: JobQueue, settings: JobSettings) -> None:
    model = Model()
    busy = Full("Busy.", value="busy", remedy="Try again.", retry_after_s=0.01)
    model.errors = [(busy, True)] * 5
    async with at_work(queue, settings, model):
        [job_id] = await submit(queue, spec(has_image=False))
        job = await when(queue, job_id, lambda job: job.has_ended)
    assert (job.status, job.attempts, model.taken) == ("completed", 1, 6)


async def test_a_model_knows_how_long_a_job_may_take(
    queue: JobQueue, settings: JobSettings
) -> None:
    model = Model()
    async with at_work(queue, settings, model):
        for deadline_s in (50, 10 * settings.run_timeout_s):
            [job_id] = await submit(queue, spec(has_image=False, deadline_s=deadline_s))
            await when(queue, job_id, lambda job: job.has_ended)
    assert 0 < model.timeouts_s[0] <= 50
    assert model.timeouts_s[1] == settings.run_timeout_s


async def test_a_worker_holds_no_more_pictures_than_it_may(
    queue: JobQueue, settings: JobSettings
) -> None:
    model = Model()
    model.may.clear()
    files, size = open_job_files(settings), 400 * 2**10
    small, large = [spec(image_bytes=size) for _ in range(5)], spec(image_bytes=3 * 2**20)
    for one in (*small, large):
        await files.put_input(one.job_id, b"x" * one.image_bytes)
    tight = settings.model_copy(update={"max_held_bytes": 2**20})
    async with at_work(queue, tight, model) as worker:
        await submit(queue, *small)
        await until(lambda: worker.carried == len(small) and model.inside == 2)
        await asyncio.sleep(0.3)  # in which a third one would come, too
        assert model.inside == 2
        await submit(queue, large)  # above the bound, and so alone
        model.may.set()
        ends = [await when(queue, one.job_id, lambda job: job.has_ended) for one in (*small, large)]
    assert {job.status for job in ends} == {"completed"}
    assert model.most == 2
    files.close()


async def test_a_job_that_loses_each_replica_that_takes_it_is_not_tried_for_ever(
    queue: JobQueue, settings: JobSettings
) -> None:
    model = Model()
    model.errors = [(LOST, True)] * 9
    async with at_work(queue, settings, model):
        [job_id] = await submit(queue, spec(has_image=False))
        job = await when(queue, job_id, lambda job: job.has_ended)
    assert (job.status, model.taken) == ("failed", settings.attempts)
    assert [one.spec.job_id for one in await queue.dead()] == [job_id]


async def test_a_job_of_a_newer_version_of_the_application_is_read(
    queue: JobQueue, settings: JobSettings
) -> None:
    async with at_work(queue, settings, Model()):
        newer = spec(has_image=False)
        text = json.dumps(json.loads(newer.fields()["spec"]) | {"unheard_of": 1})
        assert JobSpec.load(text) == newer


async def test_a_worker_that_is_to_end_finishes_what_it_is_just_claiming(
    queue: JobQueue, settings: JobSettings, server: RedisServer
) -> None:
    model = Model()
    slow = JobQueue(
        cache(lambda: connect(server.url, timeout_s=5)), "test", keep_s=60, lease_s=LEASE_S
    )
    async with at_work(slow, settings, model) as worker:
        server.freeze()
        await asyncio.sleep(0.2)  # the worker asks for jobs meanwhile
        draining = asyncio.create_task(worker.drain())
        await asyncio.sleep(0.1)
        server.thaw()
        await draining
        assert worker.carried == 0
    await slow._redis().aclose()
