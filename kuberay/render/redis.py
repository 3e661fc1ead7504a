"""Redis, which has Ray's state and the jobs: how pods reach it, and what it changes in the base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kuberay.render.environment import OWN_REDIS
from kuberay.render.kustomize import Text, dump

if TYPE_CHECKING:
    from kuberay.render.environment import Environment, PodSource, RedisSource, Values

_SECRET = "imagen-redis"  # noqa: S105 - its name
_PASSWORD: Values = {"valueFrom": {"secretKeyRef": {"name": _SECRET, "key": "password"}}}
_CERTIFICATE = "ca.pem"
_FOLDER = "/etc/imagen-redis"
_VOLUME = "redis-ca"


def fault_tolerance(redis: RedisSource | None) -> Values:
    """Where Ray's head keeps its state, as fields of the rayClusterConfig."""
    if redis is None:
        return {}
    return {"gcsFaultToleranceOptions": {"redisAddress": redis.address, "redisPassword": _PASSWORD}}


def connected(pods: PodSource, redis: RedisSource | None) -> PodSource:
    """Pods with a REDIS_URL, and the certificate of a Redis that has an authority of its own."""
    if redis is None:
        return pods
    scheme, _, place = redis.address.partition("://")
    url = f"{scheme}://:$(IMAGEN_REDIS_PASSWORD)@{place}/0"  # KubeRay refuses REDIS_PASSWORD
    if not redis.own_ca:
        return pods.model_copy(
            update={"env": {"IMAGEN_REDIS_PASSWORD": _PASSWORD, "REDIS_URL": url} | pods.env}
        )
    file = f"{_FOLDER}/{_CERTIFICATE}"
    env = {
        "IMAGEN_REDIS_PASSWORD": _PASSWORD,
        "REDIS_URL": f"{url}?ssl_ca_certs={file}",
        "RAY_REDIS_CA_CERT": file,
    }
    items = [{"key": _CERTIFICATE, "path": _CERTIFICATE}]
    volume = {"name": _VOLUME, "secret": {"secretName": _SECRET, "items": items}}
    mount = {"name": _VOLUME, "mountPath": _FOLDER, "readOnly": True}
    added = {
        "env": env | pods.env,
        "pod": _appended(pods.pod, "volumes", volume),
        "container": _appended(pods.container, "volumeMounts", mount),
    }
    return pods.model_copy(update=added)


def patches(environment: Environment) -> list[Values]:
    """What kuberay/base/redis.yaml and its NetworkPolicies become in an overlay."""
    redis = environment.redis
    if redis is None:
        return []
    if redis.inside:
        operations = _disk(redis)
        return [_patch("StatefulSet", OWN_REDIS, operations)] if operations else []
    egress = [{"op": "replace", "path": "/spec/egress/0", "value": _way_out(redis)}]
    return [
        *(_deleted(kind, OWN_REDIS) for kind in ("StatefulSet", "Service", "ServiceAccount")),
        _deleted("NetworkPolicy", "redis"),
        *(_patch("NetworkPolicy", name, egress) for name in ("to-redis", "jobs-to-redis")),
    ]


def _disk(redis: RedisSource) -> list[Values]:
    claim = "/spec/volumeClaimTemplates/0/spec"
    values = {"add": ("storageClassName", redis.storage_class)}
    values |= {"replace": ("resources/requests/storage", redis.disk)}
    return [
        {"op": op, "path": f"{claim}/{path}", "value": value}
        for op, (path, value) in values.items()
        if value
    ]


def _way_out(redis: RedisSource) -> Values:
    """A rule by address where the URL has one. No policy can name a host."""
    rule: Values = {"ports": [{"protocol": "TCP", "port": redis.port}]}
    return ({"to": [{"ipBlock": {"cidr": f"{redis.ip}/32"}}]} if redis.ip else {}) | rule


def _patch(kind: str, name: str, operations: Any) -> Values:
    return {"target": {"kind": kind, "name": name}, "patch": Text(dump(operations))}


def _deleted(kind: str, name: str) -> Values:
    nothing = {"$patch": "delete", "apiVersion": "v1", "kind": kind, "metadata": {"name": name}}
    return _patch(kind, name, nothing)


def _appended(values: Values, key: str, one: Values) -> Values:
    return values | {key: [*values.get(key, []), one]}
