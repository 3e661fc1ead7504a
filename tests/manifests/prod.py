"""The prod overlay, taken apart, so that a test can make a mistake in it in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Callable

    from kuberay.checks.manifests import Manifests


class Prod:
    """The prod overlay, with short names for the objects that the tests change."""

    def __init__(self, manifests: Manifests) -> None:
        self.manifests = manifests
        self.service = manifests.of("RayService")[0]
        self.spec = self.service["spec"]
        self.cluster = self.spec["rayClusterConfig"]
        self.head = self.cluster["headGroupSpec"]
        self.ingress, self.models = self.cluster["workerGroupSpecs"]

    def pod(self, group: dict[str, Any]) -> dict[str, Any]:
        return group["template"]["spec"]

    def ray(self, group: dict[str, Any]) -> dict[str, Any]:
        return self.pod(group)["containers"][0]

    def one(self, kind: str, name: str = "") -> dict[str, Any]:
        found = [d for d in self.manifests.of(kind) if not name or d["metadata"]["name"] == name]
        return found[0]

    def flow(self, name: str, way: str) -> dict[str, Any]:
        """The first rule of a NetworkPolicy."""
        return self.one("NetworkPolicy", name)["spec"][way][0]

    def drop(self, kind: str, name: str = "") -> None:
        self.manifests.documents.remove(self.one(kind, name))

    def serve(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the Serve config inside."""
        config = yaml.safe_load(self.spec["serveConfigV2"])
        change(config)
        self.spec["serveConfigV2"] = yaml.safe_dump(config)

    def deployment(self, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        self.serve(
            lambda config: [
                change(one)
                for one in config["applications"][0]["deployments"]
                if one["name"] == name
            ]
        )
