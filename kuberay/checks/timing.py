"""Seconds in their order: each caller outlasts whom it calls, and each pod its requests."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from kuberay.checks.manifests import Finding, where

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kuberay.checks.manifests import Document, Manifests, PodView

CHECK = "policy"
CLIENT = "imagen.dev/client-timeout-s"
_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
_RAY_DRAIN_S = 30.0
_POD_GRACE_S = 30
_SERVE_GRACE_S = 20
_GOOGLE_DRAIN_S = 3600
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
    seconds = {one.who: one.seconds for one in waits}
    config = manifests.serve_config(service)
    yield from _load_balancer(manifests, place, config, seconds)
    delay = service["spec"].get("rayClusterDeletionDelaySeconds", 60)
    if delay <= max(seconds.get("load balancer", 0), seconds.get("Serve", 0)):
        told = f"rayClusterDeletionDelaySeconds {delay} cuts requests of the old cluster"
        yield "deletion-delay", place, told
    for one in _deployments(config):
        grace = one.get("graceful_shutdown_timeout_s", _SERVE_GRACE_S)
        if one.get("name") == "Ingress" and grace <= seconds.get("engine", 0):
            told = f"graceful_shutdown_timeout_s {grace:g} cuts requests: the engine answers within"
            yield "graceful-shutdown", place, f"Ingress: {told} {seconds['engine']:g} s"
    for pod in manifests.pods:
        if pod.role == "worker":
            yield from _ending(pod, config)


def _load_balancer(
    manifests: Manifests, place: str, config: Document, seconds: dict[str, float]
) -> Iterator[Told]:
    """Google's ends neither a connection that Serve has closed, nor a request that is under way."""
    keep = (config.get("http_options") or {}).get("keep_alive_timeout_s", 0)
    for one in manifests.of("GCPBackendPolicy"):
        least = max(_GOOGLE_IDLE_S, seconds["load balancer"])
        if keep <= least:
            told = f"keep_alive_timeout_s {keep} must be above the load balancer's {least:g} s"
            yield "keep-alive", place, told
        draining: Document = (one["spec"].get("default") or {}).get("connectionDraining") or {}
        drain = draining.get("drainingTimeoutSec", 0)
        least = seconds.get("Serve", 0)
        if not least <= drain <= _GOOGLE_DRAIN_S:
            told = f"pods that leave cut requests: drainingTimeoutSec {drain} must be"
            yield "draining", where(one), f"{told} {least:g} to {_GOOGLE_DRAIN_S} (Google's most)"


def _ending(pod: PodView, config: Document) -> Iterator[Told]:
    """A pod's grace outlasts Ray's drain, and that the requests of the replicas it may hold."""
    graces = [
        one.get("graceful_shutdown_timeout_s", _SERVE_GRACE_S)
        for one in _deployments(config)
        if _fits(one, pod)
    ]
    slowest = max(graces, default=0)
    environment = {one["name"]: one.get("value") for one in pod.main.get("env") or []}
    drain = float(environment.get(_DRAIN) or _RAY_DRAIN_S)
    grace = pod.spec.get("terminationGracePeriodSeconds", _POD_GRACE_S)
    if not grace > drain >= slowest:
        told = (
            f"terminationGracePeriodSeconds {grace} > {_DRAIN} {drain:g} >="
            f" graceful_shutdown_timeout_s {slowest:g} does not hold"
        )
        yield "shutdown-order", pod.where, told


def _deployments(config: Document) -> list[Document]:
    return [
        one
        for application in config.get("applications") or []
        for one in application.get("deployments") or []
    ]


def _fits(deployment: Document, pod: PodView) -> bool:
    wanted = (deployment.get("ray_actor_options") or {}).get("label_selector") or {}
    return wanted.items() <= pod.labels.items()
