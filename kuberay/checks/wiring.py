"""Names, ports and labels that must agree across objects. Every object alone is valid."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from kuberay.checks.manifests import Finding, Manifests, PodView, matches, walk, where
from kuberay.quantity import parse_quantity

if TYPE_CHECKING:
    from collections.abc import Iterator


_CLUSTER_WIDE = frozenset({"Namespace", "ComputeClass"})
_SELECTING = ("PodDisruptionBudget", "PodMonitoring", "PodMonitor", "NetworkPolicy", "Service")
_HEALTH = "/-/healthz"
_NOT_ON_GPUS = ("Ingress", "JobWorker", "Redis")
_GPU = "nvidia.com/gpu"
_CLASS = "cloud.google.com/compute-class"
_GOOGLE = (".gke.io", "cloud.google.com", "monitoring.googleapis.com")
_TOKEN = "automountServiceAccountToken"  # noqa: S105 - a key, no token
_ALL_INTERFACES = ("0.0.0.0", "::")  # noqa: S104 - pods, behind network policies


def check(manifests: Manifests) -> Iterator[Finding]:
    """Every disagreement."""
    yield from _namespaces(manifests)
    yield from _selectors(manifests)
    for pod in manifests.pods:
        yield from _gpu(pod, manifests)
    yield from _cluster(manifests)
    yield from _serve(manifests)
    yield from _keys(manifests)
    port = manifests.http_options.get("port", 8000)
    yield from _ports(manifests, port)
    yield from _way_in(manifests, port)


def secrets(manifests: Manifests) -> dict[str, list[str]]:
    """The Secrets that must exist before the first apply, and their keys."""
    keys: dict[str, set[str]] = {}
    for node in (one for one in walk(manifests.documents) if isinstance(one, dict)):
        if isinstance(reference := node.get("secretKeyRef"), dict):
            keys.setdefault(reference["name"], set()).add(reference["key"])
        if isinstance(secret := node.get("secret"), dict) and "secretName" in secret:
            files = {item["key"] for item in secret.get("items") or []}
            keys.setdefault(secret["secretName"], set()).update(files)
        if name := (node.get("oauth2ClientSecret") or {}).get("name"):
            keys.setdefault(name, set()).add("key")
        if node.get("mode") == "token" and "secretName" in node:
            keys.setdefault(node["secretName"], set()).add("auth_token")
    return {name: sorted(of_one) for name, of_one in sorted(keys.items())}


def _namespaces(manifests: Manifests) -> Iterator[Finding]:
    known = {space["metadata"]["name"] for space in manifests.of("Namespace")}
    for one in manifests.documents if known else []:
        namespace = one["metadata"].get("namespace")
        if one["kind"] not in _CLUSTER_WIDE and namespace not in known:
            message = f"namespace {namespace} is not in {sorted(known)}"
            yield Finding("namespace", where(one), message)


def _selectors(manifests: Manifests) -> Iterator[Finding]:
    """A selector without a match protects, monitors and routes nothing, without an error."""
    for one in manifests.of(*_SELECTING):
        spec = one["spec"]
        selector = spec.get("podSelector" if one["kind"] == "NetworkPolicy" else "selector") or {}
        if one["kind"] == "Service":
            selector = {"matchLabels": selector}
        matched = [pod for pod in manifests.pods if matches(selector, pod.labels)]
        if not matched:
            yield Finding("selector", where(one), f"no pod matches its selector: {selector}")
        for endpoint in spec.get("endpoints") or spec.get("podMetricsEndpoints") or []:
            for pod in matched:
                if endpoint["port"] not in pod.port_names:
                    message = f"{pod.where} has no port named {endpoint['port']}"
                    yield Finding("port-name", where(one), message)


def _gpu(pod: PodView, manifests: Manifests) -> Iterator[Finding]:
    """GPU pods find a node: otherwise they are pending for ever."""
    gpus = parse_quantity(pod.limits.get(_GPU, 0))
    if gpus and _GPU not in {one.get("key") for one in pod.spec.get("tolerations") or []}:
        message = f"it does not tolerate the taint {_GPU} of GPU nodes"
        yield Finding("toleration", pod.where, message)
    classes = {one["metadata"]["name"]: one["spec"] for one in manifests.of("ComputeClass")}
    name = (pod.spec.get("nodeSelector") or {}).get(_CLASS)
    if classes and name not in classes and (name or gpus):
        message = f"there is no ComputeClass {name}" if name else f"its nodeSelector lacks {_CLASS}"
        yield Finding("compute-class", pod.where, message)
    foreign = not any(part in str(one) for one in _groups(manifests) for part in _GOOGLE)
    for key in pod.spec.get("nodeSelector") or {} if foreign else {}:
        if key.partition("/")[0].endswith(_GOOGLE):
            message = f"only Google's nodes have the label {key}, and nothing here is for GKE"
            yield Finding("google-label", pod.where, message)
    for node in classes.get(name, {}).get("priorities") or []:
        if gpus > (most := node.get("gpu", {}).get("count", gpus)):
            message = f"it asks for {gpus} GPUs; a node of {name} has {most}"
            yield Finding("gpu-count", pod.where, message)


def _groups(manifests: Manifests) -> set[str]:
    """The API groups of the objects."""
    return {str(one.get("apiVersion")).partition("/")[0] for one in manifests.documents}


def _cluster(manifests: Manifests) -> Iterator[Finding]:
    place, cluster = where(manifests.service), manifests.cluster
    if manifests.service["spec"].get("suspend") or cluster.get("suspend"):
        yield Finding("suspend", place, "suspend is true: KubeRay would remove every pod")
    installed = version("ray")
    if str(cluster.get("rayVersion")) != installed:
        message = f"rayVersion {cluster.get('rayVersion')} is not the application's {installed}"
        yield Finding("ray-version", place, message)
    accounts = {one["metadata"]["name"]: one for one in manifests.of("ServiceAccount")}
    for pod in (one for one in manifests.pods if one.role == "head"):
        account = accounts.get(pod.spec.get("serviceAccountName", "default"), {})
        allowed = pod.spec.get(_TOKEN, account.get(_TOKEN))
        if cluster.get("enableInTreeAutoscaling") and allowed is False:
            message = f"{_TOKEN} is not true: Ray's autoscaler could not add or remove pods"
            yield Finding("head-token", pod.where, message)


def _serve(manifests: Manifests) -> Iterator[Finding]:
    """Settings of Serve that leave the Service without an endpoint, or a GPU node running."""
    place = where(manifests.service)
    proxies = manifests.serve_config.get("proxy_location", "EveryNode")
    if proxies != "EveryNode":
        message = f"proxy_location {proxies}: the ingress pods would have no proxy; set EveryNode"
        yield Finding("proxy-location", place, message)
    host = manifests.http_options.get("host", "0.0.0.0")  # noqa: S104 - the default
    if host not in _ALL_INTERFACES:
        message = f"Serve listens on {host}, which only its own pod can reach; set 0.0.0.0"
        yield Finding("serve-host", place, message)
    # An ingress replica never stops, so that its node never scales down; a worker would start one.
    labels = {pod.group: pod.labels for pod in manifests.pods}
    for one in (one for one in manifests.deployments if one.get("name") in _NOT_ON_GPUS):
        selector = (one.get("ray_actor_options") or {}).get("label_selector") or {}
        for group in manifests.groups:
            name = group["groupName"]
            if selector.items() <= labels[name].items() and not group.get("minReplicas"):
                message = f"it may run in {name}, which would not scale to zero: set label_selector"
                yield Finding("ingress-group", f"{place} {one['name']}", message)


def _keys(manifests: Manifests) -> Iterator[Finding]:
    """The file of API keys is in every pod that may hold an ingress replica."""
    selector = (manifests.ingress.get("ray_actor_options") or {}).get("label_selector") or {}
    access = manifests.clients.get("access") or {}
    file, asks = access.get("keys"), access.get("auth", "keys") == "keys"
    for pod in (one for one in manifests.pods if one.role == "worker" and asks):
        mounts = [one["mountPath"] for one in pod.main.get("volumeMounts") or []]
        inside = file and any(PurePosixPath(file).is_relative_to(mount) for mount in mounts)
        if not inside and selector.items() <= pod.labels.items():
            message = f"access.keys {file} is in no mounted volume: no key would work"
            yield Finding("keys-file", pod.where, message)


def _ports(manifests: Manifests, port: int) -> Iterator[Finding]:
    for pod in (one for one in manifests.pods if one.role != "other"):
        number = pod.port_names.get("serve")
        if number != port:
            message = f"Serve listens on {port}, and the port named `serve` is {number}"
            yield Finding("serve-port", pod.where, message)
        probe = (pod.main.get("readinessProbe") or {}).get("httpGet") or {}
        number = pod.port_names.get(str(probe.get("port")), probe.get("port"))
        if pod.role == "worker" and (number, probe.get("path")) != (port, _HEALTH):
            message = f"set a readinessProbe, httpGet {port}{_HEALTH}: KubeRay's own runs wget"
            yield Finding("readiness-probe", pod.where, message)


def _way_in(manifests: Manifests, port: int) -> Iterator[Finding]:
    """What leads to the Service that KubeRay creates, under a name and port of its choice."""
    name = f"{manifests.service['metadata']['name']}-serve-svc"
    policies = manifests.of("HealthCheckPolicy", "GCPBackendPolicy")
    wrong = [one for one in policies if one["spec"]["targetRef"].get("name") != name]
    for route in manifests.of("HTTPRoute"):
        backends = [to for rule in route["spec"].get("rules") or [] for to in rule["backendRefs"]]
        wrong += [route for to in backends if (to.get("name"), to.get("port")) != (name, port)]
    for one in wrong:
        yield Finding("route", where(one), f"KubeRay creates the Service {name}, port {port}")
    for policy in manifests.of("HealthCheckPolicy"):
        probe = policy["spec"]["default"]["config"].get("httpHealthCheck") or {}
        if (probe.get("port"), probe.get("requestPath")) != (port, _HEALTH):
            message = f"Serve answers on {port}{_HEALTH}; `/` answers 404"
            yield Finding("health-check", where(policy), message)
