"""Manifests as they would be applied: read from files or built by kustomize, and looked at."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import yaml

from deployments.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Document = dict[str, Any]
Role = Literal["head", "worker", "other"]
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BUILD_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong.

    Attributes:
        check: which check found it.
        rule: its name, for tests and for people who search.
        where: kind, name, and a path in it.
        message: the fact, and the remedy.
        placeholder: whether it stands for what only the reader can decide.
    """

    check: str
    rule: str
    where: str
    message: str
    placeholder: bool = False

    def __str__(self) -> str:
        return f"[{self.check}/{self.rule}] {self.where}: {self.message}"


@dataclass(frozen=True)
class PodView:
    """A pod template, wherever it stands.

    Attributes:
        where: for people.
        role: in a RayCluster; other elsewhere.
        group: of the RayCluster.
        labels: with those KubeRay adds.
        spec: of the pod.
    """

    where: str
    role: Role
    group: str
    labels: dict[str, str]
    annotations: dict[str, str]
    spec: Document

    @property
    def containers(self) -> list[Document]:
        """Init containers included."""
        return [*self.spec.get("initContainers", []), *self.spec.get("containers", [])]

    @property
    def main(self) -> Document:
        """The first container: of Ray pods, Ray's."""
        return (self.spec.get("containers") or [{}])[0]

    @property
    def port_names(self) -> dict[str, int]:
        ports = [port for one in self.spec.get("containers", []) for port in one.get("ports", [])]
        return {port["name"]: port["containerPort"] for port in ports if "name" in port}


@dataclass(frozen=True)
class Manifests:
    """What one `kubectl apply` would send.

    Attributes:
        name: of the overlay or file.
        documents: in order.
    """

    name: str
    documents: list[Document] = field(default_factory=list[Document])

    def of(self, *kinds: str) -> list[Document]:
        return [one for one in self.documents if one.get("kind") in kinds]

    @cached_property
    def pods(self) -> list[PodView]:
        """Every pod template."""
        return [pod for one in self.documents for pod in _pods(one)]

    def serve_config(self, service: Document) -> Any:
        """A RayService's Serve config; an empty one where it is no YAML."""
        try:
            return yaml.load(service["spec"]["serveConfigV2"], _LOADER)  # noqa: S506 - safe
        except (KeyError, TypeError, yaml.YAMLError):
            return {}


def where(document: Document, path: str = "") -> str:
    """Kind and name of a document, with a path in it."""
    name = (document.get("metadata") or {}).get("name", "?")
    return f"{document.get('kind', '?')}/{name}{' ' + path if path else ''}"


def _pods(document: Document) -> Iterator[PodView]:
    spec: Document = document.get("spec") or {}
    match document.get("kind"):
        case "RayService":
            yield from _ray_pods(document, spec.get("rayClusterConfig") or {})
        case "RayCluster":
            yield from _ray_pods(document, spec)
        case "CronJob":
            job: Document = (spec.get("jobTemplate") or {}).get("spec") or {}
            yield _pod(where(document), job.get("template") or {})
        case "Job" | "Deployment" | "StatefulSet" | "DaemonSet":
            yield _pod(where(document), spec.get("template") or {})
        case "Pod":
            yield _pod(where(document), document)
        case _:
            pass


def _ray_pods(document: Document, cluster: Document) -> Iterator[PodView]:
    head: Document = cluster.get("headGroupSpec") or {}
    yield _pod(where(document, "head"), head.get("template") or {}, "head", "headgroup", head)
    for group in cluster.get("workerGroupSpecs") or []:
        name = str(group.get("groupName"))
        template = group.get("template") or {}
        yield _pod(where(document, f"group {name}"), template, "worker", name, group)


def _pod(
    place: str,
    template: Document,
    role: Role = "other",
    group: str = "",
    raw: Document | None = None,
) -> PodView:
    about: Document = template.get("metadata") or {}
    labels = {**(about.get("labels") or {}), **((raw or {}).get("labels") or {})}
    if role != "other":
        labels |= {"ray.io/is-ray-node": "yes", "ray.io/node-type": role, "ray.io/group": group}
    annotations = about.get("annotations") or {}
    return PodView(place, role, group, labels, annotations, template.get("spec") or {})


def read(path: Path) -> Manifests:
    """The manifests of a YAML file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        return Manifests(str(path), parse(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            "The manifests cannot be read.", value=f"{path}: {str(error).splitlines()[0]}"
        ) from error


def parse(text: str) -> list[Document]:
    """The documents of a YAML text; raises ValueError where one is no object with a name."""
    documents: list[Any] = [one for one in yaml.load_all(text, _LOADER) if one is not None]
    for one in documents:
        if not isinstance(one, dict) or not (one.get("apiVersion") and one.get("kind")):
            raise ValueError("a document has no apiVersion and kind")
        if not isinstance(one.get("metadata"), dict) or not one["metadata"].get("name"):
            raise ValueError(f"a {one['kind']} has no name")
    return documents


def build(folder: Path) -> Manifests:
    """What kustomize makes of an overlay, without a network.

    Raises:
        ConfigError: kubectl is not there, or refuses it.
    """
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise ConfigError(
            "kubectl is not on the PATH, and overlays are built by `kubectl kustomize`.",
            remedy="Install it, or name files that are built already.",
        )
    command = [kubectl, "kustomize", str(folder)]
    try:
        done = subprocess.run(  # noqa: S603 - our own arguments
            command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        told = f"kustomize took longer than {_BUILD_TIMEOUT_S} s."
        raise ConfigError(told, value=folder, remedy="Does it name files elsewhere?") from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(
            f"kustomize refuses the overlay: {reason}.",
            value=folder,
            remedy=f"Run `kubectl kustomize {folder}` to see all it says.",
        )
    try:
        return Manifests(folder.name, parse(done.stdout))
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            "kustomize makes no manifests of the overlay.",
            value=f"{folder}: {str(error).splitlines()[0]}",
        ) from error
