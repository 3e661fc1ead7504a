"""Manifests as `kubectl apply` would send them: read from a file, or built by kustomize."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import yaml

from deployments.errors import ConfigError
from deployments.settings import file_fault

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

Document = dict[str, Any]
Role = Literal["head", "worker", "other"]
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Finding:
    """A mistake in the manifests.

    Attributes:
        rule: the rule that is broken, one name a rule.
        where: kind, name, and a path inside the object.
        message: what is wrong and what would be right.
        placeholder: it is a value that only the reader can fill in.
    """

    rule: str
    where: str
    message: str
    placeholder: bool = False

    def __str__(self) -> str:
        return f"[{self.rule}] {self.where}: {self.message}"


@dataclass(frozen=True)
class PodView:
    """A pod template, whichever kind of object it is part of.

    Attributes:
        where: kind and name of the object, and the group.
        role: in a RayCluster; `other` outside one.
        group: in a RayCluster, `headgroup` for the head.
        labels: including those that KubeRay adds.
        spec: of the pod.
    """

    where: str
    role: Role
    group: str
    labels: dict[str, str]
    spec: Document

    @property
    def containers(self) -> list[Document]:
        """All of them, init containers first."""
        return [*self.spec.get("initContainers", []), *self.spec.get("containers", [])]

    @property
    def main(self) -> Document:
        """The first container. In a Ray pod that is Ray's."""
        return (self.spec.get("containers") or [{}])[0]

    @property
    def limits(self) -> dict[str, str]:
        """Resource limits of the first container."""
        return (self.main.get("resources") or {}).get("limits") or {}

    @property
    def environment(self) -> dict[str, str | None]:
        """Variables of the first container; None for a value from elsewhere."""
        return {one["name"]: one.get("value") for one in self.main.get("env") or []}

    @property
    def port_names(self) -> dict[str, int]:
        ports = [port for one in self.spec.get("containers", []) for port in one.get("ports", [])]
        return {port["name"]: port["containerPort"] for port in ports if "name" in port}


@dataclass(frozen=True)
class Manifests:
    """The objects of one `kubectl apply`.

    Attributes:
        name: of the overlay or file.
        documents: the objects, in order.
    """

    name: str
    documents: list[Document] = field(default_factory=list[Document])

    def of(self, *kinds: str) -> list[Document]:
        return [one for one in self.documents if one.get("kind") in kinds]

    @cached_property
    def pods(self) -> list[PodView]:
        """Every pod template."""
        return [pod for one in self.documents for pod in _pods(one)]

    @cached_property
    def service(self) -> Document:
        """The RayService.

        Raises:
            ConfigError: there is none, or another one.
        """
        services = self.of("RayService")
        if len(services) != 1:
            raise ConfigError("The manifests must have one RayService.", value=len(services))
        return services[0]

    @property
    def cluster(self) -> Document:
        """The rayClusterConfig."""
        return self.service["spec"]["rayClusterConfig"]

    @property
    def groups(self) -> list[Document]:
        """The worker groups."""
        return self.cluster.get("workerGroupSpecs") or []

    @cached_property
    def serve_config(self) -> Document:
        """The Serve config; empty if it is missing or no mapping in YAML."""
        try:
            config: Any = yaml.load(self.service["spec"]["serveConfigV2"], _LOADER)  # noqa: S506
        except (KeyError, ValueError, yaml.YAMLError):
            return {}
        return config if isinstance(config, dict) else {}

    @property
    def http_options(self) -> Document:
        """Of the Serve config."""
        return self.serve_config.get("http_options") or {}

    @property
    def deployments(self) -> list[Document]:
        """The Serve deployments, of every application."""
        applications = self.serve_config.get("applications") or []
        return [one for application in applications for one in application.get("deployments") or []]

    @property
    def ingress(self) -> Document:
        """The Serve deployment that speaks HTTP; empty if the config does not name it."""
        return next((one for one in self.deployments if one.get("name") == "Ingress"), {})

    @property
    def clients(self) -> Document:
        """What clients may do, as the config says; see `ClientSettings`."""
        return self.ingress.get("user_config") or {}


def where(document: Document, path: str = "") -> str:
    """Kind and name of an object, and a path inside it."""
    name = (document.get("metadata") or {}).get("name", "?")
    return f"{document.get('kind', '?')}/{name}{' ' + path if path else ''}"


def walk(node: Any) -> Iterator[Any]:
    """A value and everything in it."""
    yield node
    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from walk(child)


def matches(selector: Document, labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects an object with these labels; an empty one selects all."""
    expressions = selector.get("matchExpressions") or []
    exact = (selector.get("matchLabels") or {}).items() <= labels.items()
    return exact and all(_holds(one, labels.get(one["key"])) for one in expressions)


def _holds(expression: Document, value: str | None) -> bool:
    match expression["operator"]:
        case "In":
            return value in expression["values"]
        case "NotIn":
            return value not in expression["values"]
        case "Exists":
            return value is not None
        case _:
            return value is None


def _pods(document: Document) -> Iterator[PodView]:
    spec: Document = document.get("spec") or {}
    match document.get("kind"):
        case "RayService":
            head: Document = spec["rayClusterConfig"]["headGroupSpec"]
            yield _ray_pod(document, head, "head", "headgroup")
            for group in spec["rayClusterConfig"].get("workerGroupSpecs") or []:
                yield _ray_pod(document, group, "worker", group["groupName"])
        case "CronJob":
            yield _pod(where(document), spec["jobTemplate"]["spec"]["template"])
        case "Job" | "Deployment" | "StatefulSet" | "DaemonSet":
            yield _pod(where(document), spec["template"])
        case _:
            pass  # has no pods


def _ray_pod(document: Document, group: Document, role: Role, name: str) -> PodView:
    pod = _pod(where(document, f"group {name}"), group["template"])
    labels = {"ray.io/is-ray-node": "yes", "ray.io/node-type": role, "ray.io/group": name}
    labels = pod.labels | (group.get("labels") or {}) | labels
    return replace(pod, role=role, group=name, labels=labels)


def _pod(place: str, template: Document) -> PodView:
    labels = (template.get("metadata") or {}).get("labels") or {}
    return PodView(place, "other", "", labels, template["spec"])


def read(path: Path) -> Manifests:
    """The manifests of a YAML file.

    Raises:
        ConfigError: the file cannot be read, or a document of it is no object.
    """
    try:
        return Manifests(str(path), _parse(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            "The manifests cannot be read.", value=f"{path}: {file_fault(error)}"
        ) from error


def build(folder: Path) -> Manifests:
    """Build an overlay with `kubectl kustomize`. Ours need no network.

    Raises:
        ConfigError: kubectl is missing, or kustomize refuses the overlay.
    """
    command = ["kubectl", "kustomize", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError as error:
        raise ConfigError(
            "kubectl is not on the PATH, and overlays are built with `kubectl kustomize`.",
            remedy="Install kubectl, or name files that are already built.",
        ) from error
    if done.returncode:
        raise ConfigError(f"kustomize refuses the overlay: {done.stderr.strip()}", value=folder)
    return Manifests(folder.name, _parse(done.stdout))


def _parse(text: str) -> list[Document]:
    documents = list(yaml.load_all(text, _LOADER))
    for number, one in enumerate(documents, 1):
        if one and not isinstance(one, dict):
            raise ValueError(f"document {number} is a {type(one).__name__}, not an object")
    return [one for one in documents if one]
