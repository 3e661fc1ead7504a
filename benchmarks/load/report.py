"""What a run measured: a record of each request, and what they add up to."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from benchmarks.load.plan import Plan, Protocol, Scalar
from deployments.errors import ConfigError
from deployments.settings import Strict

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

SCHEMA = 1
Outcome = Literal[
    "ok", "refused", "no_picture", "timeout", "disconnected", "connection_error", "unfinished"
]
OUTCOMES: tuple[Outcome, ...] = (
    "ok",
    "refused",
    "no_picture",
    "timeout",
    "disconnected",
    "connection_error",
    "unfinished",
)


class Record(Strict):
    """One request.

    Attributes:
        index: in the plan.
        task: or path.
        size: of the photo, in px.
        parameters: as sent.
        due_s: after the start: the scheduled arrival (open), or when it was sent (closed).
        sent_s: when the generator got to it, after the start.
        latency_s: from `due_s` to the last byte of the answer, or to giving up.
        unloaded_s: the same request's latency on the idle server, where that was measured.
        leaves: its client was to leave early, and did unless the outcome is another.
        outcome: ok; refused (any status but 200); no_picture (a 200 without one); timeout;
            disconnected (on purpose); connection_error; unfinished (the run was stopped).
        status: HTTP's.
        code: of the problem, else `HTTP 500`, or the name of the connection's error.
        detail: of a refusal, shortened.
        batch_size: of the forward pass; None where the server does not say.
        gpu_seconds: likewise.
        stages_s: Server-Timing.
    """

    index: int
    task: str
    size: tuple[int, int]
    parameters: dict[str, Scalar]
    due_s: float
    sent_s: float
    latency_s: float
    unloaded_s: float | None = None
    leaves: bool = False
    outcome: Outcome
    status: int | None = None
    code: str | None = None
    detail: str = ""
    batch_size: int | None = None
    gpu_seconds: float | None = None
    stages_s: dict[str, float] = Field(default={})

    @property
    def slowdown(self) -> float | None:
        """Latency over unloaded latency."""
        return self.latency_s / self.unloaded_s if self.unloaded_s else None


class Spread(Strict):
    """Of a quantity over requests; percentiles interpolate linearly between the nearest two."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float


class Summary(Strict):
    """Of some requests.

    Attributes:
        outcomes: how many ended in which way.
        refusals: the refused and the pictureless ones by code.
        latency_s: of the pictures; without clients that were to leave, of which only the quick
            ones get any.
        slowdown: likewise, where unloaded latency is known.
    """

    outcomes: dict[Outcome, int]
    refusals: dict[str, int]
    latency_s: Spread | None
    slowdown: Spread | None


class Machine(Strict):
    """Where the load was made; the server's too, if its address is this machine's.

    Attributes:
        processor, platform, python: what it is.
        cores: this process may use.
        load_before, load_after: average of the last minute.
        generator_cpu_share: CPU seconds of this process over those of one core; near 1 it was busy
            itself, and measured itself.
    """

    processor: str
    platform: str
    python: str
    cores: int
    load_before: float
    load_after: float
    generator_cpu_share: float


class Report(Strict):
    """Everything about a run.

    Attributes:
        schema_version: of this document; changes when a key changes its meaning.
        plan: as it ran, with what the command line changed.
        url, protocol: the server.
        started: ISO 8601, UTC.
        interrupted: it was stopped early; what was under way is `unfinished`.
        wall_s: from the first due request to the last answer.
        machine: where the load was made.
        total: of all counted requests.
        tasks: the same for each task.
        images_per_s: pictures over `wall_s`.
        send_lag_s: how late the generator sent, which open plans count as latency.
        batch_sizes: pictures by the rows of their passes (the mean of each), where the server says.
        stages_s: mean of each Server-Timing stage.
        gpu_seconds: of all pictures; None if not measured.
        usd_per_gpu_hour: the price that was given.
        usd_per_1000_images: at that price, for the GPU time of the pictures themselves.
        unloaded_s: unloaded latency by request.
        records: every request, in order.
    """

    schema_version: Literal[1] = SCHEMA
    plan: Plan
    url: str
    protocol: Protocol
    started: str
    interrupted: bool
    wall_s: float
    machine: Machine
    total: Summary
    tasks: dict[str, Summary]
    images_per_s: float
    send_lag_s: Spread | None
    batch_sizes: dict[int, int]
    stages_s: dict[str, float]
    gpu_seconds: float | None
    usd_per_gpu_hour: float | None
    usd_per_1000_images: float | None
    unloaded_s: dict[int, float]
    records: tuple[Record, ...]

    @property
    def succeeded(self) -> int:
        """How many requests got a picture."""
        return self.total.outcomes["ok"]


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of the values that are known; None if none is."""
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return None
    p50, p95, p99 = (float(p) for p in np.percentile(known, (50, 95, 99)))
    mean, top = float(known.mean()), float(known.max())
    return Spread(count=len(known), mean=mean, p50=p50, p95=p95, p99=p99, max=top)


def summarise(records: Sequence[Record]) -> Summary:
    """Counts and latencies of some requests."""
    outcomes = Counter(record.outcome for record in records)
    refused = [r for r in records if r.outcome in ("refused", "no_picture")]
    judged = [r for r in records if r.outcome == "ok" and not r.leaves]
    return Summary(
        outcomes={outcome: outcomes[outcome] for outcome in OUTCOMES},
        refusals=dict(Counter(str(record.code) for record in refused).most_common()),
        latency_s=spread(record.latency_s for record in judged),
        slowdown=spread(record.slowdown for record in judged),
    )


def derive(records: Sequence[Record], wall_s: float, usd_per_gpu_hour: float | None) -> Any:
    """The fields of a report that follow from its records."""
    done = [record for record in records if record.outcome == "ok"]
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    sizes = Counter(record.batch_size for record in done if record.batch_size is not None)
    gpu_seconds = sum(record.gpu_seconds or 0 for record in done) or None
    cost = None
    if usd_per_gpu_hour is not None and gpu_seconds is not None:
        cost = gpu_seconds / len(done) / 3600 * usd_per_gpu_hour * 1000
    return {
        "total": summarise(records),
        "tasks": {task: summarise(rows) for task, rows in sorted(by_task.items())},
        "images_per_s": len(done) / wall_s if wall_s else 0.0,
        "send_lag_s": spread(record.sent_s - record.due_s for record in records),
        "batch_sizes": dict(sorted(sizes.items())),
        "stages_s": _mean_stages([record.stages_s for record in done]),
        "gpu_seconds": gpu_seconds,
        "usd_per_gpu_hour": usd_per_gpu_hour,
        "usd_per_1000_images": cost,
    }


def _mean_stages(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    known = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: float(np.mean(values)) for name, values in known.items()}


def load_report(path: Path) -> Report:
    """A report that was written as JSON.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # pydantic's ValidationError is a ValueError
        reason = "it is no report" if isinstance(error, ValidationError) else "no such file"
        raise ConfigError(
            f"The report cannot be read: {reason}.",
            value=path,
            remedy="Name a file that `imagen bench --json` wrote.",
        ) from error


def unloaded_of(path: Path, plan: Plan) -> dict[int, float]:
    """Unloaded latencies that an earlier run of the same requests measured.

    Raises:
        ConfigError: it measured none, or its requests were others.
    """
    report = load_report(path)
    if report.plan.fingerprint != plan.fingerprint:
        raise ConfigError(
            "The report is of other requests, so that its unloaded latencies do not fit.",
            value=path,
            remedy="Use one of the same seed, photo, sizes and mix, or measure anew.",
        )
    if not report.unloaded_s:
        raise ConfigError(
            "The report holds no unloaded latencies.",
            value=path,
            remedy="Make one from a plan with `slowdown: true`.",
        )
    return report.unloaded_s
