"""The RayService: head, ingress and model pods around the Serve config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kuberay.render.environment import Cache, Environment, PodSource, Values, merged
from kuberay.render.kustomize import Text, dump
from kuberay.render.redis import connected, fault_tolerance
from kuberay.render.serve_config import serve_config

if TYPE_CHECKING:
    from kuberay.render.sizing import Sizing

SERVE_PORT = 8000
MODELS_CLAIM = "imagen-models"
"""The volume that all model pods read."""
_MOUNT = "/models"
"""Where the cache is in a model pod; the prefetch job has the same."""
_WORKER_PORTS = {"serve": SERVE_PORT, "metrics": 8080}
# All of them: KubeRay adds its defaults only if none is given, and needs one named `serve`.
_HEAD_PORTS = _WORKER_PORTS | {
    "gcs-server": 6379,
    "dashboard": 8265,
    "client": 10001,
    "as-metrics": 44217,
    "dash-metrics": 44227,
}
# KubeRay's own probe runs wget in the container. One miss takes the pod out of the Service, because
# a pod without a proxy answers 503.
_READINESS = {
    "httpGet": {"path": "/-/healthz", "port": "serve"},
    "periodSeconds": 5,
    "timeoutSeconds": 5,
    "failureThreshold": 1,
}


def ray_service(sizing: Sizing) -> Values:
    """The RayService of an environment."""
    environment = sizing.environment
    # The head's Serve controller counts jobs, ingress pods take and carry them.
    heads, ingresses = (
        connected(pods, environment.redis) for pods in (environment.head, environment.ingress)
    )
    head = _container("ray-head", heads, environment, _HEAD_PORTS)
    ingress = _container("ray-worker", ingresses, environment, _WORKER_PORTS)
    groups = {
        "headGroupSpec": _group(heads, environment, head),
        "workerGroupSpecs": [_worker_group(ingresses, environment, ingress), _models(sizing)],
    }
    cluster = environment.ray_cluster | fault_tolerance(environment.redis) | groups
    # For readers and for the check of timeouts; nothing in the cluster reads it.
    client = {"imagen.dev/client-timeout-s": str(environment.timeouts_s.client)}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": metadata(environment) | {"annotations": client},
        "spec": environment.ray_service
        | {"serveConfigV2": Text(dump(serve_config(sizing))), "rayClusterConfig": cluster},
    }


def metadata(environment: Environment, name: str | None = None) -> Values:
    """The metadata of an object; `name` defaults to that of the service."""
    labels = {"app.kubernetes.io/name": "imagen"}
    return {"name": name or environment.name, "namespace": environment.namespace, "labels": labels}


def _models(sizing: Sizing) -> Values:
    environment = sizing.environment
    source, cache = environment.models, environment.cache
    memory = {"rayStartParams": {"memory": str(sizing.pod_memory_bytes)}}
    most = {"maxReplicas": environment.gpu.max_nodes} if environment.gpu else {}
    derived = {
        "group": merged(source.group, most | memory),
        "size": source.size | {"ephemeral-storage": sizing.disk_size},
        "env": {"IMAGEN_MODELS": _MOUNT} | source.env,
    }
    filled = source.model_copy(update=derived)
    container = _container("ray-worker", filled, environment, _WORKER_PORTS)
    mount = {"name": "models", "mountPath": _MOUNT}
    container["volumeMounts"] = [mount | ({"readOnly": True} if cache.mounted_read_only else {})]
    group = _worker_group(filled, environment, container)
    pod = group["template"]["spec"]
    pod["volumes"] = [_volume(cache, sizing.cache_size)]
    if cache.kind == "hostPath" and not cache.read_only:
        pod["initContainers"] = [_own_cache(container)]
    return group


def _volume(cache: Cache, size: str) -> Values:
    if cache.kind == "emptyDir":
        return {"name": "models", "emptyDir": {"sizeLimit": size}}
    if cache.kind == "claim":
        claim = {"claimName": MODELS_CLAIM, "readOnly": True}
        return {"name": "models", "persistentVolumeClaim": claim}
    kind = "Directory" if cache.read_only else "DirectoryOrCreate"
    return {"name": "models", "hostPath": {"path": cache.path, "type": kind}}


def _own_cache(container: Values) -> Values:
    """Kubernetes creates the node's folder for root; this gives it to the user of the image."""
    small = {"cpu": "100m", "memory": "64Mi"}
    return {
        "name": "own-cache",
        **{key: container[key] for key in ("image", "imagePullPolicy") if key in container},
        "command": ["chown", "1000:1000", _MOUNT],
        "resources": {"requests": small, "limits": small},
        "securityContext": {
            "runAsNonRoot": False,
            "runAsUser": 0,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"], "add": ["CHOWN"]},
        },
        "volumeMounts": container["volumeMounts"],
    }


def _container(
    name: str, source: PodSource, environment: Environment, ports: dict[str, int]
) -> Values:
    container: Values = {
        "name": name,
        "image": source.image,
        "resources": {"requests": source.size, "limits": dict(source.size)},
        "ports": [{"name": port, "containerPort": number} for port, number in ports.items()],
    }
    if source.env:
        container["env"] = [
            {"name": key} | (value if isinstance(value, dict) else {"value": value})
            for key, value in source.env.items()
        ]
    return container | merged(environment.every_pod.container, source.container)


def _worker_group(source: PodSource, environment: Environment, container: Values) -> Values:
    group = _group(source, environment, container | {"readinessProbe": _READINESS})
    return group | {"scaleStrategy": {}}  # the operator would add it: see _group


def _group(source: PodSource, environment: Environment, container: Values) -> Values:
    """A group, including the empty mappings that the operator would add.

    If the operator added them, it would own the list of worker groups, and the next
    `kubectl apply --server-side` would conflict with it.
    """
    pod = merged(environment.every_pod.pod, source.pod) | {"containers": [container]}
    about = {"labels": source.labels, "annotations": source.annotations}
    about = {key: values for key, values in about.items() if values}
    return source.group | {"template": {"metadata": about, "spec": pod}}
