"""configs/gke.yaml, typed: what the manifests are rendered from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field

from deployments.contract import Task
from deployments.errors import ConfigError
from deployments.settings import Strict, parse_settings, resolve

if TYPE_CHECKING:
    from pathlib import Path

Values = dict[str, Any]
BASE = "base"


class Site(Strict):
    """What differs from one customer to the next.

    Attributes:
        mirror: gs:// folder of published models; None serves them from their origins.
        host: DNS name of the service.
        certificate_map: Certificate Manager's map for that name.
        oauth_client: client id of Identity-Aware Proxy; its secret is the Secret imagen-oauth.
        security_policy: Cloud Armor's.
    """

    mirror: str | None = None
    host: str
    certificate_map: str
    oauth_client: str
    security_policy: str


class Image(Strict):
    """An image, pinned by its digest in kuberay/images.lock.

    Attributes:
        repository: with the registry's host.
        tag: which one `imagen kuberay lock` looks up; None takes the one it is given.
        local: it is on the node already, under this tag, and never pulled.
        base: images are built upon it; no manifest names it.
    """

    repository: str
    tag: str | None = None
    local: bool = False
    base: bool = False


class GpuNodes(Strict):
    """The GPU nodes.

    Attributes:
        type: as `imagen plan --gpu` knows it.
        machine: Compute Engine's machine type, with one such GPU.
        max_nodes: at a time, of one cluster.
        during_upgrade: how many clusters run at a time while one replaces the other.
        spot_first: spot nodes, and on-demand ones where there are none; else on-demand alone.
        boot_disk_type, boot_disk_gb: of a node; a hostPath lies on it, an emptyDir does not.
    """

    type: str
    machine: str
    max_nodes: int = Field(ge=1, le=1000)
    during_upgrade: int = Field(default=2, ge=1, le=2)
    spot_first: bool = True
    boot_disk_type: str = "pd-balanced"
    boot_disk_gb: int = Field(default=100, ge=50)


class ReplicaMemory(Strict):
    """RAM, as Kubernetes quantities.

    Attributes:
        process: of a model replica beside its weights.
        reserved: of a model pod for whatever is no replica.
    """

    process: str
    reserved: str


class Cache(Strict):
    """Where a node keeps models.

    Attributes:
        kind: emptyDir ends with the pod; hostPath stays on the node.
        mount: in the container.
        path: on the node, for hostPath.
        read_only: for a hostPath or a disk that is filled before.
        copies: of all models together that it must hold.
        scratch: quantity of disk beside the cache.
    """

    kind: Literal["emptyDir", "hostPath"]
    mount: str
    path: str = "/var/lib/imagen/models"
    read_only: bool = False
    copies: float = Field(default=2, ge=1)
    scratch: str


class Timeouts(Strict):
    """Seconds, from the outside in; `imagen kuberay validate` holds them to that order."""

    client: int
    load_balancer: int
    serve: int
    engine: int
    keep_alive: int


class ServeSource(Strict):
    """The Serve config, without what is derived.

    Attributes:
        args: of the application; see deployments/settings.py.
        ingress: options of the Ingress deployment.
        model: options of each model deployment.
        models: further ones of a single task's, over those.
    """

    proxy_location: str
    http_options: Values
    logging_config: Values
    args: Values
    ingress: Values
    model: Values
    models: dict[Task, Values] = Field(default={})


class Common(Strict):
    """Raw fields of every Ray pod and of its Ray container."""

    pod: Values = Field(default={})
    container: Values = Field(default={})


class PodSource(Strict):
    """One kind of Ray pod.

    Attributes:
        image: a name of `images`.
        size: resources; requests are as limits.
        labels, annotations: of the pod.
        group: raw fields of the head group or worker group.
        env: of the Ray container.
        pod: raw fields over those of every pod.
    """

    image: str
    size: dict[str, str]
    labels: dict[str, str] = Field(default={})
    annotations: dict[str, str] = Field(default={})
    group: Values = Field(default={})
    env: dict[str, str] = Field(default={})
    pod: Values = Field(default={})


class Environment(Strict):
    """`base`, or an overlay merged over it.

    Attributes:
        name: of the RayService; KubeRay names Services after it.
        namespace: of everything.
        gke: whether kuberay/gke is part of it.
        images: by the name that manifests use.
        gpu: None serves on CPUs.
        ray_service: raw fields of the RayService's spec.
        ray_cluster: raw fields of its rayClusterConfig.
        every_pod: under all Ray pods.
    """

    name: str
    namespace: str
    gke: bool = False
    site: Site
    images: dict[str, Image]
    gpu: GpuNodes | None = None
    memory: ReplicaMemory
    cache: Cache
    timeouts_s: Timeouts
    serve: ServeSource
    ray_service: Values = Field(default={})
    ray_cluster: Values
    every_pod: Common = Common()
    head: PodSource
    ingress: PodSource
    models: PodSource


def load_environments(path: Path) -> dict[str, Environment]:
    """`base` and every overlay, by name; an overlay may build upon another one, its `from`.

    Raises:
        ConfigError: the file cannot be read, or a key is wrong; says in which overlay.
    """
    try:
        values: Any = yaml.safe_load(resolve(path).read_text(encoding="utf-8"))
        base: Values = values[BASE]
        overlays: Values = values.get("overlays") or {}
        unknown = set(values) - {BASE, "overlays"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(
            "The source of the manifests cannot be read.",
            value=f"{path}: {str(error).splitlines()[0]}",
            remedy="It needs `base` and `overlays`, as configs/gke.yaml has them.",
        ) from error
    if unknown:
        raise ConfigError(f"{path} has unknown keys.", value=", ".join(sorted(unknown)))
    names = (BASE, *overlays)
    return {
        name: parse_settings(Environment, _whole(name, base, overlays), f"{name} in {path}")
        for name in names
    }


def _whole(name: str, base: Any, overlays: Values) -> Any:
    """An overlay upon what it is `from`: another overlay, or the base."""
    if name == BASE:
        return base
    if name not in overlays:
        raise ConfigError("No such overlay to build upon.", value=name, remedy="Correct `from`.")
    over = dict(overlays[name])
    return merged(_whole(over.pop("from", BASE), base, overlays), over)


def merged(base: Any, over: Any) -> Any:
    """`over` upon `base`: mappings merge, None removes, anything else replaces."""
    if not isinstance(over, dict):
        return over
    result: Values = dict(base) if isinstance(base, dict) else {}
    for key, value in over.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result
