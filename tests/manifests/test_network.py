"""NetworkPolicies: every connection that the service needs is allowed, and no stranger's is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import yaml

from deployments.settings import ROOT
from tests.manifests.network import NEEDED, closed, denied_by_default, opened
from tests.manifests.prod import Prod

if TYPE_CHECKING:
    from collections.abc import Callable

    from kuberay.checks.manifests import Manifests

    Overlay = Callable[[str], Manifests]


@pytest.mark.parametrize("name", ["prod", "prod-hostpath", "prod-shared", "portable", "gke-smoke"])
def test_what_is_needed_is_allowed_and_nothing_else(name: str, overlay: Overlay) -> None:
    manifests = overlay(name)
    assert (closed(manifests), opened(manifests)) == ([], [])
    assert denied_by_default(manifests) == {"Ingress", "Egress"}


def test_dev_is_closed_too(overlay: Overlay) -> None:
    assert denied_by_default(overlay("dev")) == {"Ingress", "Egress"}


def test_the_operator_runs_in_the_namespace_that_is_let_in() -> None:
    text = (ROOT / "kuberay" / "operator" / "kustomization.yaml").read_text(encoding="utf-8")
    assert f"namespace/{yaml.safe_load(text)['namespace']} " in NEEDED


CLOSED: dict[str, tuple[str, Callable[[Prod], object]]] = {
    "no names": ("53/UDP", lambda p: p.drop("NetworkPolicy", "names")),
    "pods of Ray that do not reach each other": (
        "31337",
        lambda p: p.flow("ray", "egress").update(ports=[{"protocol": "TCP", "port": 6379}]),
    ),
    "another port of the dashboard": (
        "kuberay-system  8265",
        lambda p: p.flow("operator", "ingress")["ports"][0].update(port=8256),
    ),
    "another namespace of the operator": (
        "kuberay-system  8000",
        lambda p: p.flow("operator", "ingress")["from"][0].update(
            namespaceSelector={"matchLabels": {"kubernetes.io/metadata.name": "kuberay"}}
        ),
    ),
    "no way to the API server": (
        "172.16.0.2/32       6443",
        lambda p: p.drop("NetworkPolicy", "autoscaler"),
    ),
    "load balancers shut out": (
        "35.191.0.0/16",
        lambda p: p.flow("load-balancer", "ingress")["from"].pop(),
    ),
    "model pods without a bucket": (
        "models         Egress   142.250.0.0/16",
        lambda p: p.models["template"]["metadata"]["labels"].clear(),
    ),
    "an exception that covers the bucket": (
        "142.250.0.0/16",
        lambda p: p.flow("models", "egress")["to"][0]["ipBlock"]["except"].append("142.0.0.0/8"),
    ),
    "no tokens for the bucket": (
        "988",
        lambda p: p.flow("metadata-server", "egress").update(
            ports=[{"protocol": "TCP", "port": 80}]
        ),
    ),
    "a port that is not scraped": (
        "44227",
        lambda p: p.flow("monitoring", "ingress")["ports"].pop(),
    ),
    "a Redis that the head does not reach": (
        "headgroup      Egress   redis",
        lambda p: p.drop("NetworkPolicy", "to-redis"),
    ),
    "a Redis that takes no jobs": (
        "ingress        Egress   redis",
        lambda p: p.drop("NetworkPolicy", "jobs-to-redis"),
    ),
    "ingress pods that store no pictures": (
        "ingress        Egress   142.250.0.0/16",
        lambda p: p.ingress["template"]["metadata"]["labels"].clear(),
    ),
    "a Redis that KubeRay cannot clean up": (
        "redis          Ingress  redis-cleanup",
        lambda p: p.flow("redis", "ingress").update(
            {"from": [{"podSelector": {"matchLabels": {"ray.io/node-type": "head"}}}]}
        ),
    ),
}


@pytest.mark.parametrize("name", CLOSED)
def test_a_closed_connection_is_found(name: str, overlay: Overlay) -> None:
    words, make = CLOSED[name]
    prod = Prod(overlay("prod"))
    make(prod)
    assert [line for line in closed(prod.manifests) if words in line], closed(prod.manifests)


OPEN: dict[str, tuple[str, Callable[[Prod], object]]] = {
    "a dashboard for everybody": (
        "headgroup Ingress 8.8.8.8/32 8265",
        lambda p: p.flow("operator", "ingress").pop("from"),
    ),
    "a Redis for model pods": (
        "redis Ingress models 6379",
        lambda p: p.flow("redis", "ingress")["from"][1].update(
            podSelector={"matchLabels": {"ray.io/node-type": "worker"}}
        ),
    ),
    "a Redis for the whole namespace": (
        "redis Ingress stranger 6379",
        lambda p: p.flow("redis", "ingress").update({"from": [{"podSelector": {}}]}),
    ),
}


@pytest.mark.parametrize("name", OPEN)
def test_an_open_connection_is_found(name: str, overlay: Overlay) -> None:
    line, make = OPEN[name]
    prod = Prod(overlay("prod"))
    make(prod)
    assert line in opened(prod.manifests)


def test_pods_that_no_policy_selects_are_found(overlay: Overlay) -> None:
    prod = Prod(overlay("prod"))
    prod.drop("NetworkPolicy", "default-deny")
    assert denied_by_default(prod.manifests) != {"Ingress", "Egress"}
