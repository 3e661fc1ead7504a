"""How many: quotas and nodes hold the largest clusters, and budgets let a drain go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kuberay.checks.manifests import Finding, where
from kuberay.checks.selectors import matches
from kuberay.quantity import parse_quantity

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from decimal import Decimal

    from kuberay.checks.manifests import Document, Manifests

CHECK = "policy"
_GPU = "requests.nvidia.com/gpu"
_COUNTED = {"requests.cpu": "CPUs", "requests.memory": "bytes of memory", _GPU: "GPUs"}
_ALONE = ("StatefulSet", "Deployment")
_RUNNING = {1: "one cluster", 2: "two clusters"}
# What pods of kind itself and the operator ask for.
_KUBERNETES = {"cpu": "1050m", "memory": "802Mi"}
Counted = tuple[int, list["Document"]]
"""How many pods, and what each one's containers are given."""
Told = tuple[str, str, str]
"""Rule, place and message."""


def check(manifests: Manifests) -> list[Finding]:
    """Every quota that is too small, and every budget that holds up drains."""
    told = [*_budgets(manifests)]
    for service in manifests.of("RayService"):
        told += _quota(service, manifests)
    return [Finding(CHECK, rule, place, message) for rule, place, message in told]


def room(manifests: Manifests, nodes: Sequence[Document]) -> list[Finding]:
    """What the largest cluster lacks on nodes, beside its successor while an upgrade runs both.

    Args:
        nodes: what pods may have of each, by resource.
    """
    found: list[Finding] = []
    for service in manifests.of("RayService"):
        running, counted = _most(service, manifests)
        for key, name in _COUNTED.items():
            resource = key.removeprefix("requests.")
            have = sum(parse_quantity(node.get(resource, 0)) for node in nodes)
            needed = _sum(counted, resource)
            others = parse_quantity(_KUBERNETES.get(resource, 0))
            if needed and needed + others > have:
                told = f"the nodes have {have:f} {name}; {running} may take {needed:f}"
                message = f"{told}, and Kubernetes' own pods {others:f}"
                found.append(Finding(CHECK, "room", where(service), message))
    return found


def _budgets(manifests: Manifests) -> Iterator[Told]:
    """Percentages and maxUnavailable need the owner's scale, which a RayCluster has not."""
    least = {
        group["groupName"]: group.get("minReplicas", 0)
        for service in manifests.of("RayService")
        for group in service["spec"]["rayClusterConfig"].get("workerGroupSpecs") or []
    }
    for one in manifests.of("PodDisruptionBudget"):
        selector = one["spec"].get("selector") or {}
        pods = [pod for pod in manifests.pods if matches(selector, pod.labels)]
        kept = one["spec"].get("minAvailable")
        if not any(pod.role != "other" for pod in pods):
            continue
        if "maxUnavailable" in one["spec"] or not isinstance(kept, int):
            told = "Kubernetes cannot count Ray's pods for it, and every drain hangs: it takes a"
            yield "budget", where(one), f"{told} number, as minAvailable (kuberay#2662)"
            continue
        always = sum(least.get(pod.group, 1) for pod in pods)
        if kept >= max(always, 1):
            told = f"minAvailable {kept}, and {always} pods are always there: drains hang"
            yield "budget", where(one), told


def _quota(service: Document, manifests: Manifests) -> Iterator[Told]:
    """The largest cluster must be allowed, beside its successor while an upgrade runs both."""
    running, counted = _most(service, manifests)
    needed = {key: _sum(counted, key.removeprefix("requests.")) for key in _COUNTED}
    for quota in manifests.of("ResourceQuota"):
        hard = quota["spec"]["hard"]
        for key, name in _COUNTED.items():
            # Without a line there is no ceiling: of GPUs there must be one.
            allowed = hard.get(key, 0 if key == _GPU else needed[key])
            if parse_quantity(allowed) < needed[key]:
                message = f"{allowed} {name} are allowed; {running} may take {needed[key]:f}"
                yield "quota", where(quota), message
        pods = sum(n for n, _ in counted)
        if parse_quantity(hard.get("pods", pods)) < pods:
            message = f"{hard['pods']} pods are allowed; {running} may take {pods}"
            yield "quota", where(quota), message


def _most(service: Document, manifests: Manifests) -> tuple[str, list[Counted]]:
    """The most that there is at a time, in words and counted."""
    strategy = (service["spec"].get("upgradeStrategy") or {}).get("type", "NewCluster")
    clusters = 1 if strategy == "None" else 2
    counted = [(n * clusters, sizes) for n, sizes in _cluster(service)] + _beside(manifests)
    return f"{_RUNNING[clusters]} at a time, with what is beside,", counted


def _cluster(service: Document) -> Iterator[Counted]:
    cluster: Document = service["spec"]["rayClusterConfig"]
    beside = [cluster.get("autoscalerOptions") or {}]
    yield 1, cluster["headGroupSpec"]["template"]["spec"]["containers"] + beside
    for group in cluster.get("workerGroupSpecs") or []:
        yield int(group["maxReplicas"]), group["template"]["spec"]["containers"]


def _beside(manifests: Manifests) -> list[Counted]:
    return [
        (one["spec"].get("replicas", 1), one["spec"]["template"]["spec"]["containers"])
        for one in manifests.of(*_ALONE)
    ]


def _sum(counted: list[Counted], name: str) -> Decimal:
    return sum(
        (parse_quantity(_requests(one).get(name, 0)) * n for n, given in counted for one in given),
        start=parse_quantity(0),
    )


def _requests(container: Document) -> Document:
    return (container.get("resources") or {}).get("requests") or {}
