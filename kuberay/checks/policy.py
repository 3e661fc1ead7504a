"""Our own rules for pods: pinned images, no root, no rights, memory that is really there."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from kuberay.checks.manifests import Finding, where

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kuberay.checks.manifests import Document, Manifests, PodView

CHECK = "policy"
_PINNED = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")
_UNRESOLVED = re.compile(r"[\w./:@-]*\bunresolved\b[\w./:@-]*")
# It hands a folder of the node to the images' user, which only root can.
_MAY_BE_ROOT = {"own-cache": {"CHOWN"}}
_TIGHT = ("restricted", "baseline")
Told = tuple[str, str, str]
"""Rule, place and message."""


def check(manifests: Manifests) -> list[Finding]:
    """Every rule that a pod or its container breaks, and what is not filled in yet."""
    found = [
        Finding(CHECK, rule, place, message)
        for pod in manifests.pods
        for rule, place, message in [*_pod(pod), *_containers(pod)]
    ]
    found += [
        Finding(CHECK, rule, place, message)
        for service in manifests.of("RayService")
        for rule, place, message in _autoscaler(service)
    ]
    found += [Finding(CHECK, "host-path", *told) for told in _host_paths(manifests)]
    return found + placeholders(manifests)


def placeholders(manifests: Manifests) -> list[Finding]:
    """What stands for a value that only the reader knows, each once."""
    places: dict[str, str] = {}
    for document in manifests.documents:
        for text in _texts(document):
            for token in _UNRESOLVED.findall(text):
                places.setdefault(token, where(document))
    message = "is no real value: see configs/gke.yaml and kuberay/images.lock"
    return [
        Finding(CHECK, "placeholder", place, f"{token} {message}", placeholder=True)
        for token, place in places.items()
    ]


def _pod(pod: PodView) -> Iterator[Told]:
    spec, place = pod.spec, pod.where
    if taken := [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]:
        yield "host-namespace", place, f"{', '.join(taken)} shares the node with the pod"
    if pod.role != "head" and spec.get("automountServiceAccountToken") is not False:
        told = "automountServiceAccountToken is not false: whoever breaks in gets a token"
        yield "token-automount", place, told
    if spec.get("serviceAccountName", "default") == "default":
        yield "service-account", place, "it runs as the namespace's default account"


def _containers(pod: PodView) -> Iterator[Told]:
    for container in pod.containers:
        place = f"{pod.where}, container {container.get('name')}"
        yield from _image(container, place)
        yield from _memory(container, place)
        yield from _rights(container, pod.spec.get("securityContext") or {}, place)


def _image(container: Document, place: str) -> Iterator[Told]:
    image = str(container.get("image", ""))
    local = container.get("imagePullPolicy") == "Never"  # what is on the node is what runs
    if not (_PINNED.fullmatch(image) or local or "unresolved" in image):
        yield "image-unpinned", place, f"{image or 'no image'} is not pinned by @sha256:<digest>"


def _memory(container: Document, place: str) -> Iterator[Told]:
    resources = container.get("resources") or {}
    asked = (resources.get("requests") or {}).get("memory")
    limit = (resources.get("limits") or {}).get("memory")
    if asked is None or asked != limit:
        yield "memory", place, f"memory requests {asked} and limits {limit} must be equal"


def _rights(container: Document, pod: Document, place: str) -> Iterator[Told]:
    own: Document = container.get("securityContext") or {}
    context = {**pod, **own}
    allowed = _MAY_BE_ROOT.get(str(container.get("name")), set[str]())
    if not allowed and (not context.get("runAsNonRoot") or context.get("runAsUser") == 0):
        yield "root", place, "it may run as root: set runAsNonRoot and a runAsUser"
    if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
        yield "privileges", place, "allowPrivilegeEscalation is not false, or it is privileged"
    capabilities = own.get("capabilities") or {}
    if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - allowed:
        yield "capabilities", place, "it keeps capabilities: drop ALL, and add none"
    if (context.get("seccompProfile") or {}).get("type") != "RuntimeDefault":
        yield "seccomp", place, "seccompProfile is not RuntimeDefault"


def _autoscaler(service: Document) -> Iterator[Told]:
    """The container that KubeRay adds to the head; its memory and its rights are ours to say."""
    cluster: Document = service["spec"].get("rayClusterConfig") or {}
    if not cluster.get("enableInTreeAutoscaling"):
        return
    options: Document = cluster.get("autoscalerOptions") or {}
    place = where(service, "autoscalerOptions")
    pod: Any = cluster["headGroupSpec"]["template"]["spec"].get("securityContext") or {}
    yield from _memory(options, place)
    yield from _rights(options, pod, place)
    if options.get("image"):
        yield from _image(options, place)


def _host_paths(manifests: Manifests) -> Iterator[tuple[str, str]]:
    """Folders of the node in a namespace that refuses them."""
    label = "pod-security.kubernetes.io/enforce"
    spaces = manifests.of("Namespace")
    levels = {str((space["metadata"].get("labels") or {}).get(label, "")) for space in spaces}
    for pod in manifests.pods if levels & set(_TIGHT) else []:
        for volume in pod.spec.get("volumes") or []:
            if "hostPath" in volume:
                yield pod.where, f"volume {volume.get('name')}: the namespace refuses hostPath"


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _texts(value)
    elif isinstance(node, list):
        for item in node:
            yield from _texts(item)
