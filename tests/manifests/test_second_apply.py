"""A second apply does not conflict with what the operator wrote after the first.

KubeRay adds its finalizer with a full Update of the RayService. A small API server records which
manager owns which field, as for `kubectl apply --server-side`.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest

from kuberay.quantity import parse_quantity
from tests.manifests.conftest import OVERLAYS

if TYPE_CHECKING:
    from collections.abc import Callable

    from kuberay.checks.manifests import Manifests

    Overlay = Callable[[str], Manifests]

Object = dict[str, Any]
Path = tuple[str, ...]
US, OPERATOR = "kubectl", "kuberay-operator"
_FINALIZER = "ray.io/rayservice-finalizer"
_UNITS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


class Conflict(Exception):
    """Fields that another manager owns, by manager."""


class FakeServer:
    """One object of an API server, by the rules of server-side apply.

    Mappings are owned field by field, an empty one as a field. A list is a single field (atomic):
    the RayService's CRD has no `x-kubernetes-list-type` for those that we use. Fields that the CRD
    has a default for are there whatever was sent.
    """

    def __init__(self) -> None:
        self.live: Object = {}
        self.owned: dict[str, set[Path]] = {}

    def apply(self, manager: str, given: Object, *, force: bool = False) -> None:
        """Set these fields, and remove those that only this manager had applied before."""
        fields, before = _fields(given), _fields(self.live)
        changed = {path for path, value in fields.items() if before.get(path) != value}
        conflicts = {
            other: paths & changed
            for other, paths in self.owned.items()
            if other != manager and paths & changed
        }
        if conflicts and not force:
            raise Conflict(conflicts)
        for other, paths in conflicts.items():
            self.owned[other] -= paths
        others = {path for other, paths in self.owned.items() if other != manager for path in paths}
        for path in self.owned.get(manager, set()) - fields.keys() - others:
            _remove(self.live, path)
        for path, value in fields.items():
            _set(self.live, path, copy.deepcopy(value))
        self.owned[manager] = set(fields)
        _set_defaults(self.live)

    def update(self, manager: str, given: Object) -> None:
        """Replace the whole object: the manager becomes the only owner of what it changed."""
        before, after = _fields(self.live), _fields(given)
        changed = {path for path, value in after.items() if before.get(path) != value}
        gone = before.keys() - after.keys()
        for paths in self.owned.values():
            paths -= changed | gone
        self.owned[manager] = self.owned.get(manager, set()) | changed
        self.live = copy.deepcopy(given)


def _set_defaults(service: Object) -> None:
    cluster = service["spec"]["rayClusterConfig"]
    for group in cluster["workerGroupSpecs"]:
        for name, value in (("numOfHosts", 1), ("priority", 0), ("replicas", 0)):
            group.setdefault(name, value)
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        for container in group["template"]["spec"]["containers"]:
            for port in container["ports"]:
                port.setdefault("protocol", "TCP")


def _fields(node: Object, path: Path = ()) -> dict[Path, Any]:
    found: dict[Path, Any] = {}
    for key, value in node.items():
        here = (*path, key)
        found |= _fields(value, here) if isinstance(value, dict) and value else {here: value}
    return found


def _set(node: Object, path: Path, value: Any) -> None:
    for key in path[:-1]:
        node = node.setdefault(key, {})
    node[path[-1]] = value


def _remove(node: Object, path: Path) -> None:
    for key in path[:-1]:
        node = node.get(key, {})
    node.pop(path[-1], None)


def add_finalizer(server: FakeServer) -> None:
    """What the operator does when it sees a RayService first: from Go's types, and back to them.

    `scaleStrategy`, a template's `metadata` and a container's `resources` are structs there, which
    Go writes even where they are empty; a quantity is written in its shortest form.
    """
    written: Object = as_go_writes(copy.deepcopy(server.live))
    cluster = written["spec"]["rayClusterConfig"]
    for group in cluster["workerGroupSpecs"]:
        group.setdefault("scaleStrategy", {})
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        group["template"].setdefault("metadata", {})
        pod = group["template"]["spec"]
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            container.setdefault("resources", {})
    written["metadata"]["finalizers"] = [_FINALIZER]
    server.update(OPERATOR, written)


def as_go_writes(node: Any, key: str = "") -> Any:
    """Without null, and with quantities as Kubernetes spells them."""
    if isinstance(node, list):
        return [as_go_writes(one) for one in node]
    if key in ("requests", "limits"):
        return {name: _quantity(value) for name, value in node.items()}
    if isinstance(node, dict):
        return {k: as_go_writes(v, k) for k, v in node.items() if v is not None}
    return _quantity(node) if key == "sizeLimit" else node


def _quantity(text: str) -> str:
    amount = parse_quantity(text)
    if amount % 1:
        return f"{amount * 1000:f}".rstrip("0").rstrip(".") + "m"
    unit = text.lstrip("0123456789.")
    if unit not in _UNITS:
        return f"{amount:f}".removesuffix(".0")
    best = [name for name, size in _UNITS.items() if amount % size == 0]
    return f"{amount // _UNITS[best[-1]]}{best[-1]}" if unit else f"{amount}"


def deployed(service: Object) -> FakeServer:
    """A server on which a RayService was applied once, and which the operator has seen."""
    server = FakeServer()
    server.apply(US, service)
    add_finalizer(server)
    return server


@pytest.fixture(params=OVERLAYS)
def service(request: pytest.FixtureRequest, overlay: Overlay) -> Object:
    return overlay(request.param).of("RayService")[0]


def test_the_operator_owns_its_finalizer_and_nothing_else(service: Object) -> None:
    assert deployed(service).owned[OPERATOR] == {("metadata", "finalizers")}


def test_a_second_apply_and_one_of_a_change_meet_no_conflict(service: Object) -> None:
    server = deployed(service)
    server.apply(US, service)
    changed = copy.deepcopy(service)
    ingress, models = changed["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    models["template"]["spec"]["containers"][0]["image"] = "imagen-gpu:next"
    ingress["maxReplicas"] += 1
    server.apply(US, changed)
    ingress, models = server.live["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert models["template"]["spec"]["containers"][0]["image"] == "imagen-gpu:next"
    assert server.live["metadata"]["finalizers"] == [_FINALIZER]


def test_what_was_deployed_without_the_empty_mappings_is_brought_over_by_force_once(
    service: Object,
) -> None:
    former = copy.deepcopy(service)
    for group in former["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        del group["scaleStrategy"]
        if not group["template"]["metadata"]:
            del group["template"]["metadata"]
    server = deployed(former)
    for given in (former, service):
        with pytest.raises(Conflict, match=OPERATOR):
            server.apply(US, given)
    server.apply(US, service, force=True)
    assert server.owned[OPERATOR] == {("metadata", "finalizers")}
    server.apply(US, service)
