"""Rules for pods that no namespace enforces: pinned images, no tokens, memory that is reserved.

Root, capabilities and the node's namespaces are the matter of Pod Security: the namespace is
`restricted` (kuberay/base/namespace.yaml).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kuberay.checks.manifests import Document, Finding, Manifests, PodView, walk, where

if TYPE_CHECKING:
    from collections.abc import Iterator


_PINNED = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")
_UNRESOLVED = re.compile(r"[\w./:@-]*\bunresolved\b[\w./:@-]*")


def check(manifests: Manifests) -> Iterator[Finding]:
    """Every rule that a pod or a container breaks, and every value that is not filled in."""
    for pod in manifests.pods:
        yield from _token(pod)
        for container in pod.containers:
            yield from _container(container, f"{pod.where}, container {container.get('name')}")
    if manifests.cluster.get("enableInTreeAutoscaling"):
        # The container that KubeRay adds to the head. Without an image it takes the head's.
        sidecar = {"image": "@unresolved"} | (manifests.cluster.get("autoscalerOptions") or {})
        yield from _container(sidecar, where(manifests.service, "autoscalerOptions"))
    yield from _placeholders(manifests)


def _token(pod: PodView) -> Iterator[Finding]:
    """Only the head talks to the API server, for Ray's autoscaler."""
    if pod.role != "head" and pod.spec.get("automountServiceAccountToken") is not False:
        message = "automountServiceAccountToken must be false: an intruder would get a token"
        yield Finding("token-automount", pod.where, message)
    if pod.spec.get("serviceAccountName", "default") == "default":
        message = "it runs as the namespace's default ServiceAccount: set serviceAccountName"
        yield Finding("service-account", pod.where, message)


def _container(container: Document, place: str) -> Iterator[Finding]:
    image = str(container.get("image", ""))
    local = container.get("imagePullPolicy") == "Never"  # the node has exactly one
    if not (_PINNED.fullmatch(image) or local or "unresolved" in image):
        message = f"{image or 'no image'} is not pinned: write @sha256:<64 hex digits>"
        yield Finding("image-unpinned", place, message)
    resources = container.get("resources") or {}
    requested = (resources.get("requests") or {}).get("memory")
    limit = (resources.get("limits") or {}).get("memory")
    if requested is None or requested != limit:
        message = f"memory requests {requested} and limits {limit} must be equal"
        yield Finding("memory", place, message)


def _placeholders(manifests: Manifests) -> Iterator[Finding]:
    """Each value that only the reader knows, once."""
    places: dict[str, str] = {}
    for document in manifests.documents:
        for text in (one for one in walk(document) if isinstance(one, str)):
            for token in _UNRESOLVED.findall(text):
                places.setdefault(token, where(document))
    for token, place in places.items():
        message = f"{token} is a placeholder: fill in configs/gke.yaml or kuberay/images.lock"
        yield Finding("placeholder", place, message, placeholder=True)
