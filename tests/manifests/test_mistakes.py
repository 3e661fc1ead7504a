"""Mistakes that no cluster refuses: `imagen kuberay validate` finds each, under its own rule.

kuberay/README.md ("What refuses a mistake") says who refuses the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from deployments.settings import ROOT
from kuberay.checks import (
    autoscaler,
    capacity,
    gateway,
    pods,
    serve_config,
    timeouts,
    validate,
    wiring,
)
from tests.manifests.prod import Prod
from tests.manifests.test_network import CLOSED, OPEN

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from kuberay.checks.manifests import Manifests

    Overlay = Callable[[str], Manifests]

DIGEST = "sha256:" + "0123456789abcdef" * 4


def _limit(group: dict[str, Any], name: str, value: str) -> None:
    for kind in ("requests", "limits"):
        group["template"]["spec"]["containers"][0]["resources"][kind][name] = value


def _quota(prod: Prod, name: str, value: str) -> None:
    prod.one("ResourceQuota")["spec"]["hard"][name] = value


def _budget(prod: Prod, **values: object) -> None:
    spec = prod.one("PodDisruptionBudget", "imagen-ingress")["spec"]
    spec.pop("minAvailable")
    spec.update(values)


def _listener(prod: Prod) -> dict[str, Any]:
    return prod.one("Gateway")["spec"]["listeners"][0]


# By name: the check that finds it, the rule, a word of the message, and how the mistake is made.
MISTAKES: dict[str, tuple[ModuleType, str, str, Callable[[Prod], object]]] = {
    "an option Serve does not have": (
        serve_config,
        "unknown-field",
        "max_ongoing_request",
        lambda p: p.deployment("Comic", lambda one: one.update(max_ongoing_request=4)),
    ),
    "a scaling option Serve does not have": (
        serve_config,
        "unknown-field",
        "min_replica",
        lambda p: p.deployment(
            "Comic", lambda one: one["autoscaling_config"].update(min_replica=0)
        ),
    ),
    "a negative share": (
        serve_config,
        "schema",
        "num_gpus",
        lambda p: p.deployment("Comic", lambda one: one["ray_actor_options"].update(num_gpus=-1)),
    ),
    "a deployment the application does not have": (
        serve_config,
        "deployments",
        "Manga",
        lambda p: p.deployment("Comic", lambda one: one.update(name="Manga")),
    ),
    "an argument the application does not have": (
        serve_config,
        "args",
        "devise",
        lambda p: p.serve(lambda config: config["applications"][0]["args"].update(devise="cpu")),
    ),
    "an application that is not ours": (
        serve_config,
        "import-path",
        "serve_app.ap:build",
        lambda p: p.serve(
            lambda config: config["applications"][0].update(import_path="serve_app.ap:build")
        ),
    ),
    "a user_config nobody reads": (
        serve_config,
        "user-config",
        "budget",
        lambda p: p.deployment("Comic", lambda one: one["user_config"].update(budget=1)),
    ),
    "accelerator_type, which does not scale from zero": (
        autoscaler,
        "infeasible",
        "accelerator_type:L4",
        lambda p: p.deployment(
            "Comic", lambda one: one["ray_actor_options"].update(accelerator_type="L4")
        ),
    ),
    "more RAM than a pod has": (
        autoscaler,
        "infeasible",
        "memory",
        lambda p: p.deployment(
            "Comic", lambda one: one["ray_actor_options"].update(memory=30 * 2**30)
        ),
    ),
    "more than one GPU for a replica": (
        autoscaler,
        "infeasible",
        "GPU",
        lambda p: p.deployment("Aged", lambda one: one["ray_actor_options"].update(num_gpus=2)),
    ),
    "fewer nodes than one replica of each needs": (
        autoscaler,
        "too-few-nodes",
        "no room",
        lambda p: p.models.update(maxReplicas=1),
    ),
    "a label nobody has": (
        autoscaler,
        "infeasible",
        "imagen.dev/role",
        lambda p: p.models["labels"].update({"imagen.dev/role": "gpu"}),
    ),
    "no CPU at all": (
        autoscaler,
        "infeasible",
        "Ingress",
        lambda p: _limit(p.ingress, "cpu", "0m"),
    ),
    "GPU nodes while nobody asks": (
        autoscaler,
        "idle-gpu",
        "models",
        lambda p: p.models.update(minReplicas=1, replicas=1),
    ),
    "more ingress replicas than pods": (
        autoscaler,
        "max-replicas",
        "Ingress",
        lambda p: p.deployment(
            "Ingress", lambda one: one["autoscaling_config"].update(max_replicas=8)
        ),
    ),
    "a quota below the largest cluster": (
        capacity,
        "quota",
        "GPUs",
        lambda p: p.models.update(maxReplicas=9),
    ),
    "a quota of GPUs without room for an upgrade": (
        capacity,
        "quota",
        "4 GPUs are allowed; two clusters",
        lambda p: _quota(p, "requests.nvidia.com/gpu", "4"),
    ),
    "a quota without GPUs": (
        capacity,
        "quota",
        "0 GPUs",
        lambda p: p.one("ResourceQuota")["spec"]["hard"].pop("requests.nvidia.com/gpu"),
    ),
    "a quota of too few CPUs": (
        capacity,
        "quota",
        "68 CPUs",
        lambda p: _quota(p, "requests.cpu", "68"),
    ),
    "a quota of too little memory": (
        capacity,
        "quota",
        "258Gi bytes",
        lambda p: _quota(p, "requests.memory", "258Gi"),
    ),
    "a quota of too few pods": (capacity, "quota", "18 pods", lambda p: _quota(p, "pods", "18")),
    "a budget that Kubernetes cannot count": (
        capacity,
        "budget",
        "imagen-ingress",
        lambda p: _budget(p, maxUnavailable=1),
    ),
    "a budget that says both": (
        capacity,
        "budget",
        "imagen-ingress",
        lambda p: _budget(p, minAvailable=1, maxUnavailable=0),
    ),
    "a budget in percent": (
        capacity,
        "budget",
        "minAvailable",
        lambda p: _budget(p, minAvailable="50%"),
    ),
    "a budget that lets nobody go": (
        capacity,
        "budget",
        "2 pods",
        lambda p: _budget(p, minAvailable=2),
    ),
    "a budget of pods that are not always there": (
        capacity,
        "budget",
        "0 pods",
        lambda p: p.one("PodDisruptionBudget")["spec"].update(
            selector={"matchLabels": {"ray.io/group": "models"}}
        ),
    ),
    "a load balancer that gives up first": (
        timeouts,
        "timeout-order",
        "load balancer (30 s)",
        lambda p: p.one("GCPBackendPolicy")["spec"]["default"].pop("timeoutSec"),
    ),
    "connections that Serve closes first": (
        timeouts,
        "keep-alive",
        "600",
        lambda p: p.serve(lambda config: config["http_options"].pop("keep_alive_timeout_s")),
    ),
    "connections that Serve closes before a slow answer": (
        timeouts,
        "keep-alive",
        "900",
        lambda p: p.one("GCPBackendPolicy")["spec"]["default"].update(timeoutSec=900),
    ),
    "a load balancer that does not wait for pods that leave": (
        timeouts,
        "draining",
        "drainingTimeoutSec 120",
        lambda p: p.one("GCPBackendPolicy")["spec"]["default"].update(
            connectionDraining={"drainingTimeoutSec": 120}
        ),
    ),
    "a load balancer that would wait longer than it can": (
        timeouts,
        "draining",
        "3600",
        lambda p: p.one("GCPBackendPolicy")["spec"]["default"].update(
            connectionDraining={"drainingTimeoutSec": 3601}
        ),
    ),
    "an ingress replica that ends before its requests": (
        timeouts,
        "graceful-shutdown",
        "540 s",
        lambda p: p.deployment("Ingress", lambda one: one.pop("graceful_shutdown_timeout_s")),
    ),
    "an old cluster that goes before the load balancer gives up": (
        timeouts,
        "deletion-delay",
        "660",
        lambda p: p.one("GCPBackendPolicy")["spec"]["default"].update(timeoutSec=900),
    ),
    "a pod that ends before its requests": (
        timeouts,
        "shutdown-order",
        "terminationGracePeriodSeconds 30",
        lambda p: p.pod(p.models).pop("terminationGracePeriodSeconds"),
    ),
    "an old cluster that goes at once": (
        timeouts,
        "deletion-delay",
        "60",
        lambda p: p.spec.pop("rayClusterDeletionDelaySeconds"),
    ),
    "ingress replicas that may land on GPU nodes": (
        wiring,
        "ingress-group",
        "scale to zero",
        lambda p: p.deployment("Ingress", lambda one: one["ray_actor_options"].clear()),
    ),
    "a port that does not match": (
        wiring,
        "serve-port",
        "8001",
        lambda p: p.serve(lambda config: config["http_options"].update(port=8001)),
    ),
    "a health check of the root": (
        wiring,
        "health-check",
        "404",
        lambda p: p.one("HealthCheckPolicy")["spec"]["default"]["config"]["httpHealthCheck"].update(
            requestPath="/"
        ),
    ),
    "a route to another Service": (
        wiring,
        "route",
        "imagen-serve-svc",
        lambda p: p.one("HTTPRoute")["spec"]["rules"][0]["backendRefs"][0].update(name="imagen"),
    ),
    "no readiness probe of ours": (
        wiring,
        "readiness-probe",
        "wget",
        lambda p: p.ray(p.models).pop("readinessProbe"),
    ),
    "a port name that monitoring does not find": (
        wiring,
        "port-name",
        "metrics",
        lambda p: p.ray(p.models)["ports"][1].update(name="prometheus"),
    ),
    "a budget for pods that do not exist": (
        wiring,
        "selector",
        "gpu",
        lambda p: p.one("PodDisruptionBudget")["spec"].update(
            selector={"matchLabels": {"ray.io/group": "gpu"}}
        ),
    ),
    "another Ray than the application's": (
        wiring,
        "ray-version",
        "2.59.0",
        lambda p: p.cluster.update(rayVersion="2.59.0"),
    ),
    "no toleration of GPU nodes": (
        wiring,
        "toleration",
        "nvidia.com/gpu",
        lambda p: p.pod(p.models).pop("tolerations"),
    ),
    "a Redis that is not there": (
        wiring,
        "redis",
        "redis:6379",
        lambda p: p.cluster["gcsFaultToleranceOptions"].update(redisAddress="redis://redis:6379"),
    ),
    "another namespace": (
        wiring,
        "namespace",
        "default",
        lambda p: p.one("HTTPRoute")["metadata"].update(namespace="default"),
    ),
    "a cache larger than the pod's disk": (
        wiring,
        "cache",
        "kubelet",
        lambda p: p.pod(p.models)["volumes"][0]["emptyDir"].update(sizeLimit="60Gi"),
    ),
    "no compute class": (
        wiring,
        "compute-class",
        "nodeSelector",
        lambda p: p.pod(p.models)["nodeSelector"].pop("cloud.google.com/compute-class"),
    ),
    "more GPUs than a node has": (
        wiring,
        "gpu-count",
        "2 GPUs",
        lambda p: _limit(p.models, "nvidia.com/gpu", "2"),
    ),
    "no proxy in the ingress pods": (
        wiring,
        "proxy-location",
        "HeadOnly",
        lambda p: p.serve(lambda config: config.update(proxy_location="HeadOnly")),
    ),
    "proxies that only their own pod reaches": (
        wiring,
        "serve-host",
        "127.0.0.1",
        lambda p: p.serve(lambda config: config["http_options"].update(host="127.0.0.1")),
    ),
    "a service that is suspended": (
        wiring,
        "suspend",
        "every pod",
        lambda p: p.spec.update(suspend=True),
    ),
    "a cluster that is suspended": (
        wiring,
        "suspend",
        "every pod",
        lambda p: p.cluster.update(suspend=True),
    ),
    "an autoscaler without a token": (
        wiring,
        "head-token",
        "autoscaler",
        lambda p: p.pod(p.head).pop("automountServiceAccountToken"),
    ),
    "a compute class that is not there": (
        wiring,
        "compute-class",
        "gpu-pool",
        lambda p: p.pod(p.models)["nodeSelector"].update(
            {"cloud.google.com/compute-class": "gpu-pool"}
        ),
    ),
    "a head whose ports lack serve": (
        wiring,
        "serve-port",
        "head",
        lambda p: p.ray(p.head)["ports"].pop(0),
    ),
    "tokens with an old Ray": (
        wiring,
        "ray-version",
        "2.51.0",
        lambda p: p.cluster.update(rayVersion="2.51.0"),
    ),
    "an image by tag": (
        pods,
        "image-unpinned",
        "imagen-gpu:latest",
        lambda p: p.ray(p.models).update(image="imagen-gpu:latest"),
    ),
    "a digest that is cut short": (
        pods,
        "image-unpinned",
        "sha256",
        lambda p: p.ray(p.models).update(image=f"imagen-gpu@{DIGEST[:-1]}"),
    ),
    "memory requests below limits": (
        pods,
        "memory",
        "20Gi",
        lambda p: p.ray(p.models)["resources"]["requests"].update(memory="20Gi"),
    ),
    "a token on a worker": (
        pods,
        "token-automount",
        "token",
        lambda p: p.pod(p.models).pop("automountServiceAccountToken"),
    ),
    "a service without Identity-Aware Proxy": (
        gateway,
        "iap",
        "open to everybody",
        lambda p: p.one("GCPBackendPolicy")["spec"]["default"]["iap"].update(enabled=False),
    ),
    "a service without a policy of its backend": (
        gateway,
        "way-in",
        "open to everybody",
        lambda p: p.drop("GCPBackendPolicy"),
    ),
    "a route to another Gateway": (
        gateway,
        "parent",
        "imagn",
        lambda p: p.one("HTTPRoute")["spec"]["parentRefs"][0].update(name="imagn"),
    ),
    "a route to another listener": (
        gateway,
        "parent",
        "imagen/http",
        lambda p: p.one("HTTPRoute")["spec"]["parentRefs"][0].update(sectionName="http"),
    ),
    "a route without a Gateway": (
        gateway,
        "parent",
        "parentRefs",
        lambda p: p.one("HTTPRoute")["spec"].pop("parentRefs"),
    ),
    "another host than the Gateway's": (
        gateway,
        "host",
        "other.example.com",
        lambda p: p.one("HTTPRoute")["spec"].update(hostnames=["other.example.com"]),
    ),
    "HTTP in the clear": (
        gateway,
        "https",
        "80",
        lambda p: _listener(p).update(protocol="HTTP", port=80),
    ),
    "HTTPS without a certificate": (
        gateway,
        "https",
        "certificate",
        lambda p: p.one("Gateway")["metadata"].pop("annotations"),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_under_its_rule(name: str, overlay: Overlay) -> None:
    check, rule, word, make = MISTAKES[name]
    prod = Prod(overlay("prod"))
    make(prod)
    findings = [one for one in check.check(prod.manifests) if one.rule == rule]
    assert [one for one in findings if word in str(one)], findings


def test_every_check_is_part_of_validate_and_finds_a_mistake() -> None:
    assert {check for check, *_ in MISTAKES.values()} == set(validate.CHECKS)


def test_the_readme_counts_the_mistakes() -> None:
    text = (ROOT / "kuberay" / "README.md").read_text(encoding="utf-8")
    assert f"the {len(MISTAKES)} mistakes of `tests/manifests/test_mistakes.py`" in text
    assert f"{len(CLOSED) + len(OPEN) + 1} mistakes in network policies" in text


RIGHT: dict[str, Callable[[Prod], object]] = {
    "one cluster at a time, and a quota for one": lambda p: (
        p.spec.update(upgradeStrategy={"type": "None"}),
        _quota(p, "requests.nvidia.com/gpu", "4"),
        _quota(p, "requests.cpu", "35"),
    ),
    "a quota of GPUs only": lambda p: p.one("ResourceQuota")["spec"].update(
        hard={"requests.nvidia.com/gpu": "8"}
    ),
    "a host below the Gateway's": lambda p: _listener(p).update(hostname="*.unresolved.example"),
    "a certificate of the listener": lambda p: (
        p.one("Gateway")["metadata"].pop("annotations"),
        _listener(p).update(tls={"certificateRefs": [{"name": "imagen-tls"}]}),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_correct_variant_passes(name: str, overlay: Overlay) -> None:
    prod = Prod(overlay("prod"))
    RIGHT[name](prod)
    assert [str(one) for one in validate.validate(prod.manifests).errors] == []


def test_a_field_of_the_wrong_type_is_a_finding_and_no_traceback(overlay: Overlay) -> None:
    prod = Prod(overlay("dev"))
    prod.cluster["workerGroupSpecs"][0]["labels"] = ["a"]
    findings = validate.validate(prod.manifests).errors
    assert "shape" in {one.rule for one in findings}
