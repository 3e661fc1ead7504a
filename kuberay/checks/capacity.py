"""Room for the largest cluster: in the quota and on the nodes; and budgets that allow drains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kuberay.checks.manifests import Document, Finding, Manifests, matches, where
from kuberay.quantity import parse_quantity

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from decimal import Decimal


_UNITS = {"cpu": "CPUs", "memory": "bytes of memory", "nvidia.com/gpu": "GPUs"}
# Requests of the pods of kind itself and of the operator.
_SYSTEM = {"cpu": "1050m", "memory": "802Mi"}
Counted = tuple[int, list["Document"]]
"""How many pods, and the containers of each."""


def check(manifests: Manifests) -> Iterator[Finding]:
    """Every quota that is too small, and every disruption budget that blocks drains."""
    yield from _budgets(manifests)
    running, pods = _largest(manifests)
    for quota in manifests.of("ResourceQuota"):
        hard: Document = quota["spec"]["hard"]
        # A quota without a line allows any amount. GPUs must have one: they are the bill.
        allowed = {key.removeprefix("requests."): amount for key, amount in hard.items()}
        for name, unit in {**_UNITS, "pods": "pods"}.items():
            needed = _sum(pods, name)
            amount = allowed.get(name, 0 if name == "nvidia.com/gpu" else f"{needed:f}")
            if parse_quantity(amount) < needed:
                message = f"{amount} {unit} are allowed; {running} may take {needed:f}"
                yield Finding("quota", where(quota), message)


def room(manifests: Manifests, nodes: Sequence[Document]) -> Iterator[Finding]:
    """What the nodes lack for the largest cluster, and its successor if an upgrade runs both.

    Args:
        nodes: what pods may have of each node: resource name to quantity.
    """
    running, pods = _largest(manifests)
    for name, unit in _UNITS.items():
        there = sum(parse_quantity(node.get(name, 0)) for node in nodes)
        needed, system = _sum(pods, name), parse_quantity(_SYSTEM.get(name, 0))
        if needed and needed + system > there:
            message = f"the nodes have {there:f} {unit}; {running} may take {needed:f}, and"
            message += f" Kubernetes' own pods {system:f}"
            yield Finding("room", where(manifests.service), message)


def _budgets(manifests: Manifests) -> Iterator[Finding]:
    """A budget by maxUnavailable or percent needs its owner's scale; a RayCluster has none."""
    fewest = {group["groupName"]: group.get("minReplicas", 0) for group in manifests.groups}
    for one in manifests.of("PodDisruptionBudget"):
        spec, place = one["spec"], where(one)
        ray = [pod for pod in manifests.pods if pod.role != "other"]
        pods = [pod for pod in ray if matches(spec.get("selector") or {}, pod.labels)]
        kept = spec.get("minAvailable")
        always = sum(fewest.get(pod.group, 1) for pod in pods)
        if pods and ("maxUnavailable" in spec or not isinstance(kept, int)):
            message = "Kubernetes cannot count Ray's pods for it, and every drain hangs: set"
            yield Finding("budget", place, f"{message} minAvailable to a number (kuberay#2662)")
        elif pods and kept >= max(always, 1):
            message = f"minAvailable {kept}, and only {always} pods always run: drains hang"
            yield Finding("budget", place, message)


def _largest(manifests: Manifests) -> tuple[str, list[Counted]]:
    """All pods that may run at a time, and that in words."""
    head = manifests.cluster["headGroupSpec"]["template"]["spec"]["containers"]
    strategy = (manifests.service["spec"].get("upgradeStrategy") or {}).get("type", "NewCluster")
    clusters, words = (1, "one cluster") if strategy == "None" else (2, "two clusters")
    pods: list[Counted] = [(clusters, [*head, manifests.cluster.get("autoscalerOptions") or {}])]
    pods += [
        (int(group["maxReplicas"]) * clusters, group["template"]["spec"]["containers"])
        for group in manifests.groups
    ]
    pods += [
        (one["spec"].get("replicas", 1), one["spec"]["template"]["spec"]["containers"])
        for one in manifests.of("StatefulSet", "Deployment")
    ]
    return f"{words} at a time, with Redis,", pods


def _sum(pods: Sequence[Counted], name: str) -> Decimal:
    """Requests of all pods together; of `pods`, their number."""
    if name == "pods":
        return parse_quantity(sum(count for count, _ in pods))
    return sum(
        (parse_quantity(_requests(one).get(name, 0)) * n for n, all_ in pods for one in all_),
        start=parse_quantity(0),
    )


def _requests(container: Document) -> Document:
    return (container.get("resources") or {}).get("requests") or {}
