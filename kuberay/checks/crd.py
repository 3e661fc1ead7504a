"""Strict schemas of custom resources: what a cluster would silently drop is an error here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jsonschema
import yaml

from deployments.errors import ConfigError
from kuberay.checks.manifests import Finding, where

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kuberay.checks.manifests import Document, Manifests

CHECK = "crd"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": _TEXTS,
        "annotations": _TEXTS,
    },
    "required": ["name"],
    "additionalProperties": False,
}
_LONGEST = 200
Key = tuple[str, str]
"""apiVersion and kind."""


class Schemas:
    """The custom resources of a folder of CustomResourceDefinitions.

    Args:
        folder: of YAML files, as `kubectl get crd NAME -o yaml` writes them.

    Raises:
        ConfigError: it cannot be read, or holds none.
    """

    def __init__(self, folder: Path) -> None:
        self._validators: dict[Key, Any] = {}
        for definition in _definitions(folder):
            spec = definition["spec"]
            for version in spec["versions"]:
                key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                self._validators[key] = strict_validator(version["schema"]["openAPIV3Schema"])
        if not self._validators:
            raise ConfigError(
                "The folder holds no CustomResourceDefinition.",
                value=folder,
                remedy="Take them from a cluster: kuberay/README.md has the command.",
            )

    def knows(self, document: Document) -> bool:
        return _key(document) in self._validators

    def check(self, manifests: Manifests) -> list[Finding]:
        """Every deviation of the custom resources that the folder knows."""
        return [
            finding
            for one in manifests.documents
            if self.knows(one)
            for finding in deviations(CHECK, self._validators[_key(one)], one)
        ]


def deviations(check: str, validator: Any, document: Document) -> list[Finding]:
    """What a validator finds in a document, as findings of a check."""
    errors = sorted(
        validator.iter_errors(document),
        key=lambda error: [str(step) for step in error.absolute_path],
    )
    return [
        Finding(check, _rule(one), where(document, _path(one)), one.message[:_LONGEST])
        for one in errors
    ]


def _key(document: Document) -> Key:
    return str(document.get("apiVersion")), str(document.get("kind"))


def _path(error: Any) -> str:
    return ".".join(str(step) for step in error.absolute_path)


def _rule(error: Any) -> str:
    return "unknown-field" if error.validator == "additionalProperties" else "schema"


def _definitions(folder: Path) -> Iterator[Document]:
    try:
        texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.y*ml"))]
        documents: list[Any] = [one for text in texts for one in yaml.load_all(text, _LOADER)]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError("The CRDs cannot be read.", value=f"{folder}: {error}") from error
    for one in documents:
        if isinstance(one, dict):
            yield from (
                item
                for item in one.get("items", [one])  # kubectl writes several as one List
                if item.get("kind") == "CustomResourceDefinition"
            )


def strict_validator(schema: Document) -> Any:
    """Of an object whose `spec` and the like OpenAPI v3 describes, without other fields."""
    strict = _strict(schema)
    strict["properties"] = strict.get("properties", {}) | {
        "metadata": _METADATA,
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
    }
    return jsonschema.Draft202012Validator(strict)


def _strict(schema: Any) -> Any:
    """OpenAPI v3 as JSON schema, where an object has no fields but those it names."""
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
    elif result.get("nullable") and "type" in result:
        result["type"] = [result["type"], "null"]
    return result
