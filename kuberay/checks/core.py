"""Kubernetes' own kinds and pod templates against its schemas; and quantities, which those skip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kuberay.checks.manifests import Finding, where
from kuberay.quantity import parse_quantity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kuberay.checks.manifests import Document, Manifests

CHECK = "core"
KUBERNETES = "1.33"
_LISTS = frozenset({"requests", "limits", "hard"})
_SINGLE = frozenset({"sizeLimit", "storage"})
_LONGEST = 200


def is_core(document: Document) -> bool:
    """Whether Kubernetes brings the kind along."""
    group = str(document.get("apiVersion")).rpartition("/")[0]
    core = group in ("", "apps", "batch", "policy", "autoscaling")
    return core or (group.endswith(".k8s.io") and not group.startswith("gateway."))


def check(manifests: Manifests, version: str = KUBERNETES) -> list[Finding]:
    """Every deviation from the schemas of a Kubernetes version.

    Raises:
        ImportError: the package kubernetes-validate is not installed.
    """
    checked = [(where(one), one) for one in manifests.documents if is_core(one)]
    checked += [(pod.where, _as_pod(pod.spec)) for pod in manifests.pods if pod.role != "other"]
    found = [finding for place, one in checked for finding in _validate(place, one, version)]
    return found + [finding for one in manifests.documents for finding in _quantities(one)]


def _as_pod(spec: Document) -> Document:
    # KubeRay sets what a template lacks: here only its fields are looked at.
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}


def _validate(place: str, document: Document, version: str) -> Iterator[Finding]:
    import kubernetes_validate as kubernetes

    try:
        kubernetes.validate(document, version, strict=True)
    except kubernetes.ValidationError as error:
        path = ".".join(str(step) for step in error.absolute_path)
        yield Finding(CHECK, "schema", f"{place} {path}".strip(), error.message[:_LONGEST])
    except kubernetes.SchemaNotFoundError:
        kind = f"{document.get('apiVersion')} {document.get('kind')}"
        message = f"Kubernetes {version} has no kind {kind}"
        yield Finding(CHECK, "unknown-kind", place, message)


def _quantities(document: Document) -> Iterator[Finding]:
    for path, value in _amounts(document, ""):
        try:
            amount = parse_quantity(value)
        except ValueError as error:
            yield Finding(CHECK, "quantity", where(document, path), str(error))
            continue
        if amount < 0 or (amount == 0 and not _may_be_none(path)):
            told = f"{value} leaves nothing: it must be above 0"
            yield Finding(CHECK, "quantity", where(document, path), told)
        if "/" in path and amount % 1:
            told = f"{value} is a part of a device: Kubernetes has whole ones only"
            yield Finding(CHECK, "quantity", where(document, path), told)


def _may_be_none(path: str) -> bool:
    """A quota may allow none."""
    return ".hard." in path


def _amounts(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, list):
        for i, item in enumerate(node):
            yield from _amounts(item, f"{path}.{i}")
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        here = f"{path}.{key}".lstrip(".")
        if key in _LISTS and isinstance(value, dict):
            yield from ((f"{here}.{name}", amount) for name, amount in value.items())
        elif key in _SINGLE and not isinstance(value, dict):
            yield here, value
        else:
            yield from _amounts(value, here)
