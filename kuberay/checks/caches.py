"""Where model pods find their models: a volume that is filled, that they may read, and that fits.

Each mistake starts well: at the first request pods are pending or evicted, or models are missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kuberay.checks.manifests import Document, Finding, Manifests, PodView
from kuberay.quantity import parse_quantity

if TYPE_CHECKING:
    from collections.abc import Iterator

_STORE = "IMAGEN_MODELS"
_ENFORCED = "pod-security.kubernetes.io/enforce"
_PREFETCH = ("app.kubernetes.io/component", "prefetch")


class _Cache(NamedTuple):
    """The volume of the model store of a pod.

    Attributes:
        pod: that mounts it.
        volume: of the pod's spec.
        read_only: to the pod.
    """

    pod: PodView
    volume: Document
    read_only: bool

    @property
    def claim(self) -> str | None:
        return (self.volume.get("persistentVolumeClaim") or {}).get("claimName")

    @property
    def place(self) -> str | None:
        """What two pods can share: a claim, or a folder of the node."""
        return self.claim or (self.volume.get("hostPath") or {}).get("path")


def check(manifests: Manifests) -> Iterator[Finding]:
    """Every cache that is too small, empty, unreadable or forbidden."""
    for pod in manifests.pods:
        yield from _disk(pod)
    stores = [one for pod in manifests.pods if (one := _store(pod))]
    readers = [one for one in stores if one.pod.role == "worker"]
    fillers = [one for one in stores if _PREFETCH in one.pod.labels.items()]
    for one in readers:
        yield from _empty(one)
        yield from _folder(one, manifests)
        yield from _claim(one, manifests, fillers)
        yield from _swap(one, manifests)
    for one in fillers:
        yield from _filler(one, readers, manifests)


def _disk(pod: PodView) -> Iterator[Finding]:
    """The volumes fit the pod's disk."""
    disk = pod.limits.get("ephemeral-storage", 0)
    for volume in pod.spec.get("volumes") or []:
        size = (volume.get("emptyDir") or {}).get("sizeLimit", 0)
        if parse_quantity(disk) < parse_quantity(size):
            message = f"ephemeral-storage {disk} is less than the {size} of {volume['name']}:"
            yield Finding("cache", pod.where, f"{message} the kubelet would evict the pod")


def _store(pod: PodView) -> _Cache | None:
    folder = pod.environment.get(_STORE)
    volumes = {one["name"]: one for one in pod.spec.get("volumes") or []}
    for mount in pod.main.get("volumeMounts") or []:
        if folder and mount["mountPath"] == folder and mount["name"] in volumes:
            volume = volumes[mount["name"]]
            claim = volume.get("persistentVolumeClaim") or {}
            return _Cache(pod, volume, bool(mount.get("readOnly") or claim.get("readOnly")))
    return None


def _empty(cache: _Cache) -> Iterator[Finding]:
    if "emptyDir" in cache.volume and cache.read_only:
        message = "an emptyDir that is read-only stays empty: no model would ever be there"
        yield Finding("cache-empty", cache.pod.where, message)


def _folder(cache: _Cache, manifests: Manifests) -> Iterator[Finding]:
    """Pod Security refuses such a pod only when it is created."""
    for space in manifests.of("Namespace") if "hostPath" in cache.volume else []:
        level = (space["metadata"].get("labels") or {}).get(_ENFORCED, "privileged")
        if level != "privileged":
            message = f"the namespace is {level}, and refuses pods with a folder of the node"
            yield Finding("cache-namespace", cache.pod.where, message)


def _claim(cache: _Cache, manifests: Manifests, fillers: list[_Cache]) -> Iterator[Finding]:
    if cache.claim is None:
        return
    claims = {one["metadata"]["name"]: one["spec"] for one in manifests.of("PersistentVolumeClaim")}
    if cache.claim not in claims:
        message = f"there is no PersistentVolumeClaim {cache.claim}: its pods would be pending"
        yield Finding("cache-claim", cache.pod.where, message)
        return
    spec, place = claims[cache.claim], cache.pod.where
    modes = set(spec.get("accessModes") or [])
    most = {one["groupName"]: one.get("maxReplicas", 1) for one in manifests.groups}
    if not modes & {"ReadWriteMany", "ReadOnlyMany"} and most.get(cache.pod.group, 1) > 1:
        message = f"{sorted(modes)} is for one node, and up to {most[cache.pod.group]} pods need it"
        yield Finding("cache-access", place, message)
    if not cache.read_only:
        message = "pods share it, and locks may mean nothing on a network: mount it read-only"
        yield Finding("cache-writable", place, message)
    filled = any(one.claim == cache.claim and not one.read_only for one in fillers)
    if not (filled or spec.get("dataSource") or spec.get("volumeName")):
        message = f"nothing fills {cache.claim}: no prefetch job, no dataSource and no volumeName"
        yield Finding("cache-empty", place, message)


def _swap(cache: _Cache, manifests: Manifests) -> Iterator[Finding]:
    """A replica pulls another digest into its store."""
    for one in manifests.deployments if cache.read_only else []:
        if digest := (one.get("user_config") or {}).get("digest"):
            message = f"{one['name']} is to serve {digest}; a read-only cache has the locked one"
            yield Finding("cache-swap", cache.pod.where, message)


def _filler(cache: _Cache, readers: list[_Cache], manifests: Manifests) -> Iterator[Finding]:
    claims = {one["metadata"]["name"]: one["spec"] for one in manifests.of("PersistentVolumeClaim")}
    copied = any((claims.get(one.claim or "") or {}).get("dataSource") for one in readers)
    if cache.place not in {one.place for one in readers} and not (cache.claim and copied):
        message = f"it fills {cache.place}, and no model pod reads that"
        yield Finding("cache-unread", cache.pod.where, message)
    if cache.read_only:
        message = "its volume is read-only: it can fill nothing"
        yield Finding("cache-unread", cache.pod.where, message)
    mirrors = [one["data"]["IMAGEN_MIRROR"] for one in manifests.of("ConfigMap") if "data" in one]
    images = {one.pod.main.get("image") for one in readers}
    for mirror in mirrors:
        if mirror.startswith("file:") and cache.pod.main.get("image") not in images:
            message = f"{mirror} is in the image of the model pods, and this job has another image"
            yield Finding("cache-mirror", cache.pod.where, message)
