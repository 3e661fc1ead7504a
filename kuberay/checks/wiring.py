"""Names, ports and selectors that must agree across objects: no schema sees them."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from kuberay.checks.manifests import Finding, where
from kuberay.checks.selectors import matches
from kuberay.quantity import parse_quantity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kuberay.checks.manifests import Document, Manifests, PodView

CHECK = "policy"
_CLUSTER_WIDE = frozenset({"Namespace", "ComputeClass"})
_HEALTH = "/-/healthz"
_GPU = "nvidia.com/gpu"
_CLASS = "cloud.google.com/compute-class"
_ALL_INTERFACES = ("0.0.0.0", "::")  # noqa: S104 - pods, behind network policies
Told = tuple[str, str, str]
"""Rule, place and message."""


def check(manifests: Manifests) -> list[Finding]:
    """Every disagreement."""
    told = [*_namespaces(manifests), *_references(manifests)]
    told += _selectors(manifests) if manifests.pods else []
    for service in manifests.of("RayService"):
        told += [*_ray(service, manifests), *_ports(service, manifests)]
        told += [*_groups(service, manifests), *_endpoints(service, manifests)]
        told += _token(service, manifests)
    told += [one for pod in manifests.pods for one in [*_cache(pod), *_gpu(pod, manifests)]]
    return [Finding(CHECK, rule, place, message) for rule, place, message in told]


def secrets(manifests: Manifests) -> dict[str, list[str]]:
    """Secrets that must be there first, with their keys."""
    found: dict[str, set[str]] = {}
    for document in manifests.documents:
        for node in _nodes(document):
            if isinstance(reference := node.get("secretKeyRef"), dict):
                found.setdefault(reference["name"], set()).add(reference["key"])
            if name := (node.get("oauth2ClientSecret") or {}).get("name"):
                found.setdefault(name, set()).add("key")
            if node.get("mode") == "token" and "secretName" in node:
                found.setdefault(node["secretName"], set()).add("auth_token")
    return {name: sorted(keys) for name, keys in sorted(found.items())}


def _nodes(node: Any) -> Iterator[Document]:
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, dict | list):
            yield from _nodes(child)


def _namespaces(manifests: Manifests) -> Iterator[Told]:
    known = {space["metadata"]["name"] for space in manifests.of("Namespace")}
    for one in manifests.documents:
        if known and one["kind"] not in _CLUSTER_WIDE:
            found = (one.get("metadata") or {}).get("namespace")
            if found not in known:
                yield "namespace", where(one), f"namespace {found} is none of {sorted(known)}"


def _references(manifests: Manifests) -> Iterator[Told]:
    accounts = {one["metadata"]["name"] for one in manifests.of("ServiceAccount")}
    maps = {one["metadata"]["name"] for one in manifests.of("ConfigMap")}
    for pod in manifests.pods:
        account = pod.spec.get("serviceAccountName", "default")
        if accounts and account not in {*accounts, "default"}:
            yield "service-account", pod.where, f"there is no ServiceAccount {account}"
        for container in pod.containers:
            for source in container.get("envFrom") or []:
                name = (source.get("configMapRef") or {}).get("name")
                if name and name not in maps:
                    yield "config-map", pod.where, f"there is no ConfigMap {name}"


def _ray(service: Document, manifests: Manifests) -> Iterator[Told]:
    cluster: Document = service["spec"]["rayClusterConfig"]
    installed = version("ray")
    if str(cluster.get("rayVersion")) != installed:
        told = f"rayVersion {cluster.get('rayVersion')} is not the application's {installed}"
        yield "ray-version", where(service), told
    address = (cluster.get("gcsFaultToleranceOptions") or {}).get("redisAddress")
    if address:
        parts = urlsplit(address)
        ports = {
            one["metadata"]["name"]: {port["port"] for port in one["spec"].get("ports", [])}
            for one in manifests.of("Service")
        }
        if ports and parts.port not in ports.get(str(parts.hostname), set()):
            yield "redis", where(service), f"no Service answers at {address}"


def _ports(service: Document, manifests: Manifests) -> Iterator[Told]:
    """From the load balancer through the Service to the proxy, one port and one name."""
    config = manifests.serve_config(service)
    port = (config.get("http_options") or {}).get("port", 8000)
    for pod in manifests.pods:
        if pod.role != "other" and pod.port_names.get("serve") != port:
            told = f"Serve listens on {port}, the port `serve` is {pod.port_names.get('serve')}"
            yield "serve-port", pod.where, told
        if pod.role == "worker":
            yield from _readiness(pod, port)
    yield from _way_in(manifests, f"{service['metadata']['name']}-serve-svc", port)


def _way_in(manifests: Manifests, name: str, port: int) -> Iterator[Told]:
    """What leads to the Service that KubeRay makes, whose name and port are its own choice."""
    for route in manifests.of("HTTPRoute"):
        rules = route["spec"].get("rules") or []
        for backend in (one for rule in rules for one in rule.get("backendRefs") or []):
            if (backend.get("name"), backend.get("port")) != (name, port):
                yield "route", where(route), f"KubeRay makes the Service {name}, port {port}"
    for one in manifests.of("HealthCheckPolicy", "GCPBackendPolicy"):
        if one["spec"]["targetRef"].get("name") != name:
            yield "route", where(one), f"KubeRay makes the Service {name}"
    for one in manifests.of("HealthCheckPolicy"):
        asked = one["spec"]["default"]["config"].get("httpHealthCheck") or {}
        if (asked.get("port"), asked.get("requestPath")) != (port, _HEALTH):
            yield "health-check", where(one), f"Serve answers on {port}{_HEALTH}, `/` is a 404"


def _readiness(pod: PodView, port: int) -> Iterator[Told]:
    asked = (pod.main.get("readinessProbe") or {}).get("httpGet") or {}
    number = pod.port_names.get(str(asked.get("port")), asked.get("port"))
    if (number, asked.get("path")) != (port, _HEALTH):
        told = f"no readinessProbe by httpGet {port}{_HEALTH}: KubeRay would run wget in the image"
        yield "readiness-probe", pod.where, told


def _groups(service: Document, manifests: Manifests) -> Iterator[Told]:
    cluster: Document = service["spec"]["rayClusterConfig"]
    groups = {g["groupName"]: g for g in cluster.get("workerGroupSpecs") or []}
    labels = {pod.group: pod.labels for pod in manifests.pods if pod.role == "worker"}
    for application in manifests.serve_config(service).get("applications") or []:
        for one in application.get("deployments") or []:
            options = one.get("ray_actor_options") or {}
            place = where(service, str(one.get("name")))
            if options.get("accelerator_type"):
                told = "accelerator_type does not scale from zero: use label_selector"
                yield "accelerator-type", place, told
            wanted = (options.get("label_selector") or {}).items()
            held = [name for name in groups if wanted <= labels[name].items()]
            if not held:
                yield "label-selector", place, f"no group has the labels {dict(wanted)}"
            if one.get("name") == "Ingress":
                for name in (n for n in held if not groups[n].get("minReplicas")):
                    told = f"it may run in {name}, and keep that from scaling to zero"
                    yield "ingress-group", place, told


def _endpoints(service: Document, manifests: Manifests) -> Iterator[Told]:
    """What leaves the Service without a pod that answers, though every object is right."""
    spec, place = service["spec"], where(service)
    if spec.get("suspend") or spec["rayClusterConfig"].get("suspend"):
        yield "suspend", place, "suspend is true: KubeRay would take every pod away"
    config = manifests.serve_config(service)
    proxies = config.get("proxy_location", "EveryNode")
    if proxies != "EveryNode":
        told = f"proxy_location {proxies}: no proxy runs in the ingress pods; take EveryNode"
        yield "proxy-location", place, told
    host = (config.get("http_options") or {}).get("host", "0.0.0.0")  # noqa: S104 - Serve's default
    if host not in _ALL_INTERFACES:
        yield "serve-host", place, f"Serve listens on {host} alone, where nobody outside the pod is"


def _token(service: Document, manifests: Manifests) -> Iterator[Told]:
    """Ray's autoscaler, beside the head, changes the RayCluster."""
    if not service["spec"]["rayClusterConfig"].get("enableInTreeAutoscaling"):
        return
    key = "automountServiceAccountToken"
    accounts = {one["metadata"]["name"]: one.get(key) for one in manifests.of("ServiceAccount")}
    for pod in (one for one in manifests.pods if one.role == "head"):
        account = accounts.get(pod.spec.get("serviceAccountName", "default"))
        if pod.spec.get(key, account) is False:
            told = f"{key} is not true: the autoscaler cannot add or remove pods"
            yield "head-token", pod.where, told


def _selectors(manifests: Manifests) -> Iterator[Told]:
    """A selector that matches nothing protects, monitors and routes nothing."""
    for one in manifests.of("PodDisruptionBudget", "PodMonitoring", "NetworkPolicy", "Service"):
        key = "podSelector" if one["kind"] == "NetworkPolicy" else "selector"
        selector = one["spec"].get(key) or {}
        if one["kind"] == "Service":
            selector = {"matchLabels": selector}
        matched = [pod for pod in manifests.pods if matches(selector, pod.labels)]
        if not matched:
            yield "selector", where(one), f"no pod has what it selects: {selector}"
        for endpoint in one["spec"].get("endpoints") or []:
            for pod in matched:
                if endpoint["port"] not in pod.port_names:
                    yield "port-name", where(one), f"{pod.where} has no port {endpoint['port']}"


def _cache(pod: PodView) -> Iterator[Told]:
    """The model store lies on a volume, and the volume within the pod's disk."""
    environment = {one["name"]: one.get("value") for one in pod.main.get("env") or []}
    mounts = {one["mountPath"]: one["name"] for one in pod.main.get("volumeMounts") or []}
    store = environment.get("IMAGEN_MODELS")
    if store and store not in mounts:
        yield "cache", pod.where, f"IMAGEN_MODELS {store} is on no volume"
    disk = _limits(pod.main).get("ephemeral-storage")
    for volume in pod.spec.get("volumes") or []:
        size = (volume.get("emptyDir") or {}).get("sizeLimit")
        if size and (disk is None or parse_quantity(disk) < parse_quantity(size)):
            told = f"ephemeral-storage {disk} is less than the {size} of {volume['name']}"
            yield "cache", pod.where, f"{told}: the kubelet would end the pod"


def _gpu(pod: PodView, manifests: Manifests) -> Iterator[Told]:
    gpus = parse_quantity(_limits(pod.main).get(_GPU, 0))
    if gpus:
        keys = {one.get("key") for one in pod.spec.get("tolerations") or []}
        if _GPU not in keys:
            yield "toleration", pod.where, f"GPU nodes are tainted {_GPU}, which it does not bear"
    classes = {one["metadata"]["name"]: one["spec"] for one in manifests.of("ComputeClass")}
    wanted = (pod.spec.get("nodeSelector") or {}).get(_CLASS)
    if classes and wanted not in classes and (wanted or gpus):
        told = (
            f"there is no ComputeClass {wanted}" if wanted else f"its nodeSelector lacks {_CLASS}"
        )
        yield "compute-class", pod.where, told
    rules = classes.get(wanted, {}).get("priorities") or []
    counts = [one["gpu"]["count"] for one in rules if "gpu" in one]
    if counts and gpus > max(counts):
        told = f"it asks for {gpus} GPUs, a node of {wanted} has {max(counts)}"
        yield "gpu-count", pod.where, told


def _limits(container: Document) -> Document:
    return (container.get("resources") or {}).get("limits") or {}
