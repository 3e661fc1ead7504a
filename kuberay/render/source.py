"""configs/gke.yaml, typed: what the manifests are rendered from."""

from __future__ import annotations

import posixpath
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, model_validator

from deployments.errors import ConfigError
from deployments.settings import Strict, parse_settings, resolve
from deployments.tasks import Task
from kuberay.quantity import Memory, Size, parse_quantity

if TYPE_CHECKING:
    from pathlib import Path

Values = dict[str, Any]
BASE = "base"
_GPU = "nvidia.com/gpu"
_OVERLAY = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")  # a folder of kuberay/overlays
# Of the images: Debian's, the application's, and that of the airgapped target.
_TAKEN = re.compile(
    r"/(app|bin|boot|dev|etc|home|lib|lib64|proc|root|run|sbin|sys|tmp|usr|var|weights)(/|$)"
)


def _absolute(path: str) -> str:
    if not re.fullmatch(r"(/[\w.-]+)+", path) or posixpath.normpath(path) != path:
        raise ValueError(f"{path!r} is no absolute path: such as /models, without `..` or a last /")
    return path


def _mount(path: str) -> str:
    if _TAKEN.match(path):
        raise ValueError(f"{path!r} would hide what the image has there: take /models")
    return path


def _node_folder(path: str) -> str:
    if path.count("/") < 2:
        raise ValueError(f"{path!r} is no folder of ours alone: take one below it")
    return path


def _replicas(group: Values) -> Values:
    """Counts that Python computes with, too; other raw fields are the CRD's matter."""
    counts = [(k, group[k]) for k in ("minReplicas", "replicas", "maxReplicas") if k in group]
    for name, count in counts:
        if type(count) is not int or count < 0:
            raise ValueError(f"{name} is {count!r}, and must be a whole number")
    if counts != sorted(counts, key=lambda one: one[1]):
        raise ValueError(
            f"{' <= '.join(f'{name} {count}' for name, count in counts)} does not hold"
        )
    return group


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
        during_upgrade: how many clusters run at a time while one replaces the other; 1 needs
            ray_service.upgradeStrategy {type: None}.
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

    process: Memory
    reserved: Memory


class Cache(Strict):
    """Where a node keeps models.

    Attributes:
        kind: emptyDir ends with the pod; hostPath stays on the node.
        mount: in the container; absolute, and in no folder that the image has.
        path: on the node, for hostPath; the prefetch job fills the same.
        read_only: for a hostPath or a disk that is filled before.
        copies: of all models together that it must hold.
        scratch: quantity of disk beside the cache.
    """

    kind: Literal["emptyDir", "hostPath"]
    mount: Annotated[str, AfterValidator(_absolute), AfterValidator(_mount)]
    path: Annotated[str, AfterValidator(_absolute), AfterValidator(_node_folder)] = (
        "/var/lib/imagen/models"
    )
    read_only: bool = False
    copies: float = Field(default=2, ge=1, le=1000)
    scratch: Memory


class Timeouts(Strict):
    """Seconds, from the outside in; `imagen kuberay validate` holds them to that order.

    Attributes:
        load_balancer: of a request, and so of a backend that drains: Google allows that an hour.
    """

    client: int = Field(ge=1)
    load_balancer: int = Field(ge=1, le=3600)
    serve: int = Field(ge=1)
    engine: int = Field(ge=1)
    keep_alive: int = Field(ge=1)


class ServeSource(Strict):
    """The Serve config, without what is derived.

    Attributes:
        tracing_config: Serve's, as it stands; None makes no spans (docs/observability.md).
        args: of the application; see deployments/settings.py.
        ingress: options of the Ingress deployment.
        model: options of each model deployment.
        models: further ones of a single task's, over those.
    """

    proxy_location: str
    http_options: Values
    logging_config: Values
    tracing_config: Values | None = None
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
        size: resources, cpu and memory at least; requests are as limits.
        labels, annotations: of the pod.
        group: raw fields of the head group or worker group.
        env: of the Ray container.
        pod: raw fields over those of every pod.
    """

    image: str
    size: Size
    labels: dict[str, str] = Field(default={})
    annotations: dict[str, str] = Field(default={})
    group: Values = Field(default={})
    env: dict[str, str] = Field(default={})
    pod: Values = Field(default={})


class WorkerSource(PodSource):
    """Pods that come and go by their number."""

    group: Annotated[Values, AfterValidator(_replicas)] = Field(default={})


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
    ingress: WorkerSource
    models: WorkerSource

    @model_validator(mode="after")
    def _says_how_many(self) -> Self:
        derived = {"models"} if self.gpu else set[str]()  # gpu.max_nodes
        for name, pods in (("ingress", self.ingress), ("models", self.models)):
            if name not in derived and not pods.group.get("maxReplicas"):
                raise ValueError(f"{name}.group.maxReplicas must be said, and be 1 or more")
        return self

    @model_validator(mode="after")
    def _has_the_gpus_it_asks_for(self) -> Self:
        there = {"head": 0, "ingress": 0, "models": 1 if self.gpu else 0}
        for name, pods in (("head", self.head), ("ingress", self.ingress), ("models", self.models)):
            asked = parse_quantity(pods.size.get(_GPU, "0"))
            if asked != there[name]:
                raise ValueError(
                    f"{name}.size has {_GPU} {asked}, its nodes {there[name]}: no pod would start"
                )
        return self

    @property
    def clusters(self) -> int:
        """How many run at a time, at most."""
        strategy: Any = self.ray_service.get("upgradeStrategy")
        kind = strategy.get("type") if isinstance(strategy, dict) else strategy
        return 1 if kind == "None" else 2

    @model_validator(mode="after")
    def _upgrades_within_its_gpus(self) -> Self:
        if self.gpu and self.gpu.during_upgrade < self.clusters:
            raise ValueError(
                "gpu.during_upgrade 1 has no GPUs for the second cluster of an upgrade:"
                " write ray_service.upgradeStrategy {type: None}, or during_upgrade 2"
            )
        return self


def load_environments(path: Path) -> dict[str, Environment]:
    """`base` and every overlay, by name; an overlay may build upon another one, its `from`.

    Raises:
        ConfigError: the file cannot be read, or a key is wrong; says in which overlay.
    """
    try:
        values: Any = yaml.safe_load(resolve(path).read_text(encoding="utf-8"))
        base: Values = values[BASE]
        overlays: Values = dict(values.get("overlays") or {})
        unknown = set(values) - {BASE, "overlays"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(
            "The source of the manifests cannot be read.",
            value=f"{path}: {str(error).splitlines()[0]}",
            remedy="It needs `base` and `overlays`, as configs/gke.yaml has them.",
        ) from error
    if unknown:
        raise ConfigError(f"{path} has unknown keys.", value=", ".join(sorted(map(str, unknown))))
    _check_overlays(overlays)
    names = (BASE, *overlays)
    return {
        name: parse_settings(Environment, _whole(name, base, overlays), f"{name} in {path}")
        for name in names
    }


def _check_overlays(overlays: Values) -> None:
    for name, over in overlays.items():
        if name == BASE or not _OVERLAY.fullmatch(str(name)):
            raise ConfigError(
                "An overlay's name is a folder's: of a-z, 0-9 and -, and another than `base`.",
                value=name,
                remedy="Name it otherwise.",
            )
        if not isinstance(over, dict):
            raise ConfigError(
                f"The overlay {name} is no mapping.",
                value=over,
                remedy="Write what differs from the base, or {} where nothing does.",
            )


def _whole(name: Any, base: Any, overlays: Values, upon: tuple[Any, ...] = ()) -> Any:
    """An overlay upon what it is `from`: another overlay, or the base."""
    if name == BASE:
        return base
    if not isinstance(name, str) or name not in overlays:
        raise ConfigError("No such overlay to build upon.", value=name, remedy="Correct `from`.")
    if name in upon:
        raise ConfigError(
            "Overlays build upon each other in a circle.",
            value=" from ".join((*upon, name)),
            remedy="Let one of them build upon `base`.",
        )
    over = dict(overlays[name])
    return merged(_whole(over.pop("from", BASE), base, overlays, (*upon, name)), over)


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
