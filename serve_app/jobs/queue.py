"""The queue of jobs in Redis. Each change of a job is one script, so that it happens whole or not.

A job is `queued` in a line of its task and model, `processing` under a claim that its worker
renews, or has ended. A claim that is not renewed is void: the job goes back to the queue, and
whatever the lost worker still says of it is ignored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from deployments.errors import ModelFailed
from deployments.tasks import Task
from serve_app.jobs.connection import answered
from serve_app.jobs.record import STATUSES, Job, JobSpec
from serve_app.jobs.scripts import run_script

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from redis.asyncio import Redis

    from deployments.settings import JobSettings
    from serve_app.jobs.record import Status

_TASKS = json.dumps([str(task) for task in Task])
logger = logging.getLogger("ray.serve.imagen.jobs")


class Submitted(NamedTuple):
    """What became of a submission.

    Attributes:
        outcome: queued; same or conflict (the Idempotency-Key came before, with the same body or
            another one); full or share (of the whole queue, or of its owner).
        detail: id of the job, or of the first one; or how many are waiting.
        status: of that job at this moment; empty if there is none.
    """

    outcome: Literal["queued", "same", "conflict", "full", "share"]
    detail: str
    status: Status | Literal[""]


class Beat(NamedTuple):
    """What a worker says of a job that it runs.

    Attributes:
        job_id, claim: of the job.
        fields: of the record, to change.
        event: progress or preview; empty for none.
        data: of the event, JSON.
    """

    job_id: str
    claim: str
    fields: Mapping[str, str]
    event: str = ""
    data: str = ""


class Event(NamedTuple):
    """One entry of a job's event stream; its id orders it."""

    event_id: str
    name: str
    data: str


class Backlog(NamedTuple):
    """What is left to do beside the jobs.

    Attributes:
        dead: jobs that failed although nothing was wrong with them, and that are still kept.
        webhooks: jobs with an event that is not delivered yet.
        late_s: how long the first of these has been due; 0 if none is.
    """

    dead: int
    webhooks: int
    late_s: float


class JobQueue:
    """Jobs in Redis. Every method raises JobsUnavailable if Redis does not answer.

    Args:
        redis: the present connection, which returns text; raises JobsUnavailable without one.
        namespace: begins every key.
        keep_s: how long a job is kept after its end.
        lease_s: how long a claim holds without a heartbeat.
        max_kept: ended jobs of an owner.

    Attributes:
        seen: the `depth` when the metrics were told last; None if Redis was away.
    """

    def __init__(
        self,
        redis: Callable[[], Redis],
        namespace: str,
        *,
        keep_s: float,
        lease_s: float,
        max_kept: int = 10_000,
    ) -> None:
        self._redis = redis
        self.namespace = namespace
        self._keep_s = keep_s
        self._lease_s = lease_s
        self._max_kept = max_kept
        self.seen: dict[Task, tuple[int, int, float]] | None = None

    # --- for clients ---

    async def submit(
        self,
        spec: JobSpec,
        *,
        idempotency_key: str = "",
        max_queued: int,
        max_of_owner: int,
        only_check: bool = False,
    ) -> Submitted:
        """Accept a job, or find the first one with the same Idempotency-Key.

        Args:
            spec: what is asked for.
            idempotency_key: of the request; empty if it has none.
            max_queued: jobs that may wait.
            max_of_owner: jobs of this owner that may wait.
            only_check: whether to change nothing, and only tell what would become of it.
        """
        digest = hashlib.sha256(idempotency_key.encode()).hexdigest() if idempotency_key else ""
        outcome, detail, status = await self._run(
            "submit",
            spec.job_id,
            json.dumps(spec.fields()),
            _TASKS,
            max_queued,
            max_of_owner,
            digest,
            int(only_check),
        )
        return Submitted(outcome, detail, status)

    async def get(self, job_id: str) -> Job | None:
        """A job, or None if it is unknown or has expired."""
        jobs = await self.read([job_id])
        return jobs[0] if jobs else None

    async def read(self, job_ids: Sequence[str]) -> list[Job]:
        """Those of the jobs that exist."""
        if not job_ids:
            return []
        found = await self._run("read", *job_ids)
        jobs = [
            _loaded(found[i], int(found[i + 1]), int(found[i + 2]), found[i + 3])
            for i in range(0, len(found), 4)
            if found[i]
        ]
        return [job for job in jobs if job is not None]

    async def list(
        self, owner: str, status: Status | None, before: str, limit: int
    ) -> tuple[list[Job], str | None]:
        """A page of an owner's jobs, newest first.

        Args:
            owner: id of the API key.
            status: of the jobs; None for any.
            before: id after which the page begins; empty for the first page.
            limit: most jobs.

        Returns:
            The page, and the id before which the next one begins; None at the end.
        """
        index = self.key("jobs", owner, status) if status else self.key("jobs", owner)
        top = f"({before}" if before else "+"
        async with answered():
            ids: Any = await self._redis().zrevrangebylex(index, top, "-", 0, limit + 1)
        jobs = await self.read(ids[:limit])
        return jobs, ids[limit - 1] if len(ids) > limit else None

    async def finish(
        self,
        job_id: str,
        status: Status,
        fields: Mapping[str, str],
        view: str,
        *,
        claim: str = "",
        dead: bool = False,
        only_lost: bool = False,
    ) -> tuple[str, bool]:
        """End a job that has not ended.

        Args:
            job_id: of the job.
            status: completed, failed or canceled.
            fields: of the record, to set.
            view: the job as the API shows it then, JSON; for its webhook.
            claim: under which the caller runs it; empty ends it whoever runs it.
            dead: whether to list it among the dead letters.
            only_lost: whether to end it only if its claim was not renewed in time.

        Returns:
            The status that it has now (empty if it is unknown), and whether this call set it.
        """
        now, was_set = await self._run(
            "finish",
            job_id,
            claim,
            status,
            json.dumps(fields),
            view,
            self._keep_s,
            int(dead),
            int(only_lost),
            self._max_kept,
        )
        return now, bool(was_set)

    async def keep(
        self,
        kept_id: str,
        owner: str,
        pictures: int,
        *,
        most: int,
        seconds: float,
        only_check: bool = False,
    ) -> float:
        """Have the sweep forget pictures that belong to no job, unless their owner has too many.

        Args:
            kept_id: that their files lie under, like a job's id. Once kept, a second call changes
                when they are forgotten.
            owner: id of the API key.
            pictures: how many; at most `most`.
            most: pictures of an owner that are kept at a time.
            seconds: after which they are forgotten.
            only_check: whether to change nothing, and only tell whether there is room.

        Returns:
            0, or the seconds after which there is room.
        """
        args = (kept_id, owner, pictures, most, seconds, int(only_check))
        return float(await self._run("keep", *args))

    async def preview(self, job_id: str) -> str:
        """The picture of its latest step, as an event's data; empty if there is none."""
        async with answered():
            return str(await self._redis().get(self.key("preview", job_id)) or "")

    async def events(self, job_id: str, after: str = "") -> list[Event]:
        """Events of a job, oldest first; those after an event id if one is given."""
        async with answered():
            found: Any = await self._redis().xrange(
                self.key("events", job_id), min=f"({after}" if after else "-"
            )
        return [Event(event_id, entry["event"], entry["data"]) for event_id, entry in found]

    # --- for workers ---

    async def claim(
        self, room: Mapping[str, int], others: int = 0, others_after_s: float = 0
    ) -> list[Job]:
        """Take jobs to run.

        Args:
            room: how many of each line (see `record.line_of`), or of several lines together, whose
                names have spaces between them; 0 or more.
            others: how many of all the lines that `room` does not name.
            others_after_s: how long after their submission; until then they are left to others.
        """
        pairs = [text for lines, count in room.items() for text in (str(lines), count)]
        found = await self._run("claim", self._lease_s, others, others_after_s, *pairs)
        jobs = {found[i]: _loaded(found[i + 1]) for i in range(0, len(found), 2)}
        for job_id in (job_id for job_id, job in jobs.items() if job is None):
            await self.discard(job_id)
        return [job for job in jobs.values() if job is not None]

    async def discard(self, job_id: str) -> None:
        """End a job whose record this version of the application cannot read."""
        error = ModelFailed(
            "The job was made by another version of the service.",
            value=job_id,
            remedy="Submit it again.",
        )
        fields = {"error": json.dumps(error.details(job_id))}
        await self.finish(job_id, "failed", fields, json.dumps({"job_id": job_id}), dead=True)

    async def heartbeat(self, beats: Sequence[Beat]) -> set[str]:
        """Renew claims; returns the ids of jobs that the worker has no longer."""
        words: list[str] = []
        for beat in beats:
            words += [beat.job_id, beat.claim, beat.event, beat.data, json.dumps(beat.fields)]
        return set(await self._run("heartbeat", self._lease_s, *words)) if words else set()

    async def reap(self, attempts: int) -> list[tuple[str, Literal["lost", "late"]]]:
        """Put jobs of lost workers back into the queue; workers call it every second or so.

        A job that a model began `attempts` times has been lost too often, and so has one that
        workers took four times as often.

        After a while without a call, in which Redis was away, nothing happens for half a lease, so
        that workers can renew their claims first.

        Returns:
            Jobs that the caller must end, and why: their worker was lost too often, or their
            deadline has passed.
        """
        found = await self._run("reap", attempts, _TASKS, self._lease_s)
        return [(found[i], found[i + 1]) for i in range(0, len(found), 2)]

    async def sweep(self) -> list[str]:
        """Forget jobs, and what `keep` kept, whose time is over; the ids of at most 100."""
        return await self._run("sweep")

    async def depth(self) -> dict[Task, tuple[int, int, float]]:
        """For each task: jobs waiting, jobs running, seconds that the oldest has waited."""
        async with answered(), self._redis().pipeline(transaction=False) as pipe:
            pipe.time()
            for task in Task:
                pipe.zcard(self.key("queued", task))
                pipe.zcard(self.key("running", task))
                pipe.zrange(self.key("queued", task), 0, 0, withscores=True)
            clock, *found = await pipe.execute()
        now_s = clock[0] + clock[1] / 1e6
        depth: dict[Task, tuple[int, int, float]] = {}
        for i, task in enumerate(Task):
            waiting, running, oldest = found[3 * i : 3 * i + 3]
            depth[task] = waiting, running, now_s - oldest[0][1] if oldest else 0.0
        return depth

    async def webhook_master(self) -> bytes:
        """What the secrets of webhooks are derived from; drawn once, and kept in Redis."""
        name = self.key("webhook-master")
        async with answered():
            await self._redis().set(name, secrets.token_hex(32), nx=True)
            return bytes.fromhex(str(await self._redis().get(name)))

    async def backlog(self) -> Backlog:
        """Dead letters, and webhooks that wait."""
        async with answered(), self._redis().pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.zcard(self.key("dead"))
            pipe.zcard(self.key("outbox"))
            pipe.zrange(self.key("outbox"), 0, 0, withscores=True)
            clock, dead, webhooks, first = await pipe.execute()
        now_s = clock[0] + clock[1] / 1e6
        return Backlog(dead, webhooks, max(now_s - first[0][1], 0.0) if first else 0.0)

    # --- for operators ---

    async def dead(self, limit: int = 100) -> list[Job]:
        """Jobs that failed although nothing was wrong with them, newest first."""
        async with answered():
            ids: Any = await self._redis().zrevrange(self.key("dead"), 0, limit - 1)
        return await self.read(ids)

    async def bury(self, job_id: str) -> None:
        """Take a job off the list of dead letters."""
        async with answered():
            await self._redis().zrem(self.key("dead"), job_id)

    async def count(self, owner: str) -> dict[Status, int]:
        """An owner's jobs by status."""
        async with answered():
            return {
                status: await self._redis().zcard(self.key("jobs", owner, status))
                for status in STATUSES
            }

    def key(self, *parts: str) -> str:
        return ":".join((self.namespace, *parts))

    async def _run(self, script: str, *args: object) -> Any:
        return await run_script(self._redis(), ("common", script), self.namespace, *args)


def open_queue(redis: Callable[[], Redis], settings: JobSettings) -> JobQueue:
    """The queue of an application."""
    return JobQueue(
        redis,
        settings.namespace,
        keep_s=settings.keep_s,
        lease_s=settings.lease_s,
        max_kept=settings.max_kept,
    )


def _loaded(flat: Sequence[str], *place: Any) -> Job | None:
    """A job, or None if its record cannot be read: one must not stand in the way of others."""
    try:
        return Job.load(_pairs(flat), *place)
    except (ValueError, KeyError, TypeError):
        logger.exception("A record of a job cannot be read")
        return None


def _pairs(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
