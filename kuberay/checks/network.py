"""Network policies: what the service needs gets through, and strangers do not."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Network, ip_network
from itertools import product
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from kuberay.checks.manifests import Finding, PodView, where
from kuberay.checks.selectors import matches

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kuberay.checks.manifests import Document, Manifests

CHECK = "network"
OPERATOR_NAMESPACE = "kuberay-system"
"""As in kuberay/operator."""
Direction = Literal["Ingress", "Egress"]
_DIRECTIONS: tuple[Direction, Direction] = ("Ingress", "Egress")
_SPACE_LABEL = "kubernetes.io/metadata.name"
_SOMEWHERE = "somewhere"
_SERVE_PORT = 8000
Told = tuple[str, str, str]
"""Rule, place and message."""


@dataclass(frozen=True)
class Peer:
    """Whom a pod talks to.

    Attributes:
        name: for people.
        labels: of a pod.
        space: the pod's namespace; empty is ours.
        network: addresses of what is no pod; `somewhere` are some that nobody knows here.
        ports: of the pod, by name.
    """

    name: str
    labels: dict[str, str] = field(default_factory=dict[str, str])
    space: str = ""
    network: str = ""
    ports: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class Flow:
    """Connections between a pod and a peer; port None means every port."""

    pod: PodView
    direction: Direction
    peer: Peer
    port: int | None
    protocol: str = "TCP"

    def __str__(self) -> str:
        at = "every port" if self.port is None else f"port {self.port} ({self.protocol})"
        name = self.peer.name
        return (
            f"{name} reach it at {at}"
            if self.direction == "Ingress"
            else f"it reach {name} at {at}"
        )


_DNS = Peer("names (DNS)", {"k8s-app": "kube-dns"}, "kube-system")
_OPERATOR = Peer("KubeRay's operator", {"app.kubernetes.io/name": "kuberay"}, OPERATOR_NAMESPACE)
_API_SERVER = Peer("the API server", network=_SOMEWHERE)
_BUCKETS = Peer("Google's storage", network="142.250.0.0/16")
_LOAD_BALANCERS = [
    Peer(f"Google's load balancers ({one})", network=one)
    for one in ("130.211.0.0/22", "35.191.0.0/16")
]
_METADATA = (("169.254.169.252/32", 988), ("169.254.169.254/32", 80))
_SCRAPERS = [
    Peer(f"managed Prometheus in {space}", {"app.kubernetes.io/name": "collector"}, space)
    for space in ("gmp-system", "gke-gmp-system")
]
_STRANGERS = [
    Peer("another pod of the namespace"),
    Peer("a pod of another namespace", space="default"),
    Peer("the internet", network="8.8.8.8/32"),
]
# Made by KubeRay once a cluster is gone.
_CLEANUP = PodView("redis-cleanup", "other", "", {"ray.io/node-type": "redis-cleanup"}, {}, {})


def check(manifests: Manifests) -> list[Finding]:
    """What is not closed, what is open to strangers, and what is closed that must be open."""
    policies = [one["spec"] for one in manifests.of("NetworkPolicy")]
    told = [
        one
        for service in manifests.of("RayService")
        for one in [*_denied(service, policies), *_flows(service, manifests, policies)]
    ]
    # Pods of one group are asked about each other more than once.
    return [Finding(CHECK, rule, place, message) for rule, place, message in dict.fromkeys(told)]


def _denied(service: Document, policies: Sequence[Document]) -> Iterator[Told]:
    everyone = [one for one in policies if not one.get("podSelector")]
    for way in _DIRECTIONS:
        if not any(way in _types(one) for one in everyone):
            yield "default-deny", where(service), f"no NetworkPolicy denies {way} to every pod"


def _flows(service: Document, manifests: Manifests, policies: Sequence[Document]) -> Iterator[Told]:
    needed = [*_ray(service, manifests), *_models(service, manifests)]
    needed += [*_redis(service, manifests), *_google(manifests)]
    for flow in needed:
        if not _passes(policies, flow):
            yield "closed", flow.pod.where, f"no NetworkPolicy lets {flow}"
    for flow in _private(service, manifests):
        if _passes(policies, flow):
            yield "open", flow.pod.where, f"NetworkPolicies let {flow}"


def _ray(service: Document, manifests: Manifests) -> Iterator[Flow]:
    """Among Ray's pods, which listen on ports of their own choice; the operator and the head."""
    pods = [pod for pod in manifests.pods if pod.role != "other"]
    for pod, other in product(pods, pods):
        peer = Peer("Ray's pods", other.labels, ports=other.port_names)
        yield from (Flow(pod, way, peer, None) for way in _DIRECTIONS)
    for pod, protocol in product(pods, ("UDP", "TCP")):
        yield Flow(pod, "Egress", _DNS, 53, protocol)
    cluster = service["spec"]["rayClusterConfig"]
    for head in (pod for pod in pods if pod.role == "head"):
        for name in sorted({"dashboard", "serve"} & head.port_names.keys()):
            yield Flow(head, "Ingress", _OPERATOR, head.port_names[name])
        if cluster.get("enableInTreeAutoscaling"):
            # Elsewhere it listens on 6443, and policies see the port behind its Service.
            ports = (443,) if manifests.of("ComputeClass") else (443, 6443)
            yield from (Flow(head, "Egress", _API_SERVER, port) for port in ports)


def _models(service: Document, manifests: Manifests) -> Iterator[Flow]:
    """Whoever has a store reaches the bucket, and on GKE the server of tokens for it."""
    applications = manifests.serve_config(service).get("applications") or []
    stores = [(one.get("args") or {}).get("store") or {} for one in applications]
    if not any(str(store.get("mirror", "")).startswith("gs://") for store in stores):
        return
    for pod in manifests.pods:
        if not any(one["name"] == "IMAGEN_MODELS" for one in pod.main.get("env") or []):
            continue
        yield Flow(pod, "Egress", _BUCKETS, 443)
        yield from (Flow(pod, "Egress", _DNS, 53, protocol) for protocol in ("UDP", "TCP"))
        for network, port in _METADATA if manifests.of("ComputeClass") else ():
            yield Flow(pod, "Egress", Peer("the metadata server", network=network), port)


def _redis(service: Document, manifests: Manifests) -> Iterator[Flow]:
    for (server, port), client in product(_servers(service, manifests), _clients(manifests)):
        to = Peer("Redis", server.labels, ports=server.port_names)
        yield Flow(client, "Egress", to, port)
        yield Flow(server, "Ingress", Peer(client.where, client.labels), port)


def _clients(manifests: Manifests) -> list[PodView]:
    return [*(pod for pod in manifests.pods if pod.role == "head"), _CLEANUP]


def _servers(service: Document, manifests: Manifests) -> list[tuple[PodView, int | None]]:
    """Redis' pods, and the port."""
    cluster = service["spec"]["rayClusterConfig"]
    address = urlsplit((cluster.get("gcsFaultToleranceOptions") or {}).get("redisAddress") or "")
    return [
        (pod, address.port)
        for one in manifests.of("Service")
        if one["metadata"]["name"] == address.hostname
        for pod in manifests.pods
        if matches({"matchLabels": one["spec"].get("selector")}, pod.labels)
    ]


def _google(manifests: Manifests) -> Iterator[Flow]:
    """Load balancers to the proxies, Prometheus to the metrics."""
    workers = [pod for pod in manifests.pods if pod.role == "worker"]
    for pod, peer in product(workers if manifests.of("Gateway") else [], _LOAD_BALANCERS):
        yield Flow(pod, "Ingress", peer, pod.port_names.get("serve", _SERVE_PORT))
    for one, pod in product(manifests.of("PodMonitoring"), manifests.pods):
        if matches(one["spec"].get("selector") or {}, pod.labels):
            for endpoint, peer in product(one["spec"].get("endpoints") or [], _SCRAPERS):
                if port := pod.port_names.get(str(endpoint["port"])):
                    yield Flow(pod, "Ingress", peer, port)


def _private(service: Document, manifests: Manifests) -> Iterator[Flow]:
    """Whoever reaches these runs code of his own, or reads the cluster's state."""
    guarded = [
        (pod, pod.port_names[name])
        for pod in manifests.pods
        if pod.role == "head"
        for name in ("dashboard", "client", "gcs-server")
        if name in pod.port_names
    ]
    for (pod, port), peer in product(guarded + _servers(service, manifests), _STRANGERS):
        yield Flow(pod, "Ingress", peer, port)


def _types(policy: Document) -> Sequence[str]:
    return policy.get("policyTypes") or ("Ingress", *(["Egress"] if "egress" in policy else []))


def _passes(policies: Sequence[Document], flow: Flow) -> bool:
    """Without any policy everything passes; with some, what one of them admits."""
    applying = [
        one
        for one in policies
        if flow.direction in _types(one) and matches(one.get("podSelector") or {}, flow.pod.labels)
    ]
    rules = [rule for one in applying for rule in one.get(flow.direction.lower()) or []]
    return not applying or any(_admits(rule, flow) for rule in rules)


def _admits(rule: Document, flow: Flow) -> bool:
    peers = rule.get("from" if flow.direction == "Ingress" else "to")
    if peers and not any(_names(one, flow.peer) for one in peers):
        return False
    names = flow.pod.port_names if flow.direction == "Ingress" else flow.peer.ports
    ports = rule.get("ports")
    return not ports or any(_covers(one, flow, names) for one in ports)


def _names(entry: Document, peer: Peer) -> bool:
    """Whether an entry of `from` or `to` means a peer."""
    if block := entry.get("ipBlock"):
        if peer.network in ("", _SOMEWHERE):
            return bool(peer.network)
        asked, cidr = IPv4Network(peer.network), ip_network(block["cidr"])
        without = [ip_network(one) for one in block.get("except") or []]
        inside = isinstance(cidr, IPv4Network) and asked.subnet_of(cidr)
        return inside and not any(asked.overlaps(one) for one in without)
    if peer.network or not matches(entry.get("podSelector") or {}, peer.labels):
        return False
    space: Any = entry.get("namespaceSelector")
    if space is None:
        return not peer.space
    return matches(space, {_SPACE_LABEL: peer.space} if peer.space else {})


def _covers(entry: Document, flow: Flow, names: dict[str, int]) -> bool:
    if flow.port is None or entry.get("protocol", "TCP") != flow.protocol:
        return False
    first = entry.get("port")
    first = names.get(first) if isinstance(first, str) else first
    if "port" not in entry:
        return True
    return first is not None and first <= flow.port <= entry.get("endPort", first)
