"""configs/gke.yaml, typed: `base` is the whole service, an overlay what differs from it."""

from __future__ import annotations

from ipaddress import AddressValueError, IPv4Address
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, Field, model_validator

from deployments.errors import ConfigError
from deployments.settings import Strict, file_fault, parse_settings, resolve
from deployments.tasks import Task
from kuberay.quantity import MIB, as_bytes, parse_quantity

if TYPE_CHECKING:
    from pathlib import Path

Values = dict[str, Any]
BASE = "base"
OWN_REDIS = "imagen-redis"
"""The Service of kuberay/base/redis.yaml."""
_GPU = "nvidia.com/gpu"
_NAME = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"
# Absolute, below a folder of the root, and without `..`.
_NODE_FOLDER = r"^/[\w-][\w.-]*(/[\w-][\w.-]*)+$"


def _memory(text: str) -> str:
    if as_bytes(text) < MIB:
        raise ValueError(f"{text!r} is less than one Mi: is its unit missing?")
    return text


def _size(size: dict[str, str]) -> dict[str, str]:
    """Quantities that are computed with here. The API server checks names and the rest."""
    if missing := sorted({"cpu", "memory"} - size.keys()):
        raise ValueError(f"{' and '.join(missing)} must be set")
    _memory(size["memory"])
    if wrong := [name for name, text in size.items() if parse_quantity(text) <= 0]:
        raise ValueError(f"{', '.join(wrong)} must be above 0")
    return size


def _replicas(group: Values) -> Values:
    """Counts that are computed with here. The CRD checks other raw fields."""
    counts = [group[k] for k in ("minReplicas", "replicas", "maxReplicas") if k in group]
    if any(type(count) is not int or count < 0 for count in counts) or counts != sorted(counts):
        raise ValueError(f"0 <= minReplicas <= replicas <= maxReplicas does not hold: {counts}")
    return group


Memory = Annotated[str, AfterValidator(_memory)]
"""RAM or disk, as a quantity."""
Size = Annotated[dict[str, str], AfterValidator(_size)]
"""Resources of a container, as quantities."""


class Site(Strict):
    """Names of one installation.

    Attributes:
        mirror: gs:// or s3:// folder of published models; None pulls them from their origins.
        host: DNS name of the service.
        certificate_map: in Certificate Manager, for that name.
        oauth_client: client id for Identity-Aware Proxy; the Secret imagen-oauth has its secret.
        security_policy: in Cloud Armor.
        gateway_class: of the Gateway, off GKE.
        issuer: cert-manager's ClusterIssuer for that name, off GKE.
        jobs_account: Google's service account of the ingress pods; None gives them none.
    """

    mirror: str | None = None
    host: str
    certificate_map: str
    oauth_client: str
    security_policy: str
    gateway_class: str
    issuer: str
    jobs_account: str | None = None


class Image(Strict):
    """An image, pinned by its digest in kuberay/images.lock.

    Attributes:
        repository: including the host of the registry.
        tag: that `imagen kuberay lock` looks up; None uses its option --tag.
        local: the node has it under this tag, and never pulls it.
        base: our images are built from it; no manifest names it.
    """

    repository: str
    tag: str | None = None
    local: bool = False
    base: bool = False


class GpuNodes(Strict):
    """The GPU nodes.

    Attributes:
        type: a name that `imagen plan --gpu` takes.
        machine: machine type of Compute Engine with one such GPU; only GKE reads it.
        max_nodes: of one cluster, at a time.
        spot_first: spot nodes, or on-demand nodes if there are none; False is on-demand only.
        share: of a GPU, for each model; None takes the shares of the GPU plan (docs/gpu.md), which
            knows large models only.
        boot_disk_type: of a node. A hostPath is on the boot disk, an emptyDir is not.
        boot_disk_gb: its size.
    """

    type: str
    machine: str
    max_nodes: int = Field(ge=1, le=1000)
    spot_first: bool = True
    share: float | None = Field(default=None, gt=0, le=1)
    boot_disk_type: str = "pd-balanced"
    boot_disk_gb: int = Field(default=100, ge=50)


class ReplicaMemory(Strict):
    """RAM, as Kubernetes quantities.

    Attributes:
        process: of a model replica, without its weights.
        reserved: of a model pod, for everything that is not a replica.
    """

    process: Memory
    reserved: Memory


class Cache(Strict):
    """Where a node keeps models.

    Attributes:
        kind: emptyDir ends with the pod; hostPath stays on the node; claim is one volume that all
            pods read, and that the prefetch job fills.
        path: on the node, for a hostPath; the prefetch job fills it.
        read_only: for a hostPath or a disk that is already filled.
        storage_class: of a claim; None takes the cluster's default.
        size: of a claim, as a quantity; None follows from the models and `copies`.
        snapshot: a VolumeSnapshot of the filled disk: pods read copies of it, which many nodes may
            mount. None needs a class of volumes that many nodes may write.
        copies: size of the cache, in copies of all models together.
        scratch: disk beside the cache, as a quantity.
    """

    kind: Literal["emptyDir", "hostPath", "claim"]
    path: str = Field(default="/var/lib/imagen/models", pattern=_NODE_FOLDER)
    read_only: bool = False
    storage_class: str | None = None
    size: Memory | None = None
    snapshot: str | None = Field(default=None, pattern=_NAME)
    copies: float = Field(default=2, ge=1, le=1000)
    scratch: Memory

    @property
    def mounted_read_only(self) -> bool:
        return self.read_only or self.kind == "claim"

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.kind == "emptyDir" and self.read_only:
            raise ValueError("an emptyDir that is read_only stays empty: nothing could fill it")
        if self.kind != "claim" and (self.storage_class or self.size or self.snapshot):
            raise ValueError("storage_class, size and snapshot are of kind: claim")
        return self


class RedisSource(Strict):
    """Redis, for Ray's state and for jobs. The Secret imagen-redis has its password.

    Attributes:
        address: redis://HOST:PORT, or rediss:// with TLS. The host `imagen-redis` is that of
            kuberay/base/redis.yaml; with any other one, the overlay has no Redis.
        own_ca: the server's certificate is signed by an authority of its own, whose certificate is
            in the same Secret, under `ca.pem`.
        storage_class: of the disk of kuberay/base/redis.yaml; None takes the cluster's default.
        disk: its size; None takes that of the file. Another host has no use for either, and an
            overlay may have inherited the address.
    """

    address: str = Field(pattern=r"^rediss?://[\w.-]+:[0-9]{1,5}$")
    own_ca: bool = False
    storage_class: str | None = None
    disk: Memory | None = None

    @property
    def inside(self) -> bool:
        """Whether it is that of kuberay/base/redis.yaml."""
        return urlsplit(self.address).hostname == OWN_REDIS

    @property
    def port(self) -> int:
        return urlsplit(self.address).port or 0

    @property
    def ip(self) -> IPv4Address | None:
        """The address in numbers; None if it is a name."""
        try:
            return IPv4Address(urlsplit(self.address).hostname or "")
        except AddressValueError:
            return None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        tls = self.address.startswith("rediss:")
        if self.inside and (tls or self.own_ca):
            raise ValueError(f"{OWN_REDIS} has no TLS: write redis://, without own_ca")
        if self.own_ca and not tls:
            raise ValueError("own_ca is for TLS: write rediss://")
        return self


class Timeouts(Strict):
    """Seconds, outermost first; `imagen kuberay validate` checks that each is above the next.

    Attributes:
        load_balancer: of a request, and of a backend that drains; Google allows an hour.
    """

    client: int = Field(ge=1)
    load_balancer: int = Field(ge=1, le=3600)
    serve: int = Field(ge=1)
    engine: int = Field(ge=1)
    keep_alive: int = Field(ge=1)


class ServeSource(Strict):
    """The Serve config, without derived values.

    Attributes:
        tracing_config: raw; None makes no spans (docs/observability.md).
        args: of the application (deployments/settings.py).
        ingress: options of the Ingress deployment.
        worker: options of the JobWorker deployment.
        redis: options of the Redis deployment, which there is only without a REDIS_URL.
        model: options of each model deployment.
        models: options of the deployments of one task's models, laid upon `model`.
    """

    proxy_location: str
    http_options: Values
    logging_config: Values
    tracing_config: Values | None = None
    args: Values
    ingress: Values
    worker: Values
    redis: Values = Field(default={})
    model: Values
    models: dict[Task, Values] = Field(default={})


class Common(Strict):
    """Raw fields of every Ray pod and its Ray container."""

    pod: Values = Field(default={})
    container: Values = Field(default={})


class PodSource(Strict):
    """One kind of Ray pod.

    Attributes:
        image: a key of `images`.
        size: resources of the Ray container, both requests and limits.
        labels: of the pod.
        annotations: of the pod.
        group: raw fields of the head group or worker group.
        env: of the Ray container: a value, or a mapping with `valueFrom`. A value may have $(NAME)
            of a variable above it.
        pod: raw fields, laid upon those of every pod.
        container: raw fields of the Ray container, likewise.
    """

    image: str
    size: Size
    labels: dict[str, str] = Field(default={})
    annotations: dict[str, str] = Field(default={})
    group: Annotated[Values, AfterValidator(_replicas)] = Field(default={})
    env: dict[str, str | Values] = Field(default={})
    pod: Values = Field(default={})
    container: Values = Field(default={})


class Environment(Strict):
    """`base`, or an overlay laid upon it.

    Attributes:
        name: of the RayService; KubeRay names Services after it.
        namespace: of every object.
        platform: which of kuberay/gke and kuberay/portable is part of it; None has neither.
        images: by the name that manifests use.
        gpu: None runs on CPUs.
        redis: None keeps Ray's state in the head, and the application starts its own for jobs.
        ray_service: raw fields of the RayService's spec.
        ray_cluster: raw fields of its rayClusterConfig.
        every_pod: beneath all Ray pods.
    """

    name: str = Field(max_length=47, pattern=r"^[a-z]([a-z0-9-]*[a-z0-9])?$")
    namespace: str
    platform: Literal["gke", "portable"] | None = None
    site: Site
    images: dict[str, Image]
    gpu: GpuNodes | None = None
    memory: ReplicaMemory
    cache: Cache
    redis: RedisSource | None = None
    timeouts_s: Timeouts
    serve: ServeSource
    ray_service: Values = Field(default={})
    ray_cluster: Values
    every_pod: Common = Common()
    head: PodSource
    ingress: PodSource
    models: PodSource

    @property
    def clusters(self) -> int:
        """Clusters that run at a time, at most: an upgrade may run two."""
        strategy: Any = self.ray_service.get("upgradeStrategy")
        return 1 if isinstance(strategy, dict) and strategy.get("type") == "None" else 2

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if not self.ingress.group.get("maxReplicas"):
            raise ValueError("ingress.group.maxReplicas is missing: write 1 or more")
        if not (self.gpu or self.models.group.get("maxReplicas")):
            raise ValueError("models.group.maxReplicas is missing: write 1 or more")
        per_node = {"head": 0, "ingress": 0, "models": 1 if self.gpu else 0}
        for name, pods in (("head", self.head), ("ingress", self.ingress), ("models", self.models)):
            asked = parse_quantity(pods.size.get(_GPU, "0"))
            if asked != per_node[name]:
                raise ValueError(
                    f"{name}.size has {_GPU} {asked}, and its nodes have {per_node[name]}"
                )
        return self


class _Source(Strict):
    base: Values
    overlays: dict[Annotated[str, Field(pattern=_NAME)], Values] = Field(default={})


def load_environments(path: Path) -> dict[str, Environment]:
    """`base` and every overlay, by name.

    Raises:
        ConfigError: the file cannot be read, or a key is wrong; the message names the overlay.
    """
    source = parse_settings(_Source, read_yaml(path), str(path))
    return {
        name: parse_settings(Environment, merged(source.base, over), f"{name} in {path}")
        for name, over in {BASE: {}, **source.overlays}.items()
    }


def read_yaml(path: Path) -> Any:
    """The values in a file of one YAML document.

    Raises:
        ConfigError: it cannot be read, or is not YAML.
    """
    try:
        return yaml.safe_load(resolve(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            "A source of the manifests cannot be read.",
            value=f"{path}: {file_fault(error)}",
            remedy="Restore it, or correct its YAML.",
        ) from error


def merged(base: Any, over: Any) -> Any:
    """`over` laid upon `base`: mappings merge, None removes a key, anything else replaces it."""
    if not isinstance(over, dict):
        return over
    result: Values = dict(base) if isinstance(base, dict) else {}
    for key, value in over.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result
