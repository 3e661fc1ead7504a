"""Every generated file below kuberay/: what is in it, and whether it is up to date."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.errors import ConfigError
from kuberay.quantity import as_bytes, as_gi, parse_quantity
from kuberay.render.environment import BASE, load_environments
from kuberay.render.gke import compute_class, gateway
from kuberay.render.images import load_digests
from kuberay.render.kustomize import GENERATED, component, dump
from kuberay.render.monitoring import DASHBOARD, dashboard, rules
from kuberay.render.rayservice import metadata, ray_service
from kuberay.render.sizing import Sizing

if TYPE_CHECKING:
    from pathlib import Path

    from kuberay.render.environment import Environment, Values

Files = dict[str, str]
"""Text by path below kuberay/."""
# Jobs, Redis, and what KubeRay adds: the autoscaler, the clean-up of Redis.
_OTHERS = {"cpu": 8, "memory": 48 * 2**30, "pods": 20}


def render(source: Path, lock: Path) -> Files:
    """Every generated file.

    Args:
        source: configs/gke.yaml.
        lock: kuberay/images.lock; files written by hand are read from its folder.

    Raises:
        ConfigError: the source, the model registry, the lock or the monitoring files are wrong.
        GpuTooSmall: the models do not fit the GPUs.
    """
    environments, digests = load_environments(source), load_digests(lock)
    base = environments.pop(BASE)
    service, quota, site = _base_objects(base)
    documents = {
        "base/rayservice.yaml": [service],
        "base/resource-quota.yaml": [quota],
        "base/site.yaml": [site],
        "gke/gateway.yaml": gateway(base),
        "gke/rules.yaml": [rules(base, lock.parent)],
    }
    if base.gpu:
        documents["gke/compute-class.yaml"] = [compute_class(base, base.gpu)]
    for name, environment in environments.items():
        path = f"overlays/{name}/generated/kustomization.yaml"
        documents[path] = [_overlay(base, environment, digests)]
    files = {path: GENERATED + dump(*objects) for path, objects in documents.items()}
    return files | {DASHBOARD: dashboard(lock.parent)}


def _overlay(base: Environment, environment: Environment, digests: dict[str, str]) -> Values:
    before, after = _base_objects(base), _base_objects(environment)
    if environment.gke:
        before, after = before + gateway(base), after + gateway(environment)
        if base.gpu and environment.gpu:
            before.append(compute_class(base, base.gpu))
            after.append(compute_class(environment, environment.gpu))
    return component(environment, digests, before, after)


def _base_objects(environment: Environment) -> list[Values]:
    sizing = Sizing(environment)
    return [ray_service(sizing), _quota(environment), _site(sizing)]


def _quota(environment: Environment) -> Values:
    """A ceiling on the cost of a mistake: as many clusters as an upgrade runs at a time."""
    gpu, models = environment.gpu, environment.models
    clusters = gpu.during_upgrade if gpu else environment.clusters
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
    """Variables of the Jobs: the model registry, its models, and their bucket."""
    environment = sizing.environment
    data = {
        "IMAGEN_REGISTRY": str(sizing.settings.models),
        "IMAGEN_MIRROR": environment.site.mirror or "",
        "IMAGEN_MODEL_NAMES": " ".join(spec.name for spec in sizing.registry.values()),
    }
    about = metadata(environment, "imagen-site")
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": data}


def out_of_date(files: Files, folder: Path) -> list[str]:
    """Paths below `folder` that differ from `files`, are missing, or should not be there."""
    differing = [path for path, text in files.items() if _read(folder / path) != text]
    stale = [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*.yaml"))
        if str(path.relative_to(folder)) not in files and (_read(path) or "").startswith(GENERATED)
    ]
    return differing + stale


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


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
