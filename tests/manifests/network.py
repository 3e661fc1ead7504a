"""A small reading of NetworkPolicies: the connections that they allow, beside those that we need.

It knows the fields that our policies use, and stops at any other.
"""

from __future__ import annotations

from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

from kuberay.checks.manifests import matches

if TYPE_CHECKING:
    from kuberay.checks.manifests import Document, Manifests

# A pod, a direction, its peer (a pod, a namespace or addresses), and the port of the called end.
# Ray's processes choose their ports, such as 31337.
NEEDED = """
headgroup      Egress   ingress             31337
headgroup      Ingress  models              31337
ingress        Egress   headgroup           31337
ingress        Ingress  ingress             31337
models         Egress   ingress             31337
models         Ingress  headgroup           31337
headgroup      Egress   namespace/kube-system     53
headgroup      Egress   namespace/kube-system     53/UDP
models         Egress   namespace/kube-system     53/UDP
publish        Egress   namespace/kube-system     53/UDP
headgroup      Ingress  namespace/kuberay-system  8265
headgroup      Ingress  namespace/kuberay-system  8000
headgroup      Egress   172.16.0.2/32       443
headgroup      Egress   172.16.0.2/32       6443
headgroup      Egress   redis               6379
redis-cleanup  Egress   redis               6379
redis          Ingress  headgroup           6379
redis          Ingress  redis-cleanup       6379
ingress        Egress   redis               6379
redis          Ingress  ingress             6379
models         Egress   142.250.0.0/16      443
ingress        Egress   142.250.0.0/16      443
publish        Egress   142.250.0.0/16      443
"""
# And on the platform of the overlay.
NEEDED_BY_GKE = """
ingress        Ingress  130.211.0.0/22      8000
ingress        Ingress  35.191.0.0/16       8000
models         Egress   169.254.169.252/32  988
models         Egress   169.254.169.254/32  80
ingress        Egress   169.254.169.252/32  988
publish        Egress   169.254.169.252/32  988
headgroup      Ingress  namespace/gmp-system      8080
headgroup      Ingress  namespace/gke-gmp-system  44217
headgroup      Ingress  namespace/gke-gmp-system  44227
models         Ingress  namespace/gke-gmp-system  8080
"""
NEEDED_ELSEWHERE = """
ingress        Ingress  namespace/gateway         8000
headgroup      Ingress  namespace/monitoring      8080
headgroup      Ingress  namespace/monitoring      44217
headgroup      Ingress  namespace/monitoring      44227
models         Ingress  namespace/monitoring      8080
models         Egress   169.254.20.10/32          53/UDP
ingress        Egress   169.254.170.23/32         80
publish        Egress   169.254.170.23/32         80
"""
_NAMESPACES = {
    "gateway": {"imagen.dev/gateway": "true"},
    "monitoring": {"imagen.dev/monitoring": "true"},
}
"""Labels of namespaces, beside their name."""
# A connection to one of these ports can run code, or read the state of the cluster.
FORBIDDEN = [
    f"{pod} Ingress {stranger} {port}"
    for pod, port in (
        ("headgroup", 8265),
        ("headgroup", 10001),
        ("headgroup", 6379),
        ("redis", 6379),
    )
    for stranger in ("stranger", "namespace/default", "8.8.8.8/32")
]
FORBIDDEN += ["redis Ingress models 6379"]
_PODS = {"stranger": {}, "redis-cleanup": {"ray.io/node-type": "redis-cleanup"}}


def closed(manifests: Manifests) -> list[str]:
    """The connections that we need and the policies do not allow."""
    platform = NEEDED_ELSEWHERE if manifests.name == "portable" else NEEDED_BY_GKE
    return [line for line in _lines(manifests, NEEDED + platform) if not _allowed(manifests, line)]


def opened(manifests: Manifests) -> list[str]:
    """The forbidden connections that the policies allow."""
    return [line for line in FORBIDDEN if _allowed(manifests, line)]


def _lines(manifests: Manifests, text: str) -> list[str]:
    """Those of pods that the overlay has."""
    there = _labels(manifests).keys()
    return [line for line in text.splitlines() if line and line.split()[0] in there]


def _labels(manifests: Manifests) -> dict[str, dict[str, str]]:
    """The labels of each kind of pod, by a short name."""
    pods = {one.group or one.where.rpartition("-")[2]: one.labels for one in manifests.pods}
    return pods | _PODS


def denied_by_default(manifests: Manifests) -> set[str]:
    """The directions in which a pod that no other policy selects has no connection."""
    return {
        d for d in ("Ingress", "Egress") if not _allowed(manifests, f"stranger {d} 8.8.8.8/32 9")
    }


def _allowed(manifests: Manifests, line: str) -> bool:
    """Without a policy a direction is open; with some, it is open to what one of them names."""
    pod, direction, peer, port = line.split()
    labels = _labels(manifests)
    policies = [
        one["spec"]
        for one in manifests.of("NetworkPolicy")
        if direction in one["spec"]["policyTypes"]
        and matches(one["spec"]["podSelector"], labels[pod])
    ]
    rules = [rule for one in policies for rule in one.get(direction.lower()) or []]
    return not policies or any(_allows(rule, peer, labels.get(peer, {}), port) for rule in rules)


def _allows(rule: Document, peer: str, labels: dict[str, str], port: str) -> bool:
    assert rule.keys() <= {"from", "to", "ports"}
    number, _, protocol = port.partition("/")
    entry = {"protocol": protocol or "TCP", "port": int(number)}
    peers: list[dict[str, Any]] = rule.get("from") or rule.get("to") or []
    at_port = "ports" not in rule or entry in rule["ports"]
    return at_port and (not peers or any(_is(one, peer, labels) for one in peers))


def _is(entry: dict[str, Any], peer: str, labels: dict[str, str]) -> bool:
    """Whether an entry of `from` or `to` names the peer."""
    assert entry.keys() <= {"ipBlock", "podSelector", "namespaceSelector"}
    address = peer[0].isdigit()
    if block := entry.get("ipBlock"):
        excepted = [ip_network(one) for one in block.get("except", [])]
        network: Any = ip_network(peer) if address else None
        return (
            address
            and network.subnet_of(ip_network(block["cidr"]))
            and not any(network.overlaps(one) for one in excepted)
        )
    kind, _, name = peer.rpartition("/")
    if address or not matches(entry.get("podSelector") or {}, labels):
        return False
    if "namespaceSelector" not in entry:
        return not kind
    named = {"kubernetes.io/metadata.name": name if kind else ""}
    return matches(entry["namespaceSelector"], named | _NAMESPACES.get(name, {}))
