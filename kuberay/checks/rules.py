"""What KubeRay 1.7 refuses beyond its schema: ported from the operator's own validation.

The operator reports these only as events on the RayService, after it was applied.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kuberay.checks.manifests import Finding, where

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kuberay.checks.manifests import Document, Manifests

CHECK = "kuberay"
_NAME_LENGTH = 47
_TOKEN_RAY = (2, 52, 0)
_PRIORITY_RAY = (2, 56, 0)
_UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
_GATED = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
_V2_ENV = "RAY_enable_autoscaler_v2"
_LABEL_PART = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = re.compile(rf"([a-z0-9]([a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_LABEL_PART}")
_LABEL_VALUE = re.compile(rf"({_LABEL_PART})?")
_DURATION = re.compile(r"([0-9.]+(ns|us|ms|s|m|h))+|[0-9]+")
Told = tuple[str, str]
"""Rule and message."""


def check(manifests: Manifests) -> list[Finding]:
    """Every rule of the operator that a RayService breaks."""
    return [
        Finding(CHECK, rule, where(service), message)
        for service in manifests.of("RayService")
        for rule, message in _service(service)
    ]


def _service(service: Document) -> Iterator[Told]:
    about, spec = service.get("metadata") or {}, service.get("spec") or {}
    cluster: Document = spec.get("rayClusterConfig") or {}
    annotations = about.get("annotations") or {}
    yield from _name(str(about.get("name", "")), annotations)
    yield from _upgrade(spec, cluster)
    if (
        not (cluster.get("headGroupSpec") or {})
        .get("template", {})
        .get("spec", {})
        .get("containers")
    ):
        yield "containers", "headGroupSpec has no container"
        return
    for group in [cluster["headGroupSpec"], *(cluster.get("workerGroupSpecs") or [])]:
        yield from _group(group)
    for group in cluster.get("workerGroupSpecs") or []:
        yield from _worker(group, cluster)
    yield from _autoscaler(cluster)
    yield from _fault_tolerance(cluster, annotations)
    yield from _authentication(cluster)
    for field, gate in _GATED.items():
        if field in cluster:
            yield "feature-gate", f"{field} needs the feature gate {gate}, which is off"
    yield from _serve_port(cluster)


def _name(name: str, annotations: Document) -> Iterator[Told]:
    if len(name) > _NAME_LENGTH:
        yield "name", f"a RayService's name has at most {_NAME_LENGTH} characters, not {len(name)}"
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        yield "name", f"{name!r} is no DNS-1035 label (a-z, 0-9, -; a letter first)"
    timeout = str(annotations.get("ray.io/initializing-timeout", "1s"))
    if not _DURATION.fullmatch(timeout) or not re.search("[1-9]", timeout):
        yield "initializing-timeout", f"{timeout!r} is no positive duration, such as 45m"


def _upgrade(spec: Document, cluster: Document) -> Iterator[Told]:
    strategy = spec.get("upgradeStrategy") or {}
    kind = strategy.get("type", "NewCluster")
    if kind not in _UPGRADES:
        yield "upgrade-strategy", f"{kind!r} is none of {', '.join(_UPGRADES)}"
    if "upgradeStrategy" in cluster:
        yield "upgrade-strategy", "rayClusterConfig.upgradeStrategy is refused under a RayService"
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "deletion-delay", "rayClusterDeletionDelaySeconds is negative"
    if kind == "NewClusterWithIncrementalUpgrade":
        options = strategy.get("clusterUpgradeOptions") or {}
        needed = ("gatewayClassName", "stepSizePercent", "intervalSeconds")
        if missing := [key for key in needed if not options.get(key)]:
            yield "upgrade-strategy", f"clusterUpgradeOptions lacks {', '.join(missing)}"
        if not cluster.get("enableInTreeAutoscaling"):
            yield "upgrade-strategy", "an incremental upgrade needs enableInTreeAutoscaling"


def _group(group: Document) -> Iterator[Told]:
    name = group.get("groupName", "head")
    started = group.get("rayStartParams") or {}
    if group.get("resources") and started.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
        yield "group-resources", f"{name}: resources stand in rayStartParams and in resources"
    if "labels" in started:
        yield "group-labels", f"{name}: rayStartParams.labels is refused; use the group's labels"
    for key, value in (group.get("labels") or {}).items():
        if not _LABEL_KEY.fullmatch(str(key)) or not _LABEL_VALUE.fullmatch(str(value)):
            yield "group-labels", f"{name}: {key}={value} is no Kubernetes label"


def _worker(group: Document, cluster: Document) -> Iterator[Told]:
    name = group.get("groupName")
    if not (group.get("template") or {}).get("spec", {}).get("containers"):
        yield "containers", f"{name}: no container"
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if not cluster.get("enableInTreeAutoscaling") and None in (least, most):
        yield "replicas", f"{name}: minReplicas and maxReplicas are needed without autoscaling"
    if (least or 0) < 0 or (most is not None and most < (least or 0)):
        yield "replicas", f"{name}: minReplicas {least} and maxReplicas {most} contradict"
    if group.get("suspend"):
        yield "suspend", f"{name}: a worker group of a RayService cannot be suspended"
    for field in ("idleTimeoutSeconds", "priority"):
        if group.get(field) and not _is_v2(cluster):
            yield "autoscaler-v2", f"{name}: {field} needs autoscalerOptions.version: v2"
    if group.get("idleTimeoutSeconds", 0) < 0:
        yield "idle-timeout", f"{name}: idleTimeoutSeconds is negative"
    if group.get("priority") and _version(cluster) < _PRIORITY_RAY:
        yield "ray-version", f"{name}: priority needs Ray 2.56 or newer"


def _autoscaler(cluster: Document) -> Iterator[Told]:
    options = cluster.get("autoscalerOptions") or {}
    environment = _head_env(cluster)
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "idle-timeout", "autoscalerOptions.idleTimeoutSeconds is negative"
    if "KUBERAY_GEN_AUTOSCALER_START_CMD" in _names(options.get("env")):
        yield "autoscaler-env", "KUBERAY_GEN_AUTOSCALER_START_CMD is the operator's own"
    if _V2_ENV in environment:
        if options.get("version"):
            yield "autoscaler-v2", f"autoscalerOptions.version and {_V2_ENV} are both set"
        elif not cluster.get("enableInTreeAutoscaling"):
            yield "autoscaler-v2", f"{_V2_ENV} is set without enableInTreeAutoscaling"
    if not _is_v2(cluster):
        return
    for group in [cluster["headGroupSpec"], *(cluster.get("workerGroupSpecs") or [])]:
        policy = (group.get("template") or {}).get("spec", {}).get("restartPolicy", "Never")
        if policy != "Never":
            yield "restart-policy", f"{policy}: with autoscaler v2 it is Never, or unset"


def _fault_tolerance(cluster: Document, annotations: Document) -> Iterator[Told]:
    options = cluster.get("gcsFaultToleranceOptions")
    environment = _head_env(cluster)
    started = cluster["headGroupSpec"].get("rayStartParams") or {}
    if started.get("redis-username") or "REDIS_USERNAME" in environment:
        yield "redis", "the user of Redis belongs into gcsFaultToleranceOptions.redisUsername"
    if options is None:
        if "RAY_REDIS_ADDRESS" in environment:
            yield "redis", "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
        return
    both = [one for one in ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS") if one in environment]
    both += ["rayStartParams.redis-password"] if started.get("redis-password") else []
    both += [
        one
        for one in ("ray.io/ft-enabled", "ray.io/external-storage-namespace")
        if annotations.get(one)
    ]
    for one in both:
        yield "redis", f"{one} and gcsFaultToleranceOptions are both set"
    if options.get("backend", "redis") == "rocksdb":
        yield "feature-gate", "rocksdb needs the feature gate GCSFaultToleranceEmbeddedStorage"
    elif "storage" in options:
        yield "redis", "gcsFaultToleranceOptions.storage is for rocksdb only"


def _authentication(cluster: Document) -> Iterator[Told]:
    options = cluster.get("authOptions") or {}
    if options.get("enableK8sTokenAuth"):
        yield "auth", "enableK8sTokenAuth is refused for a RayService"
    if options.get("mode") == "token" and _version(cluster) < _TOKEN_RAY:
        found = cluster.get("rayVersion", "none")
        yield "ray-version", f"authOptions.mode token needs rayVersion 2.52.0 or newer, not {found}"


def _serve_port(cluster: Document) -> Iterator[Told]:
    """The Service is made from the head's ports; once one is named, none is added."""
    containers = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    ports = _names(containers[0].get("ports"))
    if ports and "serve" not in ports:
        yield "serve-port", "the head names ports, and none is `serve`: it would get no Service"


def _is_v2(cluster: Document) -> bool:
    version = (cluster.get("autoscalerOptions") or {}).get("version")
    return bool(cluster.get("enableInTreeAutoscaling")) and version == "v2"


def _version(cluster: Document) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", str(cluster.get("rayVersion", "")))
    return tuple(int(part) for part in found.groups()) if found else (0,)


def _head_env(cluster: Document) -> set[str]:
    return _names(cluster["headGroupSpec"]["template"]["spec"]["containers"][0].get("env"))


def _names(items: list[Document] | None) -> set[str]:
    return {str(item.get("name")) for item in items or []}
