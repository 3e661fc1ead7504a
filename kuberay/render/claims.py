"""The volumes of a cache that all model pods share, as claims."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.errors import ConfigError
from kuberay.quantity import as_bytes
from kuberay.render.kustomize import Text, dump
from kuberay.render.rayservice import MODELS_CLAIM, metadata

if TYPE_CHECKING:
    from kuberay.render.environment import Environment, Values
    from kuberay.render.sizing import Sizing

_SOURCE = f"{MODELS_CLAIM}-source"
"""What the prefetch job fills, where pods read copies of a snapshot of it."""


def claims(sizing: Sizing) -> list[Values]:
    """The claims of an environment; none if its pods share no volume.

    Raises:
        ConfigError: the size that is asked for does not hold the models.
    """
    environment = sizing.environment
    cache = environment.cache
    if cache.kind != "claim":
        return []
    size = cache.size or sizing.cache_size
    if as_bytes(size) < as_bytes(sizing.cache_size):
        raise ConfigError(
            "The shared volume is smaller than its models.",
            value=size,
            remedy=f"Raise cache.size to {sizing.cache_size}, or lower cache.copies"
            f" ({cache.copies:g} copies of all models).",
        )
    if cache.snapshot is None:
        return [_claim(environment, MODELS_CLAIM, "ReadWriteMany", size)]
    api = {"apiGroup": "snapshot.storage.k8s.io", "kind": "VolumeSnapshot"}
    copy = _claim(environment, MODELS_CLAIM, "ReadOnlyMany", size)
    copy["spec"]["dataSource"] = api | {"name": cache.snapshot}
    return [_claim(environment, _SOURCE, "ReadWriteOnce", size), copy]


def patches(environment: Environment) -> list[Values]:
    """What kuberay/shared-cache becomes in an overlay: the claim that its job fills."""
    if environment.cache.snapshot is None:
        return []
    path = "/spec/jobTemplate/spec/template/spec/volumes/0/persistentVolumeClaim/claimName"
    operation = [{"op": "replace", "path": path, "value": _SOURCE}]
    target = {"kind": "CronJob", "name": "imagen-prefetch"}
    return [{"target": target, "patch": Text(dump(operation))}]


def _claim(environment: Environment, name: str, mode: str, size: str) -> Values:
    named = environment.cache.storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata(environment, name),
        "spec": {"accessModes": [mode]}
        | ({"storageClassName": named} if named else {})
        | {"resources": {"requests": {"storage": size}}},
    }
