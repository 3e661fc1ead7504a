"""Jobs as the API offers them: submit, look, wait, follow, cancel, retry."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from deployments.errors import (
    Full,
    IdempotencyConflict,
    JobConflict,
    NoSuchJob,
    RateLimited,
)
from serve_app.jobs.files import open_job_files
from serve_app.jobs.kept import Kept
from serve_app.jobs.places import Places
from serve_app.jobs.queue import Event, open_queue
from serve_app.jobs.record import ENDED, is_job_id, job_view, new_job_id

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from deployments.settings import ClientJobSettings, JobSettings
    from deployments.tasks import Task
    from serve_app.jobs.connection import RedisLink
    from serve_app.jobs.files import JobFiles
    from serve_app.jobs.queue import JobQueue, Submitted
    from serve_app.jobs.record import Inputs, Job, JobSpec, Status
    from serve_app.jobs.signals import Signals

_LOOK_S = 5.0
"""How often whoever waits for a job looks at it without having been told."""
_RETRY_S = 2


class Accepted(NamedTuple):
    """What a submission led to.

    Attributes:
        job_id: of the new job, or of the first one with the same Idempotency-Key.
        status: of that job at this moment.
        is_new: whether this submission made it.
    """

    job_id: str
    status: Status
    is_new: bool


Charge = Callable[[int], Awaitable[None]]
"""Counts the pixels of a new job; may raise RateLimited."""


class Jobs:
    """The jobs of an application, for its routes. Raises JobsUnavailable while Redis is away.

    Args:
        queue: of the jobs.
        files: their pictures.
        signals: what happens to them; somebody must run its `listen`.
        settings: of jobs.
        clients: what clients may do with them.
        on_end: called with the task, outcome and seconds of each job that is canceled here.

    Attributes:
        kept: results of requests without a job.
        streams, downloads: places for those who follow a job, or fetch a picture from a folder.
    """

    def __init__(
        self,
        queue: JobQueue,
        files: JobFiles,
        signals: Signals,
        settings: JobSettings,
        clients: ClientJobSettings,
        on_end: Callable[[Task, str, float], object] | None = None,
    ) -> None:
        self.settings = settings
        self.clients = clients
        self.files = files
        self.queue = queue
        self._signals = signals
        self._on_end = on_end
        self.kept = Kept(queue, files, clients)
        self.streams = Places(clients.max_streams)
        self.downloads = Places(clients.max_streams)
        self._waits = Places(clients.max_waits)
        self._ask_first = True

    def under(self, clients: ClientJobSettings) -> Jobs:
        """The same jobs, for whom these settings hold; requests at hand keep theirs."""
        return Jobs(self.queue, self.files, self._signals, self.settings, clients, self._on_end)

    # --- submitting ---

    async def submit(
        self,
        spec: JobSpec,
        inputs: Inputs,
        *,
        idempotency_key: str = "",
        share: float = 1.0,
        charge: Charge | None = None,
    ) -> Accepted:
        """Accept a job: its pixels are charged, its picture is stored, and then it is queued.

        A repeated submission is known before anything is charged or stored. Only if the first one
        arrives at the same moment both are charged; `is_new` tells the caller which one to refund.

        Args:
            spec: what is asked for.
            inputs: the pictures that the client sent.
            idempotency_key: of the request; empty if it has none.
            share: of the queue that its owner may take.
            charge: called with the pixels of a new job; None charges nobody.

        Raises:
            IdempotencyConflict: the key came before, with another body.
            Full: the queue is full.
            RateLimited: the owner's share of the queue is, or `charge` refuses.
        """
        limit = self.clients.max_queued
        limits = {"max_queued": limit, "max_of_owner": max(int(limit * share), 1)}
        submit = partial(self.queue.submit, spec, idempotency_key=idempotency_key, **limits)
        # After a refusal, or with Redis away, the next ones cost no storage.
        if idempotency_key or self._ask_first:
            found = await submit(only_check=True)
            if found.outcome != "queued":
                return _other(found)
        if charge is not None:
            await charge(spec.charged_px)
        return await self._store_and_queue(spec, inputs, submit)

    async def _store_and_queue(
        self, spec: JobSpec, inputs: Inputs, submit: Callable[[], Awaitable[Submitted]]
    ) -> Accepted:
        for name, file in inputs.files.items():
            await self.files.put_input(spec.job_id, file, name)
        self._ask_first = True
        found = await submit()
        self._ask_first = found.outcome not in ("queued", "same")
        if found.outcome == "queued":
            return Accepted(found.detail, found.status or "queued", is_new=True)
        if inputs.files:
            await self.files.delete(spec.job_id)
        return _other(found)

    async def retry(
        self,
        owner: str,
        job_id: str,
        request_id: str,
        *,
        idempotency_key: str = "",
        share: float = 1.0,
        charge: Charge | None = None,
    ) -> Accepted:
        """Queue a failed or canceled job anew, as a new job.

        Args:
            owner: of the job.
            job_id: of the job.
            request_id: for the log.
            idempotency_key, share, charge: see `submit`.

        Raises:
            NoSuchJob, IdempotencyConflict, Full, RateLimited: see `get` and `submit`.
            JobConflict: it has not ended, or is completed.
        """
        job = await self.get(owner, job_id)
        if job.status not in ("failed", "canceled"):
            raise _conflict(job, "retried", "Wait for its end, or submit it again.")
        inputs = await self.files.inputs(job.spec)
        spec = replace(
            job.spec,
            job_id=new_job_id(),
            retry_of=job_id,
            request_id=request_id,
            fingerprint=f"retry of {job_id}",
        )
        return await self.submit(
            spec, inputs, idempotency_key=idempotency_key, share=share, charge=charge
        )

    # --- looking ---

    async def get(self, owner: str, job_id: str) -> Job:
        """A job of this owner.

        Raises:
            NoSuchJob: it is unknown, expired, or another owner's.
        """
        job = await self.queue.get(job_id) if is_job_id(job_id) else None
        if job is None or job.spec.owner != owner:
            raise NoSuchJob(
                "There is no such job.",
                value=job_id[:64],
                remedy="Check the id and the API key. Jobs are forgotten"
                f" {self.settings.keep_s / 86_400:g} days after their end.",
            )
        return job

    async def list(
        self, owner: str, status: Status | None, cursor: str, limit: int
    ) -> tuple[list[Job], str | None]:
        """A page of this owner's jobs, newest first, and the cursor of the next page."""
        return await self.queue.list(owner, status, cursor, limit)

    async def completed(self, owner: str, job_id: str, k: int) -> Job:
        """A job of this owner that has a k-th result, from 0.

        Raises:
            NoSuchJob: see `get`; or it has no such result.
            JobConflict: it is not completed.
        """
        job = await self.get(owner, job_id)
        if job.status != "completed":
            raise _conflict(job, "read", "Wait until it is completed.")
        if k >= len(job.results):
            raise NoSuchJob(
                "The job has no such result.",
                value=k,
                remedy=f"Its results are 0 to {len(job.results) - 1}.",
            )
        return job

    async def link(self, owner: str, job_id: str, k: int) -> str:
        """A fresh link to a result; raises as `completed`."""
        await self.completed(owner, job_id, k)
        return await self.files.link(job_id, k, self.clients.link_s)

    def view(self, job: Job, prefix: str = "") -> dict[str, Any]:
        """A job as clients see it."""
        return job_view(job, self.settings.keep_s, self.settings.gpu_second_price, prefix)

    # --- changing ---

    async def cancel(self, owner: str, job_id: str) -> Job:
        """End a job; whoever runs it is told. Does nothing if it is canceled already.

        Raises:
            NoSuchJob: see `get`.
            JobConflict: it is completed or failed.
        """
        job = await self.get(owner, job_id)
        ended = replace(job, status="canceled", ended_s=time.time(), position=0)
        view = json.dumps(self.view(ended))
        now, was_set = await self.queue.finish(job_id, "canceled", {}, view)
        if was_set and self._on_end:
            self._on_end(job.spec.task, "canceled", time.time() - job.created_s)
        job = await self.get(owner, job_id)
        if now != "canceled":
            raise _conflict(job, "canceled", "Nothing is left to cancel.")
        return job

    # --- waiting ---

    async def wait(self, owner: str, job_id: str, seconds: float, share: float = 1.0) -> Job:
        """A job as it is at its end, or after so many seconds.

        Args:
            owner: of the job.
            job_id: of the job.
            seconds: to wait at most.
            share: of all places to wait that the owner may take.

        Raises:
            Full: too many others wait.
            RateLimited: the owner's share is taken.
        """
        until_s = time.monotonic() + seconds
        with self._waits.take(owner, share), self._signals.about(job_id) as word:
            while True:
                word.clear()
                job = await self.get(owner, job_id)
                left_s = until_s - time.monotonic()
                if job.has_ended or left_s <= 0:
                    return job
                await _set_within(word, min(left_s, _LOOK_S))

    async def follow(
        self, owner: str, job_id: str, after: str, share: float = 1.0
    ) -> AsyncGenerator[Event | None]:
        """Events of a job until it has ended; None now and then, while nothing happens.

        Args:
            owner: of the job.
            job_id: of the job.
            after: id of the last event that the client has; empty for all.
            share: of all streams that the owner may take.

        Raises:
            Full: there are too many streams.
            RateLimited: the owner's share is taken.
        """
        with self.streams.take(owner, share), self._signals.about(job_id) as word:
            shown = ""
            while True:
                word.clear()
                job = await self.get(owner, job_id)
                for event in await self.queue.events(job_id, after):
                    yield event
                    after = event.event_id
                    if event.name in ENDED:
                        return
                latest = await self.queue.preview(job_id) if job.spec.preview else ""
                if latest not in ("", shown):
                    shown = latest
                    yield Event("", "preview", latest)
                if job.has_ended:
                    return  # the client has had its last event
                if not await _set_within(word, min(_LOOK_S, self.clients.stream_s)):
                    yield None


def open_jobs(
    link: RedisLink,
    signals: Signals,
    settings: JobSettings,
    clients: ClientJobSettings,
    on_end: Callable[[Task, str, float], None] | None = None,
) -> Jobs:
    """The jobs behind a link to Redis, with their pictures where the settings say."""
    queue, files = open_queue(link, settings), open_job_files(settings)
    return Jobs(queue, files, signals, settings, clients, on_end)


async def _set_within(word: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await word.wait()
    except TimeoutError:
        return False


def _other(found: Submitted) -> Accepted:
    """What a submission that made no job comes to: the first one with its key, or an error."""
    outcome, detail, status = found
    if outcome == "same":
        return Accepted(detail, status or "queued", is_new=False)
    if outcome == "conflict":
        raise IdempotencyConflict(
            "This Idempotency-Key came before with another request.",
            value=f"job {detail}",
            remedy="Use a new key for each request, and repeat a request unchanged.",
        )
    kind, whose = (
        (RateLimited, "your share of the queue") if outcome == "share" else (Full, "the queue")
    )
    raise kind(
        f"No more jobs fit {whose}.",
        value=f"{detail} waiting",
        remedy="Try again after Retry-After seconds.",
        retry_after_s=_RETRY_S,
    )


def _conflict(job: Job, what: str, remedy: str) -> JobConflict:
    return JobConflict(f"A {job.status} job cannot be {what}.", value=job.status, remedy=remedy)
