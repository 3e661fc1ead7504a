"""Seconds in their order: each caller outlasts whom it calls, and each pod its requests."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from serve_app.kuberay.manifests import Finding, where

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serve_app.kuberay.manifests import Document, Manifests, PodView

CHECK = "policy"
CLIENT = "imagen.dev/client-timeout-s"
_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
_RAY_DRAIN_S = 30.0
_POD_GRACE_S = 30
_GOOGLE_IDLE_S = 600
"""Google's load balancers keep idle connections so long; who closes first answers 502."""
Told = tuple[str, str, str]


@dataclass(frozen=True)
class Timeout:
    """How long somebody waits for an answer: who, and seconds."""

    who: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.who} ({self.seconds:g} s)"


def timeouts(manifests: Manifests, service: Document) -> list[Timeout]:
    """Who waits how long for a picture, from the outside in; who has no limit is left out."""
    config = manifests.serve_config(service)
    annotations = service["metadata"].get("annotations") or {}
    waits: list[tuple[str, Any]] = [("client", annotations.get(CLIENT))]
    for one in manifests.of("GCPBackendPolicy"):
        waits.append(("load balancer", (one["spec"].get("default") or {}).get("timeoutSec", 30)))
    waits.append(("Serve", (config.get("http_options") or {}).get("request_timeout_s")))
    for application in config.get("applications") or []:
        waits.append(("engine", (application.get("args") or {}).get("request_timeout_s", 60)))
    return [Timeout(who, float(seconds)) for who, seconds in waits if seconds is not None]


def check(manifests: Manifests) -> list[Finding]:
    """Every pair that is in the wrong order."""
    return [
        Finding(CHECK, rule, place, message)
        for service in manifests.of("RayService")
        for rule, place, message in _service(manifests, service)
    ]


def _service(manifests: Manifests, service: Document) -> Iterator[Told]:
    place = where(service)
    waits = timeouts(manifests, service)
    for missing in {"client", "Serve", "engine"} - {one.who for one in waits}:
        yield "timeout-order", place, f"the {missing} has no timeout"
    for outer, inner in pairwise(waits):
        if outer.seconds <= inner.seconds:
            told = f"{outer} must outlast {inner}"
            yield "timeout-order", place, told
    config = manifests.serve_config(service)
    options: Document = config.get("http_options") or {}
    if manifests.of("GCPBackendPolicy") and (
        options.get("keep_alive_timeout_s", 0) <= _GOOGLE_IDLE_S
    ):
        told = f"keep_alive_timeout_s must be above the load balancer's {_GOOGLE_IDLE_S} s"
        yield "keep-alive", place, told
    delay = service["spec"].get("rayClusterDeletionDelaySeconds", 60)
    if delay <= (options.get("request_timeout_s") or 0):
        told = f"rayClusterDeletionDelaySeconds {delay} cuts requests of the old cluster"
        yield "deletion-delay", place, told
    for pod in manifests.pods:
        if pod.role == "worker":
            yield from _ending(pod, config)


def _ending(pod: PodView, config: Document) -> Iterator[Told]:
    """A pod's grace outlasts Ray's drain, and that the requests of the replicas it may hold."""
    deployments = [
        one
        for application in config.get("applications") or []
        for one in application.get("deployments") or []
        if _fits(one, pod)
    ]
    slowest = max((one.get("graceful_shutdown_timeout_s", 20) for one in deployments), default=0)
    environment = {one["name"]: one.get("value") for one in pod.main.get("env") or []}
    drain = float(environment.get(_DRAIN) or _RAY_DRAIN_S)
    grace = pod.spec.get("terminationGracePeriodSeconds", _POD_GRACE_S)
    if not grace > drain >= slowest:
        told = (
            f"terminationGracePeriodSeconds {grace} > {_DRAIN} {drain:g} >="
            f" graceful_shutdown_timeout_s {slowest:g} does not hold"
        )
        yield "shutdown-order", pod.where, told


def _fits(deployment: Document, pod: PodView) -> bool:
    wanted = (deployment.get("ray_actor_options") or {}).get("label_selector") or {}
    return wanted.items() <= pod.labels.items()
