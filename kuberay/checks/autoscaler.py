"""What Ray's autoscaler would start for the Serve config, asked of the autoscaler itself.

A replica that no pod can hold is pending for ever, and nothing in Kubernetes reports it. The
modules of Ray used here are not public. They are the ones that the autoscaler in the cluster runs.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from ray.autoscaler._private.kuberay import autoscaling_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated import common_pb2

from kuberay.checks.manifests import Document, Finding, Manifests, where

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


# Generated code, without types.
_IN: Any = common_pb2.LABEL_OPERATOR_IN  # pyright: ignore[reportAttributeAccessIssue]
# What the autoscaler derives from the RayCluster. Ray has no public name for it; a test fails as
# soon as there is one.
_derive: Any = autoscaling_config._derive_autoscaling_config_from_ray_cr  # pyright: ignore[reportPrivateUsage]


class Demand(NamedTuple):
    """What the replicas of a deployment ask for.

    Attributes:
        deployment: its name.
        resources: of a replica, as Ray counts them; memory in bytes.
        labels: that its node must have.
        fewest, most: replicas that always run, and that may run.
    """

    deployment: str
    resources: dict[str, float]
    labels: dict[str, str]
    fewest: int
    most: int


def check(manifests: Manifests) -> Iterator[Finding]:
    """Replicas that no pod can hold, and GPU nodes that run without requests."""
    ray = autoscaling_config_of(manifests)
    yield from _idle(manifests, ray)
    yield from _feasible(where(manifests.service), ray, demands(manifests))


def _idle(manifests: Manifests, ray: AutoscalingConfig) -> Iterator[Finding]:
    idle, _ = nodes(ray, [])
    for pod in manifests.pods:
        if "nvidia.com/gpu" in pod.limits and idle.get(pod.group):
            message = f"{pod.group} keeps GPU nodes without requests: set minReplicas: 0"
            yield Finding("idle-gpu", pod.where, f"{message}; min_replicas keeps a model warm")


def _feasible(place: str, ray: AutoscalingConfig, asked: Sequence[Demand]) -> Iterator[Finding]:
    feasible = [one for one in asked if not nodes(ray, [one])[1]]
    for one in asked:
        if one not in feasible:
            message = f"no group can ever hold a replica: {one.resources} on {one.labels}"
            yield Finding("infeasible", f"{place} {one.deployment}", message)
    started, pending = nodes(ray, [one for one in feasible for _ in range(max(one.fewest, 1))])
    if pending:
        message = f"one replica of each deployment starts {started}, and {pending} find no room"
        yield Finding("too-few-nodes", place, message)
    for one in feasible:
        if pending := nodes(ray, [one] * one.most)[1]:
            message = f"max_replicas {one.most}: {pending} find no room, even alone in the cluster"
            yield Finding("max-replicas", f"{place} {one.deployment}", message)


def facts(manifests: Manifests) -> list[str]:
    """Nodes by group: without a request, and with one replica of each deployment."""
    ray, lines = autoscaling_config_of(manifests), list[str]()
    for name, asked in (("idle", []), ("one replica of each deployment", demands(manifests))):
        started, _ = nodes(ray, asked)
        lines.append(f"{name}: {', '.join(f'{n} {g}' for g, n in started.items()) or 'none'}")
    return lines


def autoscaling_config_of(manifests: Manifests) -> AutoscalingConfig:
    """The configuration that the autoscaler in the cluster derives; raises whatever Ray raises."""
    # KubeRay derives the RayCluster's name from the RayService's; no decision depends on it.
    cluster = {"metadata": manifests.service["metadata"], "spec": manifests.cluster}
    return AutoscalingConfig(_derive(cluster), skip_content_hash=True)


def demands(manifests: Manifests) -> list[Demand]:
    """One for each Serve deployment."""
    return [
        _demand(application["name"], deployment)
        for application in manifests.serve_config["applications"]
        for deployment in application.get("deployments") or []
    ]


def _demand(application: str, deployment: Document) -> Demand:
    options = deployment.get("ray_actor_options") or {}
    name = deployment["name"]
    resources: dict[str, float] = {
        "CPU": options.get("num_cpus", 1),
        "GPU": options.get("num_gpus", 0),
        "memory": options.get("memory", 0),
        **options.get("resources", {}),
    }
    if kind := options.get("accelerator_type"):
        resources[f"accelerator_type:{kind}"] = 0.001
    if most_per_node := deployment.get("max_replicas_per_node"):
        implicit = f"node:__internal_implicit_resource_{application}:{name}"
        resources[implicit] = 1 / most_per_node
    fixed = deployment.get("num_replicas", 1)
    scaling = deployment.get("autoscaling_config") or {"min_replicas": fixed, "max_replicas": fixed}
    return Demand(
        deployment=name,
        resources={resource: amount for resource, amount in resources.items() if amount},
        labels=options.get("label_selector") or {},
        fewest=scaling.get("min_replicas", 1),
        most=scaling.get("max_replicas", 1),
    )


def nodes(ray: AutoscalingConfig, asked: Sequence[Demand]) -> tuple[dict[str, int], int]:
    """Nodes by group that it would start from none, and how many demands find no room."""
    requests = [
        ResourceRequestUtil.make(
            one.resources,
            label_selectors=[[(key, _IN, [value]) for key, value in one.labels.items()]]
            if one.labels
            else None,
        )
        for one in asked
    ]
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=ray.get_node_type_configs(),
        max_num_nodes=ray.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count(requests),
        idle_timeout_s=ray.get_idle_timeout_s(),
    )
    # It logs a line for every node.
    logging.getLogger("ray.autoscaler.v2.scheduler").setLevel(logging.WARNING)
    reply: Any = ResourceDemandScheduler(None).schedule(request)
    started = Counter[str]()
    for launch in reply.to_launch:
        started[launch.instance_type] += launch.count
    return dict(started), len(reply.infeasible_resource_requests)
