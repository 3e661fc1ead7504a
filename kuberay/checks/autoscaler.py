"""Ray's own autoscaler, fed with a RayService: what it would start for the Serve config's demands.

Uses modules of Ray that are not public: they are the ones the autoscaler in the cluster runs.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.autoscaler._private.kuberay import autoscaling_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated import common_pb2

from kuberay.checks.manifests import Finding, where

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kuberay.checks.manifests import Document, Manifests

CHECK = "autoscaler"
# Generated code, without types.
_IN: Any = vars(common_pb2)["LABEL_OPERATOR_IN"]
_IMPLICIT = "node:__internal_implicit_resource_"


@dataclass(frozen=True)
class Demand:
    """What one replica asks for.

    Attributes:
        deployment: its name.
        resources: as Ray counts them.
        labels: of the node it must be on.
        least: replicas there always are.
        most: replicas there may be.
    """

    deployment: str
    resources: dict[str, float]
    labels: dict[str, str]
    least: int
    most: int


def check(manifests: Manifests) -> list[Finding]:
    """Demands that nothing could ever satisfy, and node counts that are not as intended."""
    return [
        finding
        for service in manifests.of("RayService")
        for finding in _service(service, manifests.serve_config(service))
    ]


def _service(service: Document, config: Document) -> Iterator[Finding]:
    place = where(service)
    groups = service["spec"]["rayClusterConfig"].get("workerGroupSpecs") or []
    try:
        ray = autoscaling_config_of(service)
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        yield Finding(CHECK, "unreadable", place, f"Ray's autoscaler cannot read it: {error}")
        return
    least = {g["groupName"]: g["minReplicas"] for g in groups if g.get("minReplicas")}
    idle, _ = nodes(ray, [])
    if idle != least:
        yield Finding(CHECK, "idle-nodes", place, f"idle, it would start {idle}, not {least}")
    for group in groups:
        if idle.get(group["groupName"]) and _has_gpu(group):
            told = f"{group['groupName']} keeps GPU nodes while nobody asks: minReplicas must be 0"
            yield Finding(CHECK, "idle-gpu", place, f"{told}; min_replicas keeps a model warm")
    yield from _feasible(place, ray, demands(config))


def _feasible(place: str, ray: AutoscalingConfig, asked: list[Demand]) -> Iterator[Finding]:
    alone = {d.deployment for d in asked if nodes(ray, [d])[1]}
    for one in asked:
        if one.deployment in alone:
            told = f"no group could ever hold a replica: {one.resources} on {one.labels}"
            yield Finding(CHECK, "infeasible", f"{place} {one.deployment}", told)
    feasible = [d for d in asked if d.deployment not in alone]
    started, pending = nodes(ray, [d for d in feasible for _ in range(max(d.least, 1))])
    if pending:
        told = f"one replica of each deployment starts {started}, and {pending} find no room"
        yield Finding(CHECK, "too-few-nodes", place, told)
    for one in feasible:
        if without := nodes(ray, [one] * one.most)[1]:
            told = f"max_replicas {one.most}: {without} find no room, even where nothing else runs"
            yield Finding(CHECK, "max-replicas", f"{place} {one.deployment}", told)


def _has_gpu(group: Document) -> bool:
    (container, *_) = group["template"]["spec"]["containers"]
    return bool((container.get("resources") or {}).get("limits", {}).get("nvidia.com/gpu"))


def facts(manifests: Manifests) -> list[str]:
    """Nodes by group: idle, and with one replica of each deployment."""
    told: list[str] = []
    for service in manifests.of("RayService"):
        try:
            ray = autoscaling_config_of(service)
        except (AssertionError, ValueError, KeyError, TypeError):
            continue  # `check` says so
        asked = demands(manifests.serve_config(service))
        for name, wanted in (("idle", []), ("one replica of each deployment", asked)):
            started, _ = nodes(ray, wanted)
            told.append(f"{name}: {', '.join(f'{n} {g}' for g, n in started.items()) or 'none'}")
    return told


def autoscaling_config_of(service: Document) -> AutoscalingConfig:
    """As the autoscaler in the cluster derives it; raises what Ray raises."""
    # KubeRay makes the RayCluster's name from the RayService's; no decision depends on it.
    cluster = {"metadata": service["metadata"], "spec": service["spec"]["rayClusterConfig"]}
    derive: Any = vars(autoscaling_config)["_derive_autoscaling_config_from_ray_cr"]
    return AutoscalingConfig(derive(cluster), skip_content_hash=True)


def demands(config: Document) -> list[Demand]:
    """One of each deployment."""
    return [
        _demand(application.get("name", ""), one)
        for application in config.get("applications") or []
        for one in application.get("deployments") or []
    ]


def _demand(application: str, deployment: Document) -> Demand:
    options = deployment.get("ray_actor_options") or {}
    name = deployment["name"]
    resources: dict[str, float] = {"CPU": options.get("num_cpus", 1)}
    resources |= options.get("resources", {})
    resources |= {"GPU": options.get("num_gpus", 0), "memory": options.get("memory", 0)}
    if kind := options.get("accelerator_type"):
        resources[f"accelerator_type:{kind}"] = 0.001
    if most := deployment.get("max_replicas_per_node"):
        resources[f"{_IMPLICIT}{application}:{name}"] = 1 / most
    scaling = deployment.get("autoscaling_config") or {}
    fixed = deployment.get("num_replicas", 1)
    least = int(scaling.get("min_replicas", 1) if scaling else fixed)
    most = int(scaling.get("max_replicas", 1) if scaling else fixed)
    labels = options.get("label_selector") or {}
    return Demand(name, {k: v for k, v in resources.items() if v}, labels, least, most)


def nodes(ray: AutoscalingConfig, asked: Sequence[Demand]) -> tuple[dict[str, int], int]:
    """Nodes by group that it would start from none, and how many demands stay without room."""
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=ray.get_node_type_configs(),
        max_num_nodes=ray.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([_request(one) for one in asked]),
        idle_timeout_s=ray.get_idle_timeout_s(),
    )
    log = logging.getLogger("ray.autoscaler.v2.scheduler")
    log.setLevel(logging.WARNING)  # it tells of every node
    reply: Any = ResourceDemandScheduler(None).schedule(request)  # pyright: ignore[reportArgumentType]
    started = Counter[str]()
    for launch in reply.to_launch:
        started[launch.instance_type] += launch.count
    return dict(started), len(reply.infeasible_resource_requests)


def _request(demand: Demand) -> Any:
    request: Any = ResourceRequestUtil.make(demand.resources)
    if demand.labels:
        selector = request.label_selectors.add()
        for key, value in demand.labels.items():
            constraint = selector.label_constraints.add()
            constraint.label_key = key
            constraint.operator = _IN
            constraint.label_values.append(value)
    return request
