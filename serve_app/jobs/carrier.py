"""What a worker does with one job: picture in, model, results out, end."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from deployments.contract import ImageResult, JobProgress
from deployments.errors import (
    Full,
    ImagenError,
    JobsUnavailable,
    ModelFailed,
    NotReady,
    ServiceError,
)
from serve_app.jobs.budget import Budget
from serve_app.jobs.record import job_view
from serve_app.jobs.results import document_of, longest_s

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping

    from deployments.catalogue import Registry
    from deployments.contract import ImageJob
    from deployments.settings import JobSettings
    from deployments.tasks import Task
    from serve_app.jobs.files import JobFiles
    from serve_app.jobs.queue import JobQueue
    from serve_app.jobs.record import Inputs, Job, Status
    from serve_app.jobs.run import Run

AGAIN_S = 1.0
"""After an error, before the first try again."""
_MOST_BACKOFF_S = 30.0
logger = logging.getLogger("ray.serve.imagen.jobs")


class Model(Protocol):
    """Whatever runs one model. Raises only errors of our own tree."""

    def stream(self, job: ImageJob) -> AsyncGenerator[JobProgress | tuple[ImageResult, ...]]:
        """Tells how far a request is; the results come last."""
        ...


class Carrier:
    """Brings jobs to their ends, however often Redis, the storage or a model is away meanwhile.

    Args:
        queue: where their ends are written.
        files: of their pictures.
        models: by name.
        registry: what each model is.
        settings: of jobs.
        on_end: called with the task, outcome and seconds of each job that ends here. The outcome is
            completed, or the code of the error.
    """

    def __init__(
        self,
        queue: JobQueue,
        files: JobFiles,
        models: Mapping[str, Model],
        registry: Registry,
        settings: JobSettings,
        on_end: Callable[[Task, str, float], object] | None = None,
    ) -> None:
        self._queue = queue
        self._files = files
        self._models = models
        self._registry = registry
        self._settings = settings
        self._on_end = on_end
        # One for each model, so that a slow one holds up no other.
        part_bytes = settings.max_held_bytes // max(len(models), 1)
        self._budgets = {name: Budget(part_bytes) for name in models}

    async def carry(self, run: Run) -> None:
        """Bring a job to its end."""
        is_first = int(run.job.claim) == 1
        documents = None if is_first else await self._stored(run.job)
        try:
            if documents is None:
                documents = await self._made(run, is_first=is_first)
        except ImagenError as error:
            await self.fail(run.job, error, run, dead=isinstance(error, ServiceError))
        else:
            await self._complete(run, documents)

    async def fail(self, job: Job, error: ImagenError, run: Run | None, *, dead: bool) -> None:
        """End a job with an error.

        Args:
            job: to end.
            error: why.
            run: of the job; None ends it whoever has it.
            dead: whether it is a dead letter.
        """
        request_id = job.spec.request_id or job.spec.job_id
        await self._end(job, "failed", run, error=error.details(request_id), dead=dead)

    async def _stored(self, job: Job) -> list[dict[str, Any]] | None:
        """What a worker that died after it had stored all results left; None if it had not."""
        found = [
            await self._patiently(self._files.result_document, job.spec.job_id, k)
            for k in range(job.spec.n)
        ]
        return [one for one in found if one is not None] if all(found) else None

    async def _made(self, run: Run, *, is_first: bool) -> list[dict[str, Any]]:
        """Results of the model, stored; their documents.

        Raises:
            RequestError: nothing will ever come of this job, or its model is not served any more.
            ServiceError: it was tried as often as jobs are.
        """
        spec, put = run.job.spec, self._files.put_result
        name = self._registry.choose(spec.task, spec.model or None).name
        async with self._budgets[name].hold(spec.image_bytes) as take:
            inputs = await self._patiently(self._files.inputs, spec)
            results = await self._on_model(run, self._models[name], inputs)
            take(sum(len(result.image) for result in results))
            documents = [document_of(result) for result in results]
            for k, (result, document) in enumerate(zip(results, documents, strict=True)):
                await self._patiently(put, spec.job_id, k, result.image, document)
        # What another worker has stored before stays, and is what the job is about.
        return (None if is_first else await self._stored(run.job)) or documents

    async def _on_model(self, run: Run, model: Model, inputs: Inputs) -> tuple[ImageResult, ...]:
        pauses = _backoff()
        while True:
            try:
                return await self._once(run, model, inputs)
            except Full as error:  # the model is busy, which is no fault, and has not begun it
                run.is_taken = False
                await asyncio.sleep(min(error.retry_after_s or AGAIN_S, next(pauses)))
            except ServiceError as error:
                # Without a replica the job waits. One that loses the replicas that take it does not
                # go on for ever, because it may be the cause.
                counts = run.is_taken or not isinstance(error, NotReady)
                run.is_taken = False
                run.failed += counts
                if counts and run.failed >= self._settings.attempts:
                    raise
                logger.warning("Job %s is tried again: %s", run.job.spec.job_id, error)
                await asyncio.sleep(next(pauses))

    async def _once(self, run: Run, model: Model, inputs: Inputs) -> tuple[ImageResult, ...]:
        job = run.job.spec.image_job(inputs, self._timeout_s(run.job))
        async with aclosing(model.stream(job)) as answers:
            async for told in answers:
                run.is_taken = True
                if not isinstance(told, JobProgress):
                    return told
                if told.steps:
                    run.progress = told
        raise ModelFailed("The model gave no result.", value="none", remedy="Try again.")

    def _timeout_s(self, job: Job) -> float:
        """How long a run may take. The model chooses the detail of a picture by it."""
        left_s = job.created_s + job.spec.deadline_s - time.time()
        return min(self._settings.run_timeout_s, max(left_s, 1.0))

    async def _complete(self, run: Run, documents: list[dict[str, Any]]) -> None:
        details = [document["metadata"] for document in documents]
        await self._end(
            run.job,
            "completed",
            run,
            results=documents,
            timings_s=longest_s([one["timings_s"] for one in details]),
            gpu_seconds=sum(one["gpu_seconds"] for one in details),
        )

    async def _end(
        self, job: Job, status: Status, run: Run | None, *, dead: bool = False, **found: Any
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


def _backoff() -> Iterator[float]:
    """Pauses between attempts: doubled each time, with jitter."""
    pause_s = AGAIN_S
    while True:
        yield pause_s * random.uniform(0.5, 1)  # noqa: S311 - so that not all return at once
        pause_s = min(pause_s * 2, _MOST_BACKOFF_S)
