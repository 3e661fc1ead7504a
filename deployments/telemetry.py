"""Metrics of our own, beside Serve's.

Ray's agent on each node exports them to Prometheus with the prefix `ray_`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deployments.engine.grouping import Pass
    from deployments.store.events import Event
    from deployments.store.node_init import Totals
    from deployments.tasks import Task

_COUNTED = {
    "hit": ("imagen_store_hits", "Pulls that found the model whole in the store."),
    "miss": ("imagen_store_misses", "Pulls that had to fetch the model."),
    "verify_failure": ("imagen_store_verify_failures", "Model folders or files with wrong bytes."),
    "retry": ("imagen_store_retries", "Requests to a source that were tried again."),
}
_SUMMED = {
    "bytes": ("imagen_store_fetched_bytes", "Bytes fetched from sources."),
    "adopted": ("imagen_store_adopted_bytes", "Bytes taken over from interrupted pulls."),
    "waited": (
        "imagen_store_single_flight_wait_seconds",
        "Time behind another process that pulled the same model.",
    ),
}
_MODEL = ("model",)
# From a background on a GPU to a cold start.
_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640]
_ROWS = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0]


class ModelMetrics:
    """A replica's model and the model store of its node."""

    def __init__(self) -> None:
        self._counted = {kind: Counter(n, d, _MODEL) for kind, (n, d) in _COUNTED.items()}
        self._summed = {kind: Counter(n, d, _MODEL) for kind, (n, d) in _SUMMED.items()}
        self._seconds = Counter(
            "imagen_store_seconds", "Time by stage: fetch, verify, sync.", ("model", "stage")
        )
        self._compiled = Counter(
            "imagen_compiled_artefacts",
            "Compiled artefacts that a replica wanted: loaded, missing, foreign or damaged.",
            ("model", "outcome"),
        )
        self._free = Gauge("imagen_store_disk_free_bytes", "Free space on the store's disk.")
        self._load = Gauge(
            "imagen_model_load_seconds", "Time of the last load, warm-up included.", _MODEL
        )
        self._swap = Counter(
            "imagen_model_swaps", "Exchanges of a model's content.", ("model", "outcome")
        )
        self._info = Gauge(
            "imagen_model_serving", "1 for the digest a replica serves.", ("model", "digest")
        )
        self._differs = Gauge(
            "imagen_model_differs", "1 while the digest served is not the configured one.", _MODEL
        )
        self._gauges: list[tuple[Gauge, float, dict[str, str]]] = []

    def count_event(self, event: Event) -> None:
        """Count one event of the store."""
        self._add(event.kind, event.model, event.stage, 1, event.amount)

    def count_totals(self, totals: Totals) -> None:
        """Count events of a node init actor, which ends before its own metrics are collected."""
        for kind, model, stage, count, amount in totals:
            self._add(kind, model, stage, count, amount)

    def set_serving(self, model: str, digest: str, seconds: float) -> None:
        """A digest is served from now on; loading it took `seconds`."""
        self._gauges = [
            (self._load, seconds, {"model": model}),
            (self._info, 1.0, {"model": model, "digest": digest}),
        ]
        self.refresh()

    def refresh(self, disk_free_bytes: int | None = None) -> None:
        """Set the gauges again, because Ray's agent forgets one that is not set for a while."""
        for gauge, value, tags in self._gauges:
            gauge.set(value, tags)
        if disk_free_bytes is not None:
            self._free.set(disk_free_bytes)

    def set_differs(self, model: str, *, differs: bool) -> None:
        """Whether the digest that is served is not the configured one."""
        self._differs.set(int(differs), {"model": model})

    def count_swap(self, model: str, old: str, *, failed: bool) -> None:
        """Count an exchange that ended; `old` is the digest before it."""
        self._swap.inc(1, {"model": model, "outcome": "failed" if failed else "done"})
        if not failed:
            self._info.set(0, {"model": model, "digest": old})

    def _add(self, kind: str, model: str, stage: str, count: int, amount: float) -> None:
        if kind in self._counted:
            self._counted[kind].inc(count, {"model": model})
        elif kind in self._summed and amount > 0:
            self._summed[kind].inc(amount, {"model": model})
        elif kind == "seconds" and amount > 0:
            self._seconds.inc(amount, {"model": model, "stage": stage})
        elif kind == "compiled":
            self._compiled.inc(count, {"model": model, "outcome": stage})
        elif kind == "disk_free":
            self._free.set(amount)


class WorkMetrics:
    """A replica's requests, passes and share of a GPU.

    Args:
        model: its name, a tag of every metric.
    """

    def __init__(self, model: str) -> None:
        self._model = {"model": model}
        self._requests = Counter(
            "imagen_requests",
            "Requests of a replica by outcome: ok, the code of the error, or disconnected.",
            ("model", "outcome"),
        )
        self._stage = Histogram(
            "imagen_stage_seconds",
            "Time of a picture by stage: queue, decode, denoise, vae, encode.",
            _SECONDS,
            ("model", "stage"),
        )
        self._rows = Histogram("imagen_pass_rows", "Rows of a pass.", _ROWS, _MODEL)
        self._passes = Counter(
            "imagen_passes",
            "Passes by why they took no more rows: all, key, full, exact, budget, pace, memory.",
            ("model", "closed"),
        )
        self._gpu_seconds = Counter(
            "imagen_gpu_seconds", "GPU time of pictures: share of the GPU times seconds.", _MODEL
        )
        self._in_flight = Gauge("imagen_rows_in_flight", "Requests inside a replica.", _MODEL)
        self._memory = Gauge(
            "imagen_gpu_memory_bytes",
            "A replica's GPU memory: reserved and peak, and the cap of its allocator; 0 on a CPU.",
            ("model", "kind"),
        )

    def count_request(self, outcome: str) -> None:
        """A request has ended: ok, the code of its error, or disconnected."""
        self._requests.inc(1, self._model | {"outcome": outcome})

    def record_picture(self, timings_s: Mapping[str, float], gpu_seconds: float) -> None:
        """A picture is done; `timings_s` are seconds by stage."""
        for stage, seconds in timings_s.items():
            self._stage.observe(seconds, self._model | {"stage": stage})
        if gpu_seconds > 0:
            self._gpu_seconds.inc(gpu_seconds, self._model)

    def record_pass(self, done: Pass) -> None:
        """A pass is done."""
        self._rows.observe(len(done.rows), self._model)
        self._passes.inc(1, self._model | {"closed": done.closed})

    def set_in_flight(self, requests: int) -> None:
        """How many requests are inside."""
        self._in_flight.set(requests, self._model)

    def set_memory(self, memory_bytes: Mapping[str, int]) -> None:
        """Bytes by kind: reserved, peak, cap."""
        for kind, amount in memory_bytes.items():
            self._memory.set(amount, self._model | {"kind": kind})


class HttpMetrics:
    """An ingress replica's answers."""

    def __init__(self) -> None:
        self._answers = Counter(
            "imagen_http_answers",
            "Answers by protocol, route, status, and reason: ok, or the code of the problem.",
            ("protocol", "route", "status", "reason"),
        )
        self._seconds = Histogram(
            "imagen_http_seconds",
            "From the request to the end of its answer.",
            _SECONDS,
            ("protocol", "route"),
        )

    def answered(self, route: str, status: int, reason: str, seconds: float, protocol: str) -> None:
        """Count an answer; status 0 if its client left before it."""
        where = {"protocol": protocol, "route": route}
        self._answers.inc(1, {**where, "status": str(status), "reason": reason})
        self._seconds.observe(seconds, where)


class JobMetrics:
    """Jobs: every ingress replica tells how the queue is, whoever ends a job tells its end."""

    def __init__(self) -> None:
        by_task = ("task",)
        self._redis = Gauge("imagen_jobs_redis_up", "1 if the Redis of jobs answers, else 0.")
        self._waiting = Gauge("imagen_jobs_waiting", "Jobs in the queue.", by_task)
        self._oldest = Gauge(
            "imagen_jobs_oldest_seconds", "Time since the oldest job in the queue came.", by_task
        )
        self._running = Gauge("imagen_jobs_running", "Jobs that a worker has.", by_task)
        self._dead = Gauge("imagen_jobs_dead", "Dead letters.")
        self._webhooks = Gauge("imagen_webhooks_waiting", "Jobs with an undelivered event.")
        self._late = Gauge("imagen_webhooks_late_seconds", "How long the first one has been due.")
        self._ended = Counter(
            "imagen_jobs_ended",
            "Jobs by outcome: completed, canceled, or the code of the error.",
            ("task", "outcome"),
        )
        self._seconds = Histogram(
            "imagen_jobs_seconds", "From the submission of a job to its end.", _SECONDS, by_task
        )

    def set_queue(self, depth: Mapping[Task, tuple[int, int, float]]) -> None:
        """Redis answers. By task: jobs waiting, jobs running, seconds that the oldest waits."""
        self._redis.set(1)
        for task, (waiting, running, oldest_s) in depth.items():
            tags = {"task": str(task)}
            self._waiting.set(waiting, tags)
            self._running.set(running, tags)
            self._oldest.set(oldest_s, tags)

    def set_backlog(self, dead: int, webhooks: int, late_s: float) -> None:
        """Dead letters; jobs with an undelivered event; how long the first has been due, or 0."""
        self._dead.set(dead)
        self._webhooks.set(webhooks)
        self._late.set(late_s)

    def set_away(self) -> None:
        """Redis does not answer."""
        self._redis.set(0)

    def count_end(self, task: Task, outcome: str, seconds: float) -> None:
        """A job has ended: completed, canceled, or the code of its error."""
        self._ended.inc(1, {"task": str(task), "outcome": outcome})
        self._seconds.observe(max(seconds, 0.0), {"task": str(task)})
