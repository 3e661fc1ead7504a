"""Every generated file below kuberay/: what is in it, and whether it is up to date."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from deployments.errors import ConfigError
from kuberay.quantity import as_bytes, as_gi, parse_quantity
from kuberay.render import claims, gke, portable, redis
from kuberay.render.environment import BASE, Environment, Values, load_environments
from kuberay.render.images import load_digests
from kuberay.render.kustomize import GENERATED, component, dump
from kuberay.render.rayservice import metadata, ray_service
from kuberay.render.sizing import Sizing

if TYPE_CHECKING:
    from pathlib import Path


Files = dict[str, str]
"""Text by path below kuberay/."""
# Jobs, Redis, and what KubeRay adds: the autoscaler, the clean-up of Redis.
_OTHERS = {"cpu": 8, "memory": 48 * 2**30, "pods": 20}


def render(source: Path, lock: Path) -> Files:
    """Every generated file.

    Args:
        source: configs/gke.yaml.
        lock: kuberay/images.lock; the alerts are in the same folder.

    Raises:
        ConfigError: the source, the model registry, the lock or the alerts are wrong.
        GpuTooSmall: the models do not fit the GPUs.
    """
    environments, digests = load_environments(source), load_digests(lock)
    base = environments.pop(BASE)
    documents = _objects(base, "gke", "portable")
    alerts = lock.parent / "monitoring/alerts.yaml"
    documents["gke/rules.yaml"] = [gke.rules(base, alerts)]
    documents["portable/prometheus-rule.yaml"] = [portable.rules(base, alerts)]
    for name, environment in environments.items():
        before = _objects(base, environment.platform)
        after = _objects(environment, environment.platform)
        pairs = [
            pair for path in before for pair in zip(before[path], after.get(path, ()), strict=False)
        ]
        path = f"overlays/{name}/generated/kustomization.yaml"
        further = [*redis.patches(environment), *claims.patches(environment)]
        shared = claims.claims(Sizing(environment))
        resources = {"resources": ["models.yaml"]} if shared else {}
        documents[path] = [component(environment, digests, pairs, further) | resources]
        if shared:
            documents[f"overlays/{name}/generated/models.yaml"] = shared
    return {path: GENERATED + dump(*objects) for path, objects in documents.items()}


def _objects(environment: Environment, *platforms: str | None) -> dict[str, list[Values]]:
    """The objects of an environment on these platforms, by the file that has those of the base."""
    sizing = Sizing(environment)
    objects = {
        "base/rayservice.yaml": [ray_service(sizing)],
        "base/resource-quota.yaml": [_quota(environment)],
        "base/site.yaml": [_site(sizing), _jobs_account(environment)],
    }
    if "gke" in platforms:
        objects["gke/gateway.yaml"] = gke.gateway(environment)
        if environment.gpu:
            objects["gke/compute-class.yaml"] = [gke.compute_class(environment, environment.gpu)]
    if "portable" in platforms:
        objects["portable/gateway.yaml"] = portable.gateway(environment)
    return objects


def _quota(environment: Environment) -> Values:
    """A ceiling on the cost of a mistake: as many clusters as an upgrade runs at a time."""
    gpu, models = environment.gpu, environment.models
    clusters = environment.clusters
    pods: list[tuple[dict[str, str], int]] = [
        (environment.head.size, 1),
        (environment.ingress.size, environment.ingress.group["maxReplicas"]),
        (models.size, gpu.max_nodes if gpu else models.group["maxReplicas"]),
    ]
    cpus = sum(parse_quantity(size["cpu"]) * n for size, n in pods) * clusters
    memory_bytes = sum(as_bytes(size["memory"]) * n for size, n in pods) * clusters
    hard = {
        "requests.cpu": str(-(-(cpus + _OTHERS["cpu"]) // 1)),
        "requests.memory": as_gi(memory_bytes + _OTHERS["memory"]),
        "pods": str(sum(n for _, n in pods) * clusters + _OTHERS["pods"]),
    }
    if gpu:
        hard["requests.nvidia.com/gpu"] = str(gpu.max_nodes * clusters)
    return {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": metadata(environment, "imagen"),
        "spec": {"hard": hard},
    }


def _site(sizing: Sizing) -> Values:
    """Variables of the Jobs: the model registries, the models to serve, and their bucket."""
    environment = sizing.environment
    data = {
        "IMAGEN_REGISTRY": os.pathsep.join(map(str, sizing.settings.models)),
        "IMAGEN_MIRROR": environment.site.mirror or "",
        "IMAGEN_MODEL_NAMES": " ".join(spec.name for spec in sizing.registry.models),
    }
    about = metadata(environment, "imagen-site")
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": data}


def _jobs_account(environment: Environment) -> Values:
    """The account of the ingress pods; on GKE it stands for one of Google's."""
    about = metadata(environment, "imagen-ingress")
    if environment.site.jobs_account:
        google = {"iam.gke.io/gcp-service-account": environment.site.jobs_account}
        about = about | {"annotations": google}
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": about,
        "automountServiceAccountToken": False,
    }


def out_of_date(files: Files, folder: Path) -> list[str]:
    """Paths below `folder` that differ from `files`, are missing, or should not be there."""
    there = {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.yaml"))
    }
    stale = [path for path, text in there.items() if text.startswith(GENERATED)]
    return [path for path, text in files.items() if there.get(path) != text] + [
        path for path in stale if path not in files
    ]


def write(files: Files, folder: Path) -> list[str]:
    """Bring `folder` up to date; returns the paths that changed.

    Raises:
        ConfigError: a file cannot be written.
    """
    changed = out_of_date(files, folder)
    try:
        for path in changed:
            if path in files:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(files[path], encoding="utf-8")
            else:
                (folder / path).unlink()
    except OSError as error:
        raise ConfigError("The manifests cannot be written.", value=error) from error
    return changed
