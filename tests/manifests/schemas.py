"""The schemas of Kubernetes and KubeRay, applied as strictly as an API server applies them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jsonschema
import kubernetes_validate
import yaml

from kuberay.checks.manifests import where

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kuberay.checks.manifests import Document, Manifests

KUBERNETES = "1.33"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Schemas:
    """The custom resources of a folder of CustomResourceDefinitions.

    `kubectl get crd rayservices.ray.io --output yaml` writes such a file.
    """

    def __init__(self, folder: Path) -> None:
        self._validators: dict[str, Any] = {}
        for path in folder.glob("*.yaml"):
            spec = yaml.load(path.read_text(), _LOADER)["spec"]
            (version,) = (one for one in spec["versions"] if one["name"] == "v1")
            strict = _strict(version["schema"]["openAPIV3Schema"])
            strict["properties"]["metadata"] = {"type": "object"}
            self._validators[spec["names"]["kind"]] = jsonschema.Draft202012Validator(strict)

    def errors(self, manifests: Manifests) -> Iterator[str]:
        """Every deviation of the kinds in the folder."""
        for one in manifests.documents:
            for error in self._validators.get(one["kind"], _ANY).iter_errors(one):
                yield f"{where(one)} {error.json_path}: {error.message}"


_ANY = jsonschema.Draft202012Validator({})


def _strict(schema: Any) -> Any:
    """OpenAPI v3 as JSON Schema, in which an object has no fields but those that it names."""
    if not isinstance(schema, dict):
        return schema
    result: Document = {k: v for k, v in schema.items() if k not in ("format", "description")}
    for key in ("items", "additionalProperties", "not"):
        if key in result:
            result[key] = _strict(result[key])
    for key in ("anyOf", "allOf", "oneOf"):
        if key in result:
            result[key] = [_strict(one) for one in result[key]]
    if "properties" in result:
        result["properties"] = {k: _strict(v) for k, v in result["properties"].items()}
        if not result.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
    if result.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
    return result


def core_errors(manifests: Manifests) -> Iterator[str]:
    """Every deviation of Kubernetes' own kinds, and of the pods inside a RayService."""
    objects = [(where(one), one) for one in manifests.documents if _is_core(one)]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
    objects += [(one.where, pod | {"spec": one.spec}) for one in manifests.pods]
    for place, one in objects:
        try:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{place}: {error.message}"


def _is_core(document: Document) -> bool:
    group = str(document["apiVersion"]).rpartition("/")[0]
    return group in ("", "apps", "batch", "policy") or group == "networking.k8s.io"
