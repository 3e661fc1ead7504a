"""An overlay's part that is generated: a kustomize component of images and JSON patches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deployments.errors import ConfigError
from kuberay.render.images import UNRESOLVED
from kuberay.render.yamls import Text, dump

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kuberay.render.source import Environment, Image, Values


def component(
    environment: Environment,
    digests: Mapping[str, str],
    base: Sequence[Values],
    wanted: Sequence[Values],
) -> Values:
    """What turns `base` into `wanted`, object by object, and names into images.

    Raises:
        ConfigError: the lock has no line for an image.
    """
    patches = [
        {
            "target": {"kind": one["kind"], "name": one["metadata"]["name"]},
            "patch": Text(dump(operations)),
        }
        for one, other in zip(base, wanted, strict=True)
        if (operations := difference(one, other))
    ]
    return {
        "apiVersion": "kustomize.config.k8s.io/v1alpha1",
        "kind": "Component",
        "images": [
            _image(name, image, digests)
            for name, image in environment.images.items()
            if not image.base
        ],
    } | ({"patches": patches} if patches else {})


def _image(name: str, image: Image, digests: Mapping[str, str]) -> Values:
    if image.local:
        return {"name": name, "newName": image.repository, "newTag": image.tag or "latest"}
    if name not in digests:
        raise ConfigError(
            "The image has no digest.",
            value=name,
            remedy=f"Add `{name}: sha256:{UNRESOLVED}` to kuberay/images.lock, then fill it in.",
        )
    return {"name": name, "newName": image.repository, "digest": digests[name]}


def difference(one: Any, other: Any, path: str = "") -> list[Values]:
    """JSON patch operations (RFC 6902) that make `other` of `one`."""
    if isinstance(one, dict) and isinstance(other, dict):
        operations: list[Values] = []
        for key in one.keys() | other.keys():
            place = f"{path}/{_escaped(str(key))}"
            if key not in other:
                operations.append({"op": "remove", "path": place})
            elif key not in one:
                operations.append({"op": "add", "path": place, "value": other[key]})
            else:
                operations += difference(one[key], other[key], place)
        return sorted(operations, key=lambda operation: operation["path"])
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [op for i, (a, b) in pairs for op in difference(a, b, f"{path}/{i}")]
    return [] if one == other else [{"op": "replace", "path": path, "value": other}]


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
