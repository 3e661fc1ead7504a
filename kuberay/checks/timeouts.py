"""The order of timeouts: a caller waits longer than its callee, a pod longer than its work."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING

from kuberay.checks.manifests import Document, Finding, Manifests, PodView, where

if TYPE_CHECKING:
    from collections.abc import Iterator


CLIENT = "imagen.dev/client-timeout-s"
_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
_RAY_DRAIN_S = 30.0
_POD_GRACE_S = 30
_SERVE_GRACE_S = 20
_GOOGLE_DEFAULT_S = 30
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?(?:(\d+)ms)?")
"""Of the Gateway API: its proposal GEP-2257."""
_GOOGLE_DRAIN_S = 3600
_GOOGLE_IDLE_S = 600
"""Google's load balancers keep idle connections this long; a client gets 502 if Serve does not."""


def timeouts(manifests: Manifests) -> dict[str, float | None]:
    """Who waits how many seconds for a picture, outermost first; None has no timeout."""
    waits = {"client": (manifests.service["metadata"].get("annotations") or {}).get(CLIENT)}
    for policy in manifests.of("GCPBackendPolicy"):
        waits["load balancer"] = _backend(policy).get("timeoutSec", _GOOGLE_DEFAULT_S)
    for route in [] if manifests.of("GCPBackendPolicy") else manifests.of("HTTPRoute"):
        waits["load balancer"] = _of_route(route)
    waits["Serve"] = manifests.http_options.get("request_timeout_s")
    waits["engine"] = manifests.clients.get("request_timeout_s", 60)
    return {who: None if waits_s is None else float(waits_s) for who, waits_s in waits.items()}


def check(manifests: Manifests) -> Iterator[Finding]:
    """Every pair of timeouts in the wrong order."""
    place, waits = where(manifests.service), timeouts(manifests)
    for who in (who for who, waits_s in waits.items() if waits_s is None):
        yield Finding("timeout-order", place, f"the {who} has no timeout")
    seconds = {who: waits_s or 0 for who, waits_s in waits.items()}
    for (outer, outer_s), (inner, inner_s) in pairwise(seconds.items()):
        if outer_s <= inner_s:
            message = f"{outer} ({outer_s:g} s) must wait longer than {inner} ({inner_s:g} s)"
            yield Finding("timeout-order", place, message)
    keep_alive = manifests.http_options.get("keep_alive_timeout_s", 0)
    for one in manifests.of("GCPBackendPolicy"):
        yield from _load_balancer(one, keep_alive, seconds)
    delay = manifests.service["spec"].get("rayClusterDeletionDelaySeconds", 60)
    if delay <= max(seconds.get("load balancer", 0), seconds["Serve"]):
        message = f"rayClusterDeletionDelaySeconds {delay} cuts off requests of the old cluster"
        yield Finding("deletion-delay", place, message)
    for one in manifests.deployments:
        grace = one.get("graceful_shutdown_timeout_s", _SERVE_GRACE_S)
        if one.get("name") == "Ingress" and grace <= seconds["engine"]:
            message = f"Ingress: graceful_shutdown_timeout_s {grace:g} cuts off requests, which"
            message += f" take up to the engine's {seconds['engine']:g} s"
            yield Finding("graceful-shutdown", place, message)
    for pod in manifests.pods:
        if pod.role == "worker":
            yield from _shutdown(pod, manifests.deployments)


def _load_balancer(
    policy: Document, keep_alive: float, seconds: dict[str, float]
) -> Iterator[Finding]:
    longest = max(_GOOGLE_IDLE_S, seconds["load balancer"])
    if keep_alive <= longest:
        message = f"keep_alive_timeout_s {keep_alive} must be above the load balancer's"
        yield Finding("keep-alive", where(policy), f"{message} {longest:g} s")
    drain = (_backend(policy).get("connectionDraining") or {}).get("drainingTimeoutSec", 0)
    if not seconds["Serve"] <= drain <= _GOOGLE_DRAIN_S:
        message = f"drainingTimeoutSec {drain} must be from {seconds.get('Serve', 0):g}, so that"
        message += f" a pod that leaves finishes its requests, to {_GOOGLE_DRAIN_S}, Google's most"
        yield Finding("draining", where(policy), message)


def _shutdown(pod: PodView, deployments: list[Document]) -> Iterator[Finding]:
    """A pod's grace period covers Ray's drain, which covers the replicas the pod may hold."""
    graces = [
        one.get("graceful_shutdown_timeout_s", _SERVE_GRACE_S)
        for one in deployments
        if may_hold(pod, one)
    ]
    slowest = max(graces, default=0)
    drain = float(pod.environment.get(_DRAIN) or _RAY_DRAIN_S)
    grace = pod.spec.get("terminationGracePeriodSeconds", _POD_GRACE_S)
    if not grace > drain >= slowest:
        message = f"terminationGracePeriodSeconds {grace} > {_DRAIN} {drain:g} >="
        message += f" graceful_shutdown_timeout_s {slowest:g} does not hold"
        yield Finding("shutdown-order", pod.where, message)


def _of_route(route: Document) -> float | None:
    """The shortest timeout of its rules, in seconds; None if the proxy's own default counts.

    In the Gateway API a duration of 0 waits for ever.
    """
    texts = [(one.get("timeouts") or {}).get("request", "") for one in route["spec"]["rules"]]
    found = [_DURATION.fullmatch(text) if text else None for text in texts]
    if None in found or not found:
        return None
    units = (3600, 60, 1, 0.001)
    parts = [one.groups(default="0") for one in found if one]
    waits_s = [sum(int(n) * unit for n, unit in zip(part, units, strict=True)) for part in parts]
    return min(waits_s) or float("inf")


def _backend(policy: Document) -> Document:
    return policy["spec"].get("default") or {}


def may_hold(pod: PodView, deployment: Document) -> bool:
    """Whether a replica of a Serve deployment may run in a pod, by its labels."""
    selector = (deployment.get("ray_actor_options") or {}).get("label_selector") or {}
    return selector.items() <= pod.labels.items()
