"""What is known of a job: what the client asked for, how far it is, and how it ended."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from deployments.contract import ImageJob, parse
from deployments.notes import Note
from deployments.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deployments.contract import OutputFormat

Status = Literal["queued", "processing", "completed", "failed", "canceled"]
STATUSES: tuple[Status, ...] = get_args(Status)
ENDED = frozenset({"completed", "failed", "canceled"})
Priority = Literal["interactive", "batch"]
InputName = Literal["image", "background", "mask"]
_ID_DIGITS = 32


class Inputs(NamedTuple):
    """The pictures that a client sent for a job, as files; None if there is none."""

    image: bytes | None = None
    background: bytes | None = None
    mask: bytes | None = None

    @property
    def files(self) -> dict[InputName, bytes]:
        """Those that there are, by the name under which they are stored."""
        named: dict[InputName, bytes | None]
        named = {"image": self.image, "background": self.background, "mask": self.mask}
        return {name: file for name, file in named.items() if file is not None}


def new_job_id() -> str:
    """32 hex digits that sort by time (as UUID version 7 does, RFC 9562) and cannot be guessed."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


def line_of(task: Task, model: str = "") -> str:
    """The line of the queue in which jobs of a task wait.

    Args:
        task: of the jobs.
        model: that they name; empty for those that name none.
    """
    return f"{task}@{model}" if model else str(task)


def is_job_id(text: str) -> bool:
    """Whether a text has the form of a job id."""
    return len(text) == _ID_DIGITS and set(text) <= set("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a client asked for; never changes.

    Attributes:
        job_id: 32 hex digits.
        owner: id of the API key.
        task: of the table of tasks.
        request: the fields that the client set, and the seed.
        output_format: of the results.
        width_px, height_px: of the picture, upright; 0 without one.
        has_image: whether there is a picture in storage.
        image_bytes: of all files that the client sent; 0 without one.
        background_px: width x height of a background picture in storage; 0 without one.
        has_mask: whether there is a mask in storage.
        model: that the client named; empty for the default of the task, when the job runs.
        n: results, of seeds that follow one another.
        priority: interactive or batch.
        deadline_s: after its submission, when the job must have ended.
        preview: whether events carry small pictures.
        webhook: URL; empty for none.
        webhook_events: statuses that it is told.
        fingerprint: of the whole request, to compare repeated ones.
        request_id: of the submission, for the log.
        retry_of: the job that this one repeats; empty if none.
        notes: of what was chosen when it was submitted.
    """

    job_id: str
    owner: str
    task: Task
    request: dict[str, Any]
    output_format: OutputFormat
    width_px: int
    height_px: int
    has_image: bool
    image_bytes: int = 0
    model: str = ""
    background_px: int = 0
    has_mask: bool = False
    n: int = 1
    priority: Priority = "interactive"
    deadline_s: float = 86_400
    preview: bool = False
    webhook: str = ""
    webhook_events: tuple[str, ...] = ()
    fingerprint: str = ""
    request_id: str = ""
    retry_of: str = ""
    notes: tuple[Note, ...] = ()

    @property
    def charged_px(self) -> int:
        """Pixels that count for the owner's limit."""
        pictures = self.n + self.has_mask
        return self.width_px * self.height_px * pictures + self.background_px

    @property
    def line(self) -> str:
        """Where it waits in the queue, see `line_of`."""
        return line_of(self.task, self.model)

    def fields(self) -> dict[str, str]:
        """As Redis keeps it: scripts read what stands beside `spec`."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {
            "spec": json.dumps(values),
            "owner": self.owner,
            "task": self.task,
            "line": self.line,
            "priority": self.priority,
            "deadline_s": f"{self.deadline_s:.3f}",
            "webhook": self.webhook,
            "webhook_events": ",".join(self.webhook_events),
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def load(cls, text: str) -> JobSpec:
        # While versions of the application change, one reads what the other one wrote.
        values = {name: v for name, v in json.loads(text).items() if name in cls.__slots__}
        values["task"] = Task(values["task"])
        values["webhook_events"] = tuple(values["webhook_events"])
        values["notes"] = tuple(Note(*one) for one in values.get("notes", ()))
        return cls(**values)

    def image_job(self, inputs: Inputs, timeout_s: float) -> ImageJob:
        """What a model gets.

        Args:
            inputs: the pictures that the client sent.
            timeout_s: until the deadline.

        Raises:
            InvalidParameter: the request class has changed since, so that the request is refused.
        """
        return ImageJob(
            request=parse(self.task.request, self.request),
            image=inputs.image,
            output_format=self.output_format,
            timeout_s=timeout_s,
            request_id=self.job_id,
            job_id=self.job_id,
            width_px=self.width_px,
            height_px=self.height_px,
            sent_unix_s=time.time(),
            n=self.n,
            preview=self.preview,
            notes=self.notes,
            background=inputs.background,
            background_px=self.background_px,
            mask=inputs.mask,
        )


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it is now. Times are seconds since 1970 on Redis's clock.

    Attributes:
        spec: what was asked for.
        status: see `Status`.
        claim: counts the workers that took it; only the last one may end it.
        attempts: how often a model began it.
        created_s, started_s, ended_s: None if not yet.
        steps_done, steps: of its passes; 0 until it runs.
        left_s: estimate of the model; None if unknown.
        results: one document for each result, see `result_document`.
        timings_s: seconds by stage.
        gpu_seconds: share of a GPU's time.
        error: problem details; None unless failed.
        position: in the queue, from 1; 0 unless queued.
        running: jobs of its task that run now.
        pace_s: mean seconds of a job of its task; None if unknown.
    """

    spec: JobSpec
    status: Status
    claim: str
    attempts: int
    created_s: float
    started_s: float | None = None
    ended_s: float | None = None
    steps_done: int = 0
    steps: int = 0
    left_s: float | None = None
    results: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    timings_s: dict[str, float] = field(default_factory=dict[str, float])
    gpu_seconds: float = 0.0
    error: dict[str, Any] | None = None
    position: int = 0
    running: int = 0
    pace_s: float | None = None

    @classmethod
    def load(
        cls, record: Mapping[str, str], position: int = 0, running: int = 0, pace: str = ""
    ) -> Job:
        """From the fields in Redis."""

        def seconds(name: str) -> float | None:
            return float(record[name]) if record.get(name) else None

        status: Any = record["status"]
        return cls(
            spec=JobSpec.load(record["spec"]),
            status=status,
            claim=record.get("claim", "0"),
            attempts=int(record.get("attempts", 0)),
            created_s=float(record["created"]),
            started_s=seconds("started"),
            ended_s=seconds("ended"),
            steps_done=int(record.get("steps_done", 0)),
            steps=int(record.get("steps", 0)),
            left_s=seconds("left_s"),
            results=json.loads(record.get("results") or "[]"),
            timings_s=json.loads(record.get("timings_s") or "{}"),
            gpu_seconds=float(record.get("gpu_seconds") or 0),
            error=json.loads(record.get("error") or "null"),
            position=position,
            running=running,
            pace_s=float(pace) if pace else None,
        )

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    @property
    def eta_s(self) -> float | None:
        """Seconds until it will have ended, about; None if unknown."""
        if self.status == "processing":
            return self.left_s if self.left_s is not None else self.pace_s
        if self.status != "queued" or self.pace_s is None:
            return None
        return self.pace_s * (1 + self.position / max(self.running, 1))


def timestamp(unix_s: float | None) -> str | None:
    """An instant by RFC 3339, in milliseconds."""
    if unix_s is None:
        return None
    instant = datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds")
    return instant.replace("+00:00", "Z")


def job_view(job: Job, keep_s: float, price: float | None, prefix: str = "") -> dict[str, Any]:
    """A job as clients see it (docs/jobs.md), ready for JSON.

    Args:
        job: to show.
        keep_s: how long it is kept after its end.
        price: of a GPU second; None shows no cost.
        prefix: below which the application is served.
    """
    spec, base = job.spec, f"{prefix}/api/v1/jobs/{job.spec.job_id}"
    eta_s = job.eta_s
    return {
        "job_id": spec.job_id,
        "status": job.status,
        "task": str(spec.task),
        "model": spec.model or None,
        "priority": spec.priority,
        "created_at": timestamp(job.created_s),
        "started_at": timestamp(job.started_s),
        "ended_at": timestamp(job.ended_s),
        "expires_at": timestamp(job.ended_s + keep_s) if job.ended_s else None,
        "deadline_at": timestamp(job.created_s + spec.deadline_s),
        "position": job.position or None,
        "steps_done": job.steps_done,
        "steps": job.steps,
        "eta_s": None if eta_s is None else round(eta_s, 1),
        "attempts": job.attempts,
        "timings_s": _timings_s(job),
        "gpu_seconds": round(job.gpu_seconds, 4),
        "cost": None if price is None else round(job.gpu_seconds * price, 6),
        "error": job.error,
        "webhook": _webhook(spec),
        "retry_of": spec.retry_of or None,
        "n": spec.n,
        "request": spec.request,
        "results": [
            {"url": f"{base}/results/{k}", **document} for k, document in enumerate(job.results)
        ],
        "links": {"self": base, "events": f"{base}/events", "result": f"{base}/result"},
    }


def _timings_s(job: Job) -> dict[str, float]:
    """Seconds by stage: those of the model, the wait in the queue, and all of it."""
    timings_s = dict(job.timings_s)
    if job.started_s is not None:
        timings_s["queue"] = job.started_s - job.created_s
    if job.ended_s is not None:
        timings_s["total"] = job.ended_s - job.created_s
    return {stage: round(seconds, 3) for stage, seconds in timings_s.items()}


def _webhook(spec: JobSpec) -> dict[str, Any] | None:
    return {"url": spec.webhook, "events": list(spec.webhook_events)} if spec.webhook else None
