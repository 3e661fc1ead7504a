"""A worker: takes jobs from the queue, and keeps them while it carries them to their ends.

It does no image work itself, so that one worker carries many jobs. It acknowledges last: whatever
it has not finished when it dies, another worker does again after `lease_s`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

from deployments.errors import JobsUnavailable, ModelFailed, too_late
from serve_app.jobs.carrier import AGAIN_S, Carrier
from serve_app.jobs.record import line_of
from serve_app.jobs.run import Run

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from deployments.catalogue import Registry
    from deployments.registry import ModelSpec
    from deployments.settings import JobSettings
    from deployments.tasks import Task
    from serve_app.jobs.carrier import Model
    from serve_app.jobs.files import JobFiles
    from serve_app.jobs.queue import JobQueue
    from serve_app.jobs.record import Job

_BEAT_S = 0.25
_REAP_S = 1.0
_UNSERVED = 4
"""Jobs at a time whose task or model is not served: each fails as soon as it is looked at."""
_LEAVE_S = 600.0
"""How long such jobs are left to others: while versions of the application change, one of them may
serve what the other one does not.
"""
_IDLE_S = 1.0
"""How long a worker with nothing to do waits for a word before it looks by itself."""
logger = logging.getLogger("ray.serve.imagen.jobs")


class Worker:
    """Carries jobs until it is cancelled.

    Args:
        queue: to take them from.
        files: of their pictures.
        models: by name.
        registry: what each model is.
        settings: of jobs.
        on_end: called with the task, outcome and seconds of each job that it ends. The outcome is
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
        # The lines of each model. One that is away holds up only those who wait for it.
        self._lines = {model.name: _lines(registry, model) for model in registry.models}
        self._served = {line: name for name, lines in self._lines.items() for line in lines}
        self._settings = settings
        self._carrier = Carrier(queue, files, models, registry, settings, on_end)
        self._runs: dict[str, Run] = {}
        self._wake = asyncio.Event()
        self._claiming = asyncio.Lock()
        self._is_draining = False

    async def run(self) -> None:
        """Work until cancelled. Survives a Redis that is away, and errors that nobody expects."""
        async with asyncio.TaskGroup() as loops:
            loops.create_task(self._forever(self._claim, 0))
            loops.create_task(self._forever(self._beat, _BEAT_S))
            loops.create_task(self._forever(self._reap, _REAP_S))

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
                await asyncio.sleep(AGAIN_S)
            await asyncio.sleep(AGAIN_S if is_away else pause_s)

    async def _claim(self) -> None:
        self._wake.clear()
        async with self._claiming:
            jobs = []
            if not self._is_draining:
                jobs = await self._queue.claim(*self._room(), _LEAVE_S)
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
        run = self._runs[job.spec.job_id] = Run(job, job.attempts, time.monotonic())
        run.work = asyncio.create_task(self._carry(run))

    def _room(self) -> tuple[dict[str, int], int]:
        """How many more jobs fit: of each model, by its lines, and of what is not served.

        Models and lines are in any order, so that none always goes first.
        """
        taken = Counter(self._served.get(run.job.spec.line, "") for run in self._runs.values())
        room = {
            " ".join(_shuffled(self._lines[name])): max(self._settings.per_model - taken[name], 0)
            for name in _shuffled(self._lines)
        }
        return room, max(_UNSERVED - taken[""], 0)

    async def _beat(self) -> None:
        now_s = time.monotonic()
        due_s = now_s - self._settings.lease_s / 3
        due = {
            job_id: (run, run.news)
            for job_id, run in self._runs.items()
            if run.news != run.told or run.beat_s < due_s
        }
        beats = [beat for run, _ in due.values() for beat in run.beats()]
        lost = await self._queue.heartbeat(beats)
        for job_id, (run, news) in due.items():
            # Only now, so that what Redis did not hear is said again.
            run.told, run.beat_s = news, now_s
            if job_id in lost:
                self._give_up(run)

    async def _reap(self) -> None:
        for job_id, why in await self._queue.reap(self._settings.attempts):
            job = await self._queue.get(job_id)
            if job is None:
                await self._queue.discard(job_id)
            else:
                error = too_late() if why == "late" else _lost()
                await self._carrier.fail(job, error, None, dead=why == "lost")

    def _give_up(self, run: Run) -> None:
        """Stop work on a job that has ended, or whose claim is another's now."""
        self._forget(run)
        if run.work is not None:
            run.work.cancel()

    def _forget(self, run: Run) -> None:
        if self._runs.get(run.job.spec.job_id) is run:
            del self._runs[run.job.spec.job_id]

    # --- one job ---

    async def _carry(self, run: Run) -> None:
        job_id = run.job.spec.job_id
        try:
            await self._carrier.carry(run)
        except asyncio.CancelledError:
            logger.info("Job %s was given up", job_id)
            raise
        except Exception:
            # Its claim is not renewed any more, so that another worker tries it.
            logger.exception("Job %s stopped", job_id)
        finally:
            self._forget(run)
            self._wake.set()


def _lines(registry: Registry, model: ModelSpec) -> list[str]:
    """Where jobs for a model wait: those that name it, and those of its task that name none."""
    lines = [line_of(model.task, model.name)]
    return [*lines, line_of(model.task)] if registry.is_default(model) else lines


def _shuffled(names: Iterable[str]) -> list[str]:
    given = list(names)
    return random.sample(given, len(given))


def _lost() -> ModelFailed:
    return ModelFailed(
        "The job lost its worker or its model each time it was tried.",
        value="lost too often",
        remedy="Retry it once; if it fails again, report the job's id.",
    )
