"""A worker: takes jobs from the queue, has the models run them, and stores the results.

It does no image work itself, so that one worker carries many jobs. It acknowledges last: whatever
it has not finished when it dies, another worker does again after `lease_s`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import random
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from deployments.contract import ImageResult, JobProgress
from deployments.errors import (
    Full,
    ImagenError,
    JobsUnavailable,
    ModelFailed,
    NotReady,
    ServiceError,
    too_late,
)
from serve_app.jobs.queue import Beat
from serve_app.jobs.record import job_view
from serve_app.jobs.results import document_of, longest_s

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping

    from deployments.contract import ImageJob
    from deployments.settings import JobSettings
    from deployments.tasks import Task
    from serve_app.jobs.files import JobFiles
    from serve_app.jobs.queue import JobQueue
    from serve_app.jobs.record import Job, Status

_BEAT_S = 0.25
_REAP_S = 1.0
_IDLE_S = 1.0
"""How long a worker with nothing to do waits for a word before it looks by itself."""
_AGAIN_S = 1.0
_MOST_BACKOFF_S = 30.0
logger = logging.getLogger("ray.serve.imagen.jobs")


class Model(Protocol):
    """Whatever runs one model. Raises only errors of our own tree."""

    def stream(self, job: ImageJob) -> AsyncGenerator[JobProgress | tuple[ImageResult, ...]]:
        """Tells how far a request is; the results come last."""
        ...


@dataclass(slots=True, eq=False)
class _Run:
    """A job that this worker carries.

    Attributes:
        job: as it was claimed.
        attempts: tries on a model, of all workers.
        is_taken: whether a replica has taken the present one.
        work: the task that carries it.
        progress: as the model told it last; None before it did.
        told: what the last heartbeat said.
        beat_s: when that was.
    """

    job: Job
    attempts: int
    is_taken: bool = False
    work: asyncio.Task[None] | None = None
    progress: JobProgress | None = None
    told: JobProgress | None = None
    beat_s: float = 0.0


class Worker:
    """Carries jobs until it is cancelled.

    Args:
        queue: to take them from.
        files: of their pictures.
        models: by task.
        settings: of jobs.
        on_end: called with the task, outcome and seconds of each job that it ends. The outcome is
            completed, or the code of the error.
    """

    def __init__(
        self,
        queue: JobQueue,
        files: JobFiles,
        models: Mapping[Task, Model],
        settings: JobSettings,
        on_end: Callable[[Task, str, float], object] | None = None,
    ) -> None:
        self._queue = queue
        self._files = files
        self._models = models
        self._settings = settings
        self._on_end = on_end
        self._runs: dict[str, _Run] = {}
        self._wake = asyncio.Event()
        self._claiming = asyncio.Lock()
        self._is_draining = False

    async def run(self) -> None:
        """Work until cancelled. Survives a Redis that is away, and errors that nobody expects."""
        async with asyncio.TaskGroup() as loops:
            loops.create_task(self._forever(self._claim, 0))
            loops.create_task(self._forever(self._beat, _BEAT_S))
            loops.create_task(self._forever(self._reap, _REAP_S))
            loops.create_task(self._forever(self._sweep, _REAP_S))

    async def drain(self) -> None:
        """Take no more jobs, and wait for those at hand."""
        self._is_draining = True
        async with self._claiming:
            pass  # what is being claimed at this moment is at hand now
        while self._runs:
            await asyncio.wait([run.work for run in self._runs.values() if run.work])

    def hear(self, word: str) -> None:
        """Take in a word of `Signals`."""
        what, _, job_id = word.partition(" ")
        if what == "wake":
            self._wake.set()
        elif what == "ended" and (run := self._runs.get(job_id)):
            self._give_up(run)

    @property
    def carried(self) -> int:
        """Jobs at hand."""
        return len(self._runs)

    # --- the loops ---

    async def _forever(self, step: Callable[[], Awaitable[None]], pause_s: float) -> None:
        is_away = False
        task = asyncio.current_task()
        while task is None or not task.cancelling():  # a cancellation can get lost in redis-py
            try:
                await step()
                is_away = False
            except JobsUnavailable as error:
                if not is_away:
                    logger.warning("A worker waits: %s", error)
                is_away = True
            except Exception:
                # A worker that ended would lose all its jobs for the sake of one.
                logger.exception("A worker goes on after an unexpected error")
                await asyncio.sleep(_AGAIN_S)
            await asyncio.sleep(_AGAIN_S if is_away else pause_s)

    async def _claim(self) -> None:
        self._wake.clear()
        async with self._claiming:
            jobs = await self._queue.claim(room) if (room := self._room()) else []
            for job in jobs:
                self._begin(job)
        if not jobs:
            # Not asyncio.wait_for, which can lose a cancellation (Python 3.11).
            with suppress(TimeoutError):
                async with asyncio.timeout(_IDLE_S):
                    await self._wake.wait()

    def _begin(self, job: Job) -> None:
        if former := self._runs.get(job.spec.job_id):
            self._give_up(former)  # its claim is void, and this worker has the job anew
        run = self._runs[job.spec.job_id] = _Run(job, job.attempts, beat_s=time.monotonic())
        run.work = asyncio.create_task(self._carry(run))

    def _room(self) -> dict[Task, int]:
        """How many more jobs of each model fit; in any order, so that none always goes first."""
        if self._is_draining:
            return {}
        room = dict.fromkeys(self._models, self._settings.per_model)
        for run in self._runs.values():
            room[run.job.spec.task] -= 1
        tasks = random.sample(list(room), len(room))
        return {task: room[task] for task in tasks if room[task] > 0}

    async def _beat(self) -> None:
        now_s = time.monotonic()
        due_s = now_s - self._settings.lease_s / 3
        due = {
            job_id: (run, run.progress)
            for job_id, run in self._runs.items()
            if run.progress is not run.told or run.beat_s < due_s
        }
        beats = [beat for run, _ in due.values() for beat in _beats(run)]
        lost = await self._queue.heartbeat(beats)
        for job_id, (run, progress) in due.items():
            # Only now, so that what Redis did not hear is said again.
            run.told, run.beat_s = progress, now_s
            if job_id in lost:
                self._give_up(run)

    async def _reap(self) -> None:
        for job_id, why in await self._queue.reap(self._settings.attempts):
            job = await self._queue.get(job_id)
            if job is None:
                await self._queue.discard(job_id)
            else:
                error = too_late() if why == "late" else _lost()
                await self._fail(job, error, None, dead=why == "lost")

    async def _sweep(self) -> None:
        while job_ids := await self._queue.sweep():
            # An exception is no matter: files that stay behind expire by themselves.
            deleted = (self._files.delete(job_id) for job_id in job_ids)
            await asyncio.gather(*deleted, return_exceptions=True)

    def _give_up(self, run: _Run) -> None:
        """Stop work on a job that has ended, or whose claim is another's now."""
        self._forget(run)
        if run.work is not None:
            run.work.cancel()

    def _forget(self, run: _Run) -> None:
        if self._runs.get(run.job.spec.job_id) is run:
            del self._runs[run.job.spec.job_id]

    # --- one job ---

    async def _carry(self, run: _Run) -> None:
        job_id = run.job.spec.job_id
        try:
            await self._to_its_end(run)
        except asyncio.CancelledError:
            logger.info("Job %s was given up", job_id)
            raise
        except Exception:
            # Its claim is not renewed any more, so that another worker tries it.
            logger.exception("Job %s stopped", job_id)
        finally:
            self._forget(run)
            self._wake.set()

    async def _to_its_end(self, run: _Run) -> None:
        documents = await self._stored(run.job) if run.job.attempts > 1 else None
        try:
            if documents is None:
                documents = await self._made(run)
        except ImagenError as error:
            await self._fail(run.job, error, run, dead=isinstance(error, ServiceError))
        else:
            await self._complete(run, documents)

    async def _stored(self, job: Job) -> list[dict[str, Any]] | None:
        """What a worker that died after it had stored all results left; None if it had not."""
        found = [
            await self._patiently(self._files.result_document, job.spec.job_id, k)
            for k in range(job.spec.n)
        ]
        return [one for one in found if one is not None] if all(found) else None

    async def _made(self, run: _Run) -> list[dict[str, Any]]:
        """Results of the model, stored; their documents.

        Raises:
            RequestError: nothing will ever come of this job.
            ServiceError: it was tried as often as jobs are.
        """
        spec = run.job.spec
        image = await self._patiently(self._files.input, spec.job_id) if spec.has_image else None
        results = await self._on_model(run, image)
        documents = [document_of(result) for result in results]
        for k, (result, document) in enumerate(zip(results, documents, strict=True)):
            await self._patiently(self._files.put_result, spec.job_id, k, result.image, document)
        # What another worker has stored before stays, and is what the job is about.
        return (await self._stored(run.job) if run.job.attempts > 1 else None) or documents

    async def _on_model(self, run: _Run, image: bytes | None) -> tuple[ImageResult, ...]:
        pauses = _backoff()
        while True:
            run.is_taken = False
            try:
                return await self._once(run, image)
            except Full as error:  # the model is busy, which is no fault
                await asyncio.sleep(min(error.retry_after_s or _AGAIN_S, next(pauses)))
            except ServiceError as error:
                # Without a replica the job waits. One that loses the replicas that take it does not
                # go on for ever, because it may be the cause.
                if run.is_taken or not isinstance(error, NotReady):
                    if run.attempts >= self._settings.attempts:
                        raise
                    run.attempts += 1
                logger.warning("Job %s is tried again: %s", run.job.spec.job_id, error)
                await asyncio.sleep(next(pauses))

    async def _once(self, run: _Run, image: bytes | None) -> tuple[ImageResult, ...]:
        spec = run.job.spec
        job = spec.image_job(image, self._settings.run_timeout_s)
        async with aclosing(self._models[spec.task].stream(job)) as answers:
            async for told in answers:
                run.is_taken = True
                if not isinstance(told, JobProgress):
                    return told
                if told.steps:
                    run.progress = told
        raise ModelFailed("The model gave no result.", value="none", remedy="Try again.")

    async def _complete(self, run: _Run, documents: list[dict[str, Any]]) -> None:
        details = [document["metadata"] for document in documents]
        await self._end(
            run.job,
            "completed",
            run,
            results=documents,
            timings_s=longest_s([one["timings_s"] for one in details]),
            gpu_seconds=sum(one["gpu_seconds"] for one in details),
        )

    async def _fail(self, job: Job, error: ImagenError, run: _Run | None, *, dead: bool) -> None:
        request_id = job.spec.request_id or job.spec.job_id
        await self._end(job, "failed", run, error=error.details(request_id), dead=dead)

    async def _end(
        self, job: Job, status: Status, run: _Run | None, *, dead: bool = False, **found: Any
    ) -> None:
        """Write a job's end, however long Redis is away; without a run, whoever has the job."""
        fields = {name: json.dumps(value) for name, value in found.items()}
        if run is not None:
            found["attempts"] = run.attempts
            if run.progress is not None and status == "completed":
                found["steps_done"] = found["steps"] = run.progress.steps
        for name in ("attempts", "steps_done", "steps"):
            if name in found:
                fields[name] = str(found[name])
        ended = replace(job, status=status, ended_s=time.time(), position=0, **found)
        view = job_view(ended, self._settings.keep_s, self._settings.gpu_second_price)
        _, was_set = await self._patiently(
            self._queue.finish,
            job.spec.job_id,
            status,
            fields,
            json.dumps(view),
            claim="" if run is None else job.claim,
            dead=dead,
            only_lost=dead and run is None,
        )
        if was_set and self._on_end:
            outcome = ended.error["code"] if ended.error else status
            self._on_end(job.spec.task, outcome, time.time() - job.created_s)

    async def _patiently(
        self, call: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any
    ) -> Any:
        """Try again as long as Redis or the storage is away."""
        pauses = _backoff()
        while True:
            try:
                return await call(*args, **kwargs)
            except JobsUnavailable as error:
                logger.warning("A worker waits: %s", error)
                await asyncio.sleep(next(pauses))


def _beats(run: _Run) -> list[Beat]:
    """What there is to say of a job: its claim, its progress, and perhaps a picture of it."""
    job_id, claim, told = run.job.spec.job_id, run.job.claim, run.progress
    if told is None or told is run.told:
        return [Beat(job_id, claim, {})]
    left_s = "" if told.left_s is None else f"{told.left_s:.2f}"
    fields = {"steps_done": str(told.steps_done), "steps": str(told.steps), "left_s": left_s}
    data = {
        "job_id": job_id,
        "status": "processing",
        "steps_done": told.steps_done,
        "steps": told.steps,
        "eta_s": None if told.left_s is None else round(told.left_s, 1),
    }
    beats = [Beat(job_id, claim, fields, "progress", json.dumps(data))]
    if told.preview is not None:
        picture = f"data:image/jpeg;base64,{base64.b64encode(told.preview).decode()}"
        data = {"job_id": job_id, "image": picture}
        beats.append(Beat(job_id, claim, {}, "preview", json.dumps(data)))
    return beats


def _backoff() -> Iterator[float]:
    """Pauses between attempts: doubled each time, with jitter."""
    pause_s = _AGAIN_S
    while True:
        yield pause_s * random.uniform(0.5, 1)  # noqa: S311 - so that not all return at once
        pause_s = min(pause_s * 2, _MOST_BACKOFF_S)


def _lost() -> ModelFailed:
    return ModelFailed(
        "The job lost its worker or its model each time it was tried.",
        value="lost too often",
        remedy="Retry it once; if it fails again, report the job's id.",
    )
