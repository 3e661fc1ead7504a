"""The prod overlay, taken apart, so that a test can make a mistake in it in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from kuberay.checks.manifests import Manifests


class Prod:
    """The prod overlay, with short names for the parts that the tests change."""

    def __init__(self, manifests: Manifests) -> None:
        self.manifests = manifests
        self.service = self.one("RayService")
        self.cluster = self.service["spec"]["rayClusterConfig"]
        self.head = self.cluster["headGroupSpec"]
        groups = {group["groupName"]: group for group in self.cluster["workerGroupSpecs"]}
        self.models, self.ingress = groups["models"], groups["ingress"]
        self._parts = {"cluster": self.cluster}
        for name, group in {"head": self.head, **groups}.items():
            pod = group["template"]["spec"]
            self._parts |= {name: group, f"{name} pod": pod, f"{name} ray": pod["containers"][0]}

    def one(self, kind: str, name: str = "") -> dict[str, Any]:
        found = [d for d in self.manifests.of(kind) if not name or d["metadata"]["name"] == name]
        return found[0]

    def flow(self, name: str, way: str) -> dict[str, Any]:
        """The first rule of a NetworkPolicy."""
        return self.one("NetworkPolicy", name)["spec"][way][0]

    def drop(self, kind: str, name: str = "") -> None:
        self.manifests.documents.remove(self.one(kind, name))

    def change(self, part: str, change: Any) -> None:
        """Set values of a part by their paths, words with spaces between; None deletes.

        Args:
            part: `cluster`, `head`, `ingress` or `models`, `… pod` or `… ray` of these, `serve` for
                the Serve config, the name of a Serve deployment, or the kind of an object, with its
                name if there are several.
            change: values by path, or `delete` for an object.
        """
        if change == "delete":
            self.drop(*part.split())
            return
        config = yaml.safe_load(self.service["spec"]["serveConfigV2"])
        deployments = {one["name"]: one for one in config["applications"][0]["deployments"]}
        parts = {"serve": config, **deployments, **self._parts}
        for path, value in change.items():
            _set(parts[part] if part in parts else self.one(*part.split()), path.split(), value)
        self.service["spec"]["serveConfigV2"] = yaml.safe_dump(config)


def _set(node: Any, path: list[str], value: Any) -> None:
    *steps, last = path
    for step in steps:
        node = node[int(step)] if isinstance(node, list) else node[step]
    key = int(last) if isinstance(node, list) else last
    if value is None:
        del node[key]
    else:
        node[key] = value
