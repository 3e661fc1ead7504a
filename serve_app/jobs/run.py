"""A job that a worker carries, and what the worker says of it while it runs."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve_app.jobs.queue import Beat

if TYPE_CHECKING:
    import asyncio

    from deployments.contract import JobProgress
    from serve_app.jobs.record import Job


@dataclass(slots=True, eq=False)
class Run:
    """A job at hand.

    Attributes:
        job: as it was claimed.
        failed: attempts of a model that came to nothing, of all workers.
        beat_s: when the last heartbeat was.
        is_taken: whether a model has begun it now.
        work: the task that carries it.
        progress: as the model told it last; None before it did.
        told: what the last heartbeat said of progress and attempts.
    """

    job: Job
    failed: int
    beat_s: float
    is_taken: bool = False
    work: asyncio.Task[None] | None = None
    progress: JobProgress | None = None
    told: tuple[JobProgress | None, int] = None, 0

    def __post_init__(self) -> None:
        self.told = None, self.failed

    @property
    def attempts(self) -> int:
        """How often a model began it, of all workers; one that turned out to be busy did not."""
        return self.failed + self.is_taken

    @property
    def news(self) -> tuple[JobProgress | None, int]:
        """What a heartbeat would say now."""
        return self.progress, self.attempts

    def beats(self) -> list[Beat]:
        """What there is to say: the claim, attempts, progress, and perhaps a picture of it."""
        job_id, claim, progress = self.job.spec.job_id, self.job.claim, self.progress
        fields = {"attempts": str(self.attempts)}
        if progress is None or progress is self.told[0]:
            return [Beat(job_id, claim, fields)]
        left_s = "" if progress.left_s is None else f"{progress.left_s:.2f}"
        steps = {"steps_done": progress.steps_done, "steps": progress.steps}
        fields |= {name: str(count) for name, count in steps.items()} | {"left_s": left_s}
        eta_s = None if progress.left_s is None else round(progress.left_s, 1)
        data = {"job_id": job_id, "status": "processing"} | steps | {"eta_s": eta_s}
        beats = [Beat(job_id, claim, fields, "progress", json.dumps(data))]
        if progress.preview is not None:
            picture = f"data:image/jpeg;base64,{base64.b64encode(progress.preview).decode()}"
            shown = json.dumps({"job_id": job_id, "image": picture})
            beats.append(Beat(job_id, claim, {}, "preview", shown))
        return beats
