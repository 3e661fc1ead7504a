"""configs/gke.yaml to files below kuberay/."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.errors import ConfigError
from kuberay.quantity import as_bytes, as_gi, parse_quantity
from kuberay.render.cluster import metadata, ray_service
from kuberay.render.gke import compute_class, gateway
from kuberay.render.images import load_digests
from kuberay.render.monitoring import DASHBOARD, dashboard, rules
from kuberay.render.overlay import component
from kuberay.render.prefetch import prefetch
from kuberay.render.sizing import Sizing, check_names
from kuberay.render.source import BASE, load_environments
from kuberay.render.yamls import GENERATED, generated

if TYPE_CHECKING:
    from pathlib import Path

    from kuberay.render.source import Environment, PodSource, Values

Files = dict[str, str]
"""Text by path below kuberay/."""
# Jobs, Redis, and what KubeRay adds: the autoscaler, the clean-up of Redis.
_BESIDE = {"cpu": 8, "memory": 48 * 2**30, "pods": 20}


def render(source: Path, lock: Path) -> Files:
    """Every generated file.

    Raises:
        ConfigError: the source, the registry, the lock of images or a file by hand is wrong.
        GpuTooSmall: the models do not fit the GPUs.
    """
    environments = load_environments(source)
    digests = load_digests(lock)
    base = environments.pop(BASE)
    files = _base(base, lock.parent)
    for name, environment in environments.items():
        files[f"overlays/{name}/generated/kustomization.yaml"] = _overlay(
            base, environment, digests, lock.parent
        )
    return files


def _base(base: Environment, folder: Path) -> Files:
    service, quota, site = _objects(base)
    files = {
        "base/rayservice.yaml": generated(service),
        "base/resource-quota.yaml": generated(quota),
        "base/site.yaml": generated(site),
        "gke/gateway.yaml": generated(*gateway(base)),
        "gke/rules.yaml": generated(rules(base, folder)),
        DASHBOARD: dashboard(folder),
    }
    if base.gpu:
        files["gke/compute-class.yaml"] = generated(compute_class(base, base.gpu))
    return files


def _overlay(
    base: Environment, environment: Environment, digests: dict[str, str], folder: Path
) -> str:
    ours, theirs = _objects(base), _objects(environment)
    if environment.gke:
        ours, theirs = ours + gateway(base), theirs + gateway(environment)
        if base.gpu and environment.gpu:
            ours.append(compute_class(base, base.gpu))
            theirs.append(compute_class(environment, environment.gpu))
    if environment.cache.kind == "hostPath":
        written, wanted = prefetch(folder, environment.cache)
        ours, theirs = [*ours, written], [*theirs, wanted]
    return generated(component(environment, digests, ours, theirs))


def _objects(environment: Environment) -> list[Values]:
    """The generated objects of kuberay/base."""
    check_names(environment)
    sizing = Sizing(environment)
    return [ray_service(sizing), _quota(environment), _site(sizing)]


def _quota(environment: Environment) -> Values:
    """A ceiling on what a mistake can cost: the largest cluster, as often as an upgrade runs it."""
    models, gpu = environment.models, environment.gpu
    clusters = gpu.during_upgrade if gpu else environment.clusters
    most = {"ingress": environment.ingress.group["maxReplicas"]}
    most["models"] = gpu.max_nodes if gpu else models.group["maxReplicas"]
    counted: list[tuple[PodSource, int]] = [(environment.head, 1)]
    counted += [(environment.ingress, most["ingress"]), (models, most["models"])]
    cpus = sum(parse_quantity(pod.size["cpu"]) * n for pod, n in counted) * clusters
    ram = sum(as_bytes(pod.size["memory"]) * n for pod, n in counted) * clusters
    hard = {
        "requests.cpu": str(-(-(cpus + _BESIDE["cpu"]) // 1)),
        "requests.memory": as_gi(ram + _BESIDE["memory"]),
        "pods": str(sum(n for _, n in counted) * clusters + _BESIDE["pods"]),
    }
    if gpu:
        hard["requests.nvidia.com/gpu"] = str(gpu.max_nodes * clusters)
    about = metadata(environment, "imagen")
    return {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": about,
        "spec": {"hard": hard},
    }


def _site(sizing: Sizing) -> Values:
    """What the hand-written Jobs read: the registry of models, its names, and the bucket."""
    environment = sizing.environment
    data = {
        "IMAGEN_REGISTRY": str(sizing.settings.models),
        "IMAGEN_MIRROR": environment.site.mirror or "",
        "IMAGEN_MODEL_NAMES": " ".join(spec.name for spec in sizing.registry.values()),
    }
    about = metadata(environment, "imagen-site")
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": data}


def out_of_date(files: Files, folder: Path) -> list[str]:
    """Paths below `folder` that differ from the render, are missing, or are no longer rendered."""
    differing = [path for path, text in files.items() if _read(folder / path) != text]
    stale = [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*.yaml"))
        if str(path.relative_to(folder)) not in files and (_read(path) or "").startswith(GENERATED)
    ]
    return differing + stale


def write(files: Files, folder: Path) -> list[str]:
    """Make `folder` as rendered; the paths that changed.

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
