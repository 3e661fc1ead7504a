"""Metrics of our own, beside Serve's. Ray's agent on each node exports them to Prometheus, with the
prefix `ray_`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge

if TYPE_CHECKING:
    from deployments.store.events import Event
    from deployments.store.node_init import Totals

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


class ModelMetrics:
    """What a replica tells of its model and of the store of its node."""

    def __init__(self) -> None:
        self._counted = {kind: Counter(n, d, _MODEL) for kind, (n, d) in _COUNTED.items()}
        self._summed = {kind: Counter(n, d, _MODEL) for kind, (n, d) in _SUMMED.items()}
        self._seconds = Counter(
            "imagen_store_seconds", "Time by stage: fetch, verify, sync.", ("model", "stage")
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

        self._gauges: list[tuple[Gauge, float, dict[str, str]]] = []

    def hear(self, event: Event) -> None:
        """Count one event of the store."""
        self._add(event.kind, event.model, event.stage, 1, event.amount)

    def record(self, totals: Totals) -> None:
        """Count the events of a node init actor, which ends before its metrics are collected."""
        for kind, model, stage, count, amount in totals:
            self._add(kind, model, stage, count, amount)

    def loaded(self, model: str, digest: str, seconds: float) -> None:
        """A digest is served from now on."""
        self._gauges = [
            (self._load, seconds, {"model": model}),
            (self._info, 1.0, {"model": model, "digest": digest}),
        ]
        self.repeat()

    def repeat(self, disk_free_bytes: int | None = None) -> None:
        """Set the gauges again: Ray's agent forgets one that is not set for a while."""
        for gauge, value, tags in self._gauges:
            gauge.set(value, tags)
        if disk_free_bytes is not None:
            self._free.set(disk_free_bytes)

    def swapped(self, model: str, old: str, *, failed: bool) -> None:
        """An exchange ended."""
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
        elif kind == "disk_free":
            self._free.set(amount)
