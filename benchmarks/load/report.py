"""The results of a run: a record of each request, and figures over all of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

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
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class Record(Strict):
    """One request.

    Attributes:
        index: in the plan.
        task: or path.
        size: of the photo, in px.
        parameters: as sent.
        due_s: seconds after the start: the scheduled arrival (open) or the sending (closed).
        sent_s: when the generator sent it, in seconds after the start.
        latency_s: from `due_s` to the last byte of the answer, or to giving up.
        unloaded_s: its latency on the idle server, if measured.
        leaves: whether its client was to leave early; it did if the outcome is `disconnected`.
        outcome: ok; refused (any status but 200); no_picture (a 200 without one); timeout;
            disconnected (on purpose); connection_error; unfinished (the run was stopped).
        status: the HTTP status.
        code: the problem's code, else such as `HTTP 500`, or the name of the connection's error.
        detail: the refusal's text, shortened.
        batch_size: rows of the forward pass; None if the server does not report it.
        gpu_seconds: likewise.
        stages_s: seconds by stage, from Server-Timing.
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
    """The distribution of a quantity; percentiles interpolate linearly between neighbours."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float


class Summary(Strict):
    """Figures of some requests.

    Attributes:
        outcomes: number of requests by outcome.
        refusals: number of refused and pictureless requests by code.
        latency_s: of the pictures, without those of clients that were to leave: only quick ones
            reach them.
        slowdown: of the same, if unloaded latency is known.
    """

    outcomes: dict[Outcome, int]
    refusals: dict[str, int]
    latency_s: Spread | None
    slowdown: Spread | None


class Machine(Strict):
    """The load generator's machine.

    Attributes:
        processor, platform, python: as `benchmarks.machine` describes them.
        cores: cores that this process may use.
        load_before, load_after: load average of the last minute.
        generator_cpu_share: CPU seconds of this process over wall seconds; near 1, latencies
            include the generator's own delays.
    """

    processor: str
    platform: str
    python: str
    cores: int
    load_before: float
    load_after: float
    generator_cpu_share: float


class Report(Strict):
    """A run.

    Attributes:
        schema_version: version of this format; it changes when a key changes its meaning.
        plan: as it ran, with the command line's changes.
        url, protocol: of the server.
        started: ISO 8601, UTC.
        interrupted: whether it was stopped early; running requests are then `unfinished`.
        wall_s: from the first due request to the last answer.
        machine: the generator's.
        total: of all counted requests.
        tasks: the same for each task.
        images_per_s: pictures over `wall_s`.
        send_lag_s: the generator's delays, which open plans count as latency.
        batch_sizes: pictures by the rows of their passes, if the server reports them.
        stages_s: mean of each Server-Timing stage.
        gpu_seconds: of all pictures; None if not measured.
        usd_per_gpu_hour: the given price.
        usd_per_1000_images: at that price, for the pictures' GPU time alone.
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
    """The distribution of the known values; None if there is none."""
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return None
    p50, p95, p99 = (float(p) for p in np.percentile(known, (50, 95, 99)))
    mean, top = float(known.mean()), float(known.max())
    return Spread(count=len(known), mean=mean, p50=p50, p95=p95, p99=p99, max=top)


def summarise(records: Sequence[Record]) -> Summary:
    """Count the outcomes of some requests, and summarise their latencies."""
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
    """Read a report from JSON.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # pydantic's ValidationError is a ValueError
        reason = "it is not a report" if isinstance(error, ValidationError) else "no such file"
        raise ConfigError(
            f"The report cannot be read: {reason}.",
            value=path,
            remedy="Name a file that `imagen bench --json` wrote.",
        ) from error


def unloaded_of(path: Path, plan: Plan) -> dict[int, float]:
    """The unloaded latencies of an earlier run of the same requests.

    Raises:
        ConfigError: it measured none, or had other requests.
    """
    report = load_report(path)
    if report.plan.fingerprint != plan.fingerprint:
        raise ConfigError(
            "The report has other requests, so its unloaded latencies do not apply.",
            value=path,
            remedy="Use one with the same seed, photo, sizes and mix, or leave out --unloaded.",
        )
    if not report.unloaded_s:
        raise ConfigError(
            "The report has no unloaded latencies.",
            value=path,
            remedy="Use the report of a plan with `slowdown: true`.",
        )
    return report.unloaded_s
