"""Redis, which has Ray's state and the jobs: it is there, keeps what it was told, and is reachable.

A head that does not reach it never starts; a Redis that forgets loses jobs months later.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from kuberay.checks.manifests import Document, Finding, Manifests, PodView, matches

if TYPE_CHECKING:
    from collections.abc import Iterator

_COMPONENT = "app.kubernetes.io/component"
_DURABLE = ("--appendonly yes", "--appendfsync always", "--maxmemory-policy noeviction")


def check(manifests: Manifests) -> Iterator[Finding]:
    """Every Redis that is missing, forgetful, out of reach, unencrypted or left over."""
    urls = {
        (pod.where, url.hostname, url.port): (pod, url)
        for pod in manifests.pods
        for url in _urls(manifests, pod)
    }
    services = {one["metadata"]["name"]: one for one in manifests.of("Service")}
    for pod, url in urls.values():
        if "." in (url.hostname or ""):
            yield from _outside(manifests, pod, url)
        elif not _answers(services.get(url.hostname or ""), url):
            message = f"no Service answers at {url.scheme}://{url.hostname}:{url.port}"
            yield Finding("redis", pod.where, message)
    used = {url.hostname for _, url in urls.values()}
    for pod in (one for one in manifests.pods if one.labels.get(_COMPONENT) == "redis"):
        yield from _durable(pod)
        names = {name for name, one in services.items() if _selects(one, pod)}
        if not names & used:
            message = (
                f"no pod uses it, only {', '.join(sorted(map(str, used))) or 'none'}: remove it"
            )
            yield Finding("redis-unused", pod.where, message)


def _urls(manifests: Manifests, pod: PodView) -> Iterator[SplitResult]:
    """The servers that a pod of Ray talks to: of jobs, and on the head of Ray's state."""
    options = manifests.cluster.get("gcsFaultToleranceOptions") or {}
    texts = [pod.environment.get("REDIS_URL") if pod.role != "other" else None]
    texts += [options.get("redisAddress")] if pod.role == "head" else []
    yield from (urlsplit(text) for text in texts if text)


def _answers(service: Document | None, url: SplitResult) -> bool:
    ports = service["spec"]["ports"] if service else []
    return url.port in {port["port"] for port in ports}


def _selects(service: Document, pod: PodView) -> bool:
    return matches({"matchLabels": service["spec"].get("selector") or {}}, pod.labels)


def _outside(manifests: Manifests, pod: PodView, url: SplitResult) -> Iterator[Finding]:
    """A managed Redis: the password crosses a network, and policies close private addresses."""
    place = f"{url.hostname}:{url.port}"
    if url.scheme != "rediss":
        message = f"the password and the jobs go to {place} unencrypted: write rediss://"
        yield Finding("redis-tls", pod.where, message)
    policies = [
        one["spec"]
        for one in manifests.of("NetworkPolicy")
        if "Egress" in one["spec"].get("policyTypes", [])
        and matches(one["spec"].get("podSelector") or {}, pod.labels)
    ]
    rules = [rule for one in policies for rule in one.get("egress") or []]
    if policies and not any(_allows(rule, url) for rule in rules):
        message = f"no NetworkPolicy lets it out to {place}"
        yield Finding("redis-egress", pod.where, message)


def _allows(rule: Document, url: SplitResult) -> bool:
    """Whether an egress rule allows the server; a host that is a name may be in any block."""
    ports = [one.get("port") for one in rule.get("ports") or []]
    blocks: list[Any] = [one["ipBlock"] for one in rule.get("to") or [] if "ipBlock" in one]
    at_port = not ports or url.port in ports
    return at_port and ("to" not in rule or any(_holds(one, url.hostname or "") for one in blocks))


def _holds(block: Document, host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return True
    excepted = [ip_network(one) for one in block.get("except") or []]
    return address in ip_network(block["cidr"]) and not any(address in one for one in excepted)


def _durable(pod: PodView) -> Iterator[Finding]:
    command = " ".join([*(pod.main.get("command") or []), *(pod.main.get("args") or [])])
    for option in (one for one in _DURABLE if one not in command):
        message = f"{option} is missing: jobs that clients were told of could be lost"
        yield Finding("redis-durable", pod.where, message)
