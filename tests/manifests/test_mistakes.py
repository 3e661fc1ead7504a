"""Mistakes that people make in manifests: each is caught, under its own name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from deployments.errors import ConfigError
from kuberay.checks import (
    autoscaler,
    capacity,
    core,
    gke_schema,
    network,
    policy,
    rules,
    serve_schema,
    timing,
    wiring,
)
from kuberay.checks.crd import Schemas
from kuberay.checks.manifests import Manifests
from kuberay.checks.validate import validate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    Overlay = Callable[[str], Manifests]

DIGEST = "sha256:" + "0123456789abcdef" * 4


class Prod:
    """The prod overlay, with names for what mistakes are made in."""

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


@dataclass(frozen=True)
class Mistake:
    """What is done, which check must tell of it under which rule, and a word it must say."""

    check: ModuleType
    rule: str
    word: str
    make: Callable[[Prod], object]


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


MISTAKES = {
    "a misspelt field of a pod": Mistake(
        core, "schema", "nodeSelecter", lambda p: p.pod(p.head).update(nodeSelecter={})
    ),
    "a misspelt field of a Deployment's kind": Mistake(
        core,
        "schema",
        "maxUnavailible",
        lambda p: p.one("PodDisruptionBudget")["spec"].update(maxUnavailible=1),
    ),
    "a bad quantity": Mistake(
        core, "quantity", "26Gig", lambda p: _limit(p.models, "memory", "26Gig")
    ),
    "a number where a text belongs": Mistake(
        core,
        "schema",
        "1000",
        lambda p: p.ray(p.models)["env"].append({"name": "X", "value": 1000}),
    ),
    "an image by tag": Mistake(
        policy,
        "image-unpinned",
        "imagen-gpu:latest",
        lambda p: p.ray(p.models).update(image="imagen-gpu:latest"),
    ),
    "a digest that is cut short": Mistake(
        policy,
        "image-unpinned",
        "sha256",
        lambda p: p.ray(p.models).update(image=f"imagen-gpu@{DIGEST[:-1]}"),
    ),
    "memory requests below limits": Mistake(
        policy,
        "memory",
        "20Gi",
        lambda p: p.ray(p.models)["resources"]["requests"].update(memory="20Gi"),
    ),
    "a root container": Mistake(
        policy,
        "root",
        "runAsNonRoot",
        lambda p: p.pod(p.models)["securityContext"].update(runAsUser=0),
    ),
    "capabilities that are kept": Mistake(
        policy,
        "capabilities",
        "ALL",
        lambda p: p.ray(p.ingress)["securityContext"].update(capabilities={}),
    ),
    "a privileged autoscaler": Mistake(
        policy,
        "privileges",
        "Escalation",
        lambda p: p.cluster["autoscalerOptions"].pop("securityContext"),
    ),
    "a token on a worker": Mistake(
        policy,
        "token-automount",
        "token",
        lambda p: p.pod(p.models).pop("automountServiceAccountToken"),
    ),
    "the node's network": Mistake(
        policy, "host-namespace", "hostNetwork", lambda p: p.pod(p.models).update(hostNetwork=True)
    ),
    "a folder of the node in a tight namespace": Mistake(
        policy,
        "host-path",
        "models",
        lambda p: p.pod(p.models).update(volumes=[{"name": "models", "hostPath": {"path": "/x"}}]),
    ),
    "accelerator_type": Mistake(
        wiring,
        "accelerator-type",
        "scale from zero",
        lambda p: p.deployment(
            "Comic", lambda one: one["ray_actor_options"].update(accelerator_type="L4")
        ),
    ),
    "accelerator_type, as the autoscaler sees it": Mistake(
        autoscaler,
        "infeasible",
        "accelerator_type:L4",
        lambda p: p.deployment(
            "Comic", lambda one: one["ray_actor_options"].update(accelerator_type="L4")
        ),
    ),
    "more RAM than a pod has": Mistake(
        autoscaler,
        "infeasible",
        "memory",
        lambda p: p.deployment(
            "Comic", lambda one: one["ray_actor_options"].update(memory=30 * 2**30)
        ),
    ),
    "more than one GPU for a replica": Mistake(
        autoscaler,
        "infeasible",
        "GPU",
        lambda p: p.deployment("Aged", lambda one: one["ray_actor_options"].update(num_gpus=2)),
    ),
    "fewer nodes than one replica of each needs": Mistake(
        autoscaler, "too-few-nodes", "no room", lambda p: p.models.update(maxReplicas=1)
    ),
    "a label nobody has": Mistake(
        wiring,
        "label-selector",
        "imagen.dev/role",
        lambda p: p.models["labels"].update({"imagen.dev/role": "gpu"}),
    ),
    "ingress replicas that may land on GPU nodes": Mistake(
        wiring,
        "ingress-group",
        "scaling to zero",
        lambda p: p.deployment("Ingress", lambda one: one["ray_actor_options"].clear()),
    ),
    "a port that does not match": Mistake(
        wiring,
        "serve-port",
        "8001",
        lambda p: p.serve(lambda config: config["http_options"].update(port=8001)),
    ),
    "a health check of the root": Mistake(
        wiring,
        "health-check",
        "404",
        lambda p: p.one("HealthCheckPolicy")["spec"]["default"]["config"]["httpHealthCheck"].update(
            requestPath="/"
        ),
    ),
    "a route to another Service": Mistake(
        wiring,
        "route",
        "imagen-serve-svc",
        lambda p: p.one("HTTPRoute")["spec"]["rules"][0]["backendRefs"][0].update(name="imagen"),
    ),
    "no readiness probe of ours": Mistake(
        wiring, "readiness-probe", "wget", lambda p: p.ray(p.models).pop("readinessProbe")
    ),
    "a port name that monitoring does not find": Mistake(
        wiring,
        "port-name",
        "metrics",
        lambda p: p.ray(p.models)["ports"][1].update(name="prometheus"),
    ),
    "a budget for pods that do not exist": Mistake(
        wiring,
        "selector",
        "gpu",
        lambda p: p.one("PodDisruptionBudget")["spec"].update(
            selector={"matchLabels": {"ray.io/group": "gpu"}}
        ),
    ),
    "another Ray than the application's": Mistake(
        wiring, "ray-version", "2.59.0", lambda p: p.cluster.update(rayVersion="2.59.0")
    ),
    "no toleration of GPU nodes": Mistake(
        wiring, "toleration", "nvidia.com/gpu", lambda p: p.pod(p.models).pop("tolerations")
    ),
    "a Redis that is not there": Mistake(
        wiring,
        "redis",
        "redis:6379",
        lambda p: p.cluster["gcsFaultToleranceOptions"].update(redisAddress="redis://redis:6379"),
    ),
    "another namespace": Mistake(
        wiring,
        "namespace",
        "default",
        lambda p: p.one("HTTPRoute")["metadata"].update(namespace="default"),
    ),
    "a cache larger than the pod's disk": Mistake(
        wiring,
        "cache",
        "kubelet",
        lambda p: p.pod(p.models)["volumes"][0]["emptyDir"].update(sizeLimit="60Gi"),
    ),
    "a quota below the largest cluster": Mistake(
        capacity, "quota", "GPUs", lambda p: p.models.update(maxReplicas=9)
    ),
    "a quota of GPUs without room for an upgrade": Mistake(
        capacity,
        "quota",
        "4 GPUs are allowed; two clusters",
        lambda p: _quota(p, "requests.nvidia.com/gpu", "4"),
    ),
    "a quota without GPUs": Mistake(
        capacity,
        "quota",
        "0 GPUs",
        lambda p: p.one("ResourceQuota")["spec"]["hard"].pop("requests.nvidia.com/gpu"),
    ),
    "a quota of too few CPUs": Mistake(
        capacity, "quota", "68 CPUs", lambda p: _quota(p, "requests.cpu", "68")
    ),
    "a quota of too little memory": Mistake(
        capacity, "quota", "258Gi bytes", lambda p: _quota(p, "requests.memory", "258Gi")
    ),
    "a quota of too few pods": Mistake(
        capacity, "quota", "18 pods", lambda p: _quota(p, "pods", "18")
    ),
    "a budget that Kubernetes cannot count": Mistake(
        capacity, "budget", "imagen-ingress", lambda p: _budget(p, maxUnavailable=1)
    ),
    "a budget that says both": Mistake(
        capacity, "budget", "imagen-ingress", lambda p: _budget(p, minAvailable=1, maxUnavailable=0)
    ),
    "a budget in percent": Mistake(
        capacity, "budget", "minAvailable", lambda p: _budget(p, minAvailable="50%")
    ),
    "a budget that lets nobody go": Mistake(
        capacity, "budget", "2 pods", lambda p: _budget(p, minAvailable=2)
    ),
    "a budget of pods that are not always there": Mistake(
        capacity,
        "budget",
        "0 pods",
        lambda p: p.one("PodDisruptionBudget")["spec"].update(
            selector={"matchLabels": {"ray.io/group": "models"}}
        ),
    ),
    "no compute class": Mistake(
        wiring,
        "compute-class",
        "nodeSelector",
        lambda p: p.pod(p.models)["nodeSelector"].pop("cloud.google.com/compute-class"),
    ),
    "more GPUs than a node has": Mistake(
        wiring, "gpu-count", "2 GPUs", lambda p: _limit(p.models, "nvidia.com/gpu", "2")
    ),
    "a part of a GPU": Mistake(
        core, "quantity", "0.5", lambda p: _limit(p.models, "nvidia.com/gpu", "0.5")
    ),
    "memory below nothing": Mistake(
        core, "quantity", "-26Gi", lambda p: _limit(p.models, "memory", "-26Gi")
    ),
    "no CPU at all": Mistake(core, "quantity", "above 0", lambda p: _limit(p.ingress, "cpu", "0m")),
    "a quota below nothing": Mistake(core, "quantity", "-1", lambda p: _quota(p, "pods", "-1")),
    "no proxy in the ingress pods": Mistake(
        wiring,
        "proxy-location",
        "HeadOnly",
        lambda p: p.serve(lambda config: config.update(proxy_location="HeadOnly")),
    ),
    "proxies that only their own pod reaches": Mistake(
        wiring,
        "serve-host",
        "127.0.0.1",
        lambda p: p.serve(lambda config: config["http_options"].update(host="127.0.0.1")),
    ),
    "a service that is suspended": Mistake(
        wiring, "suspend", "every pod", lambda p: p.spec.update(suspend=True)
    ),
    "a cluster that is suspended": Mistake(
        wiring, "suspend", "every pod", lambda p: p.cluster.update(suspend=True)
    ),
    "an autoscaler without a token": Mistake(
        wiring,
        "head-token",
        "autoscaler",
        lambda p: p.pod(p.head).pop("automountServiceAccountToken"),
    ),
    "GPU nodes while nobody asks": Mistake(
        autoscaler, "idle-gpu", "models", lambda p: p.models.update(minReplicas=1, replicas=1)
    ),
    "more ingress replicas than pods": Mistake(
        autoscaler,
        "max-replicas",
        "Ingress",
        lambda p: p.deployment(
            "Ingress", lambda one: one["autoscaling_config"].update(max_replicas=8)
        ),
    ),
    "a compute class that is not there": Mistake(
        wiring,
        "compute-class",
        "gpu-pool",
        lambda p: p.pod(p.models)["nodeSelector"].update(
            {"cloud.google.com/compute-class": "gpu-pool"}
        ),
    ),
    "a load balancer that gives up first": Mistake(
        timing,
        "timeout-order",
        "load balancer (30 s)",
        lambda p: p.one("GCPBackendPolicy")["spec"]["default"].pop("timeoutSec"),
    ),
    "connections that Serve closes first": Mistake(
        timing,
        "keep-alive",
        "600",
        lambda p: p.serve(lambda config: config["http_options"].pop("keep_alive_timeout_s")),
    ),
    "connections that Serve closes before a slow answer": Mistake(
        timing,
        "keep-alive",
        "900",
        lambda p: p.one("GCPBackendPolicy")["spec"]["default"].update(timeoutSec=900),
    ),
    "a load balancer that does not wait for pods that leave": Mistake(
        timing,
        "draining",
        "drainingTimeoutSec 120",
        lambda p: p.one("GCPBackendPolicy")["spec"]["default"].update(
            connectionDraining={"drainingTimeoutSec": 120}
        ),
    ),
    "a load balancer that would wait longer than it can": Mistake(
        timing,
        "draining",
        "3600",
        lambda p: p.one("GCPBackendPolicy")["spec"]["default"].update(
            connectionDraining={"drainingTimeoutSec": 3601}
        ),
    ),
    "an ingress replica that ends before its requests": Mistake(
        timing,
        "graceful-shutdown",
        "540 s",
        lambda p: p.deployment("Ingress", lambda one: one.pop("graceful_shutdown_timeout_s")),
    ),
    "an old cluster that goes before the load balancer gives up": Mistake(
        timing,
        "deletion-delay",
        "660",
        lambda p: p.one("GCPBackendPolicy")["spec"]["default"].update(timeoutSec=900),
    ),
    "a pod that ends before its requests": Mistake(
        timing,
        "shutdown-order",
        "terminationGracePeriodSeconds 30",
        lambda p: p.pod(p.models).pop("terminationGracePeriodSeconds"),
    ),
    "an old cluster that goes at once": Mistake(
        timing,
        "deletion-delay",
        "60",
        lambda p: p.spec.pop("rayClusterDeletionDelaySeconds"),
    ),
    "a head whose ports lack serve": Mistake(
        rules, "serve-port", "serve", lambda p: p.ray(p.head)["ports"].pop(0)
    ),
    "a name too long": Mistake(
        rules, "name", "47", lambda p: p.service["metadata"].update(name="i" * 48)
    ),
    "resources in two places": Mistake(
        rules, "group-resources", "head", lambda p: p.head.update(resources={"CPU": "1"})
    ),
    "idle times of groups without autoscaler v2": Mistake(
        rules,
        "autoscaler-v2",
        "idleTimeoutSeconds",
        lambda p: p.cluster["autoscalerOptions"].pop("version"),
    ),
    "a restart policy": Mistake(
        rules, "restart-policy", "Always", lambda p: p.pod(p.head).update(restartPolicy="Always")
    ),
    "the password of Redis twice": Mistake(
        rules,
        "redis",
        "REDIS_PASSWORD",
        lambda p: p.ray(p.head).update(env=[{"name": "REDIS_PASSWORD", "value": "x"}]),
    ),
    "a feature that is off": Mistake(
        rules, "feature-gate", "networkPolicy", lambda p: p.cluster.update(networkPolicy={})
    ),
    "tokens with an old Ray": Mistake(
        rules, "ray-version", "2.52.0", lambda p: p.cluster.update(rayVersion="2.51.0")
    ),
    "labels in rayStartParams": Mistake(
        rules,
        "group-labels",
        "labels",
        lambda p: p.models["rayStartParams"].update(labels="a=b"),
    ),
    "an option Serve does not have": Mistake(
        serve_schema,
        "unknown-field",
        "max_ongoing_request",
        lambda p: p.deployment("Comic", lambda one: one.update(max_ongoing_request=4)),
    ),
    "a scaling option Serve does not have": Mistake(
        serve_schema,
        "unknown-field",
        "min_replica",
        lambda p: p.deployment(
            "Comic", lambda one: one["autoscaling_config"].update(min_replica=0)
        ),
    ),
    "a negative share": Mistake(
        serve_schema,
        "schema",
        "num_gpus",
        lambda p: p.deployment("Comic", lambda one: one["ray_actor_options"].update(num_gpus=-1)),
    ),
    "a deployment the application does not have": Mistake(
        serve_schema,
        "deployments",
        "Manga",
        lambda p: p.deployment("Comic", lambda one: one.update(name="Manga")),
    ),
    "an argument the application does not have": Mistake(
        serve_schema,
        "args",
        "devise",
        lambda p: p.serve(lambda config: config["applications"][0]["args"].update(devise="cpu")),
    ),
    "an application that is not ours": Mistake(
        serve_schema,
        "import-path",
        "serve_app.ap:build",
        lambda p: p.serve(
            lambda config: config["applications"][0].update(import_path="serve_app.ap:build")
        ),
    ),
    "nothing that denies": Mistake(
        network, "default-deny", "Ingress", lambda p: p.drop("NetworkPolicy", "default-deny")
    ),
    "no names": Mistake(
        network, "closed", "port 53 (UDP)", lambda p: p.drop("NetworkPolicy", "names")
    ),
    "pods of Ray that do not reach each other": Mistake(
        network,
        "closed",
        "every port",
        lambda p: p.flow("ray", "egress").update(ports=[{"port": 6379}]),
    ),
    "another port of the dashboard": Mistake(
        network,
        "closed",
        "operator reach it at port 8265",
        lambda p: p.flow("operator", "ingress").update(ports=[{"port": 8256}, {"port": 8000}]),
    ),
    "another namespace of the operator": Mistake(
        network,
        "closed",
        "operator reach it at port 8000",
        lambda p: p.flow("operator", "ingress")["from"][0].update(
            namespaceSelector={"matchLabels": {"kubernetes.io/metadata.name": "kuberay"}}
        ),
    ),
    "no way to the API server": Mistake(
        network,
        "closed",
        "it reach the API server",
        lambda p: p.drop("NetworkPolicy", "autoscaler"),
    ),
    "load balancers shut out": Mistake(
        network,
        "closed",
        "35.191.0.0/16",
        lambda p: p.flow("load-balancer", "ingress")["from"].pop(),
    ),
    "model pods without a bucket": Mistake(
        network,
        "closed",
        "group models: no NetworkPolicy lets it reach Google's storage",
        lambda p: p.models["template"]["metadata"]["labels"].clear(),
    ),
    "an exception that takes the bucket along": Mistake(
        network,
        "closed",
        "storage",
        lambda p: p.flow("models", "egress")["to"][0]["ipBlock"]["except"].append("142.0.0.0/8"),
    ),
    "no tokens for the bucket": Mistake(
        network,
        "closed",
        "metadata server",
        lambda p: p.flow("metadata-server", "egress").update(ports=[{"port": 80}]),
    ),
    "nobody scrapes": Mistake(
        network,
        "closed",
        "gke-gmp-system reach it at port 44227",
        lambda p: p.flow("monitoring", "ingress")["ports"].pop(),
    ),
    "a Redis that the head does not reach": Mistake(
        network, "closed", "it reach Redis", lambda p: p.drop("NetworkPolicy", "to-redis")
    ),
    "a Redis that KubeRay cannot clean up": Mistake(
        network,
        "closed",
        "redis-cleanup reach it at port 6379",
        lambda p: p.flow("redis", "ingress").update(
            {"from": [{"podSelector": {"matchLabels": {"ray.io/node-type": "head"}}}]}
        ),
    ),
    "a dashboard for everybody": Mistake(
        network,
        "open",
        "the internet reach it at port 8265",
        lambda p: p.flow("operator", "ingress").pop("from"),
    ),
    "a Redis for the whole namespace": Mistake(
        network,
        "open",
        "another pod of the namespace reach it at port 6379",
        lambda p: p.flow("redis", "ingress").update({"from": [{"podSelector": {}}]}),
    ),
    "a service without Identity-Aware Proxy": Mistake(
        gke_schema,
        "iap",
        "open to everybody",
        lambda p: p.one("GCPBackendPolicy")["spec"]["default"]["iap"].update(enabled=False),
    ),
    "a service without a policy of its backend": Mistake(
        gke_schema, "way-in", "open to everybody", lambda p: p.drop("GCPBackendPolicy")
    ),
    "a route to another Gateway": Mistake(
        gke_schema,
        "parent",
        "imagn",
        lambda p: p.one("HTTPRoute")["spec"]["parentRefs"][0].update(name="imagn"),
    ),
    "a route to another listener": Mistake(
        gke_schema,
        "parent",
        "imagen/http",
        lambda p: p.one("HTTPRoute")["spec"]["parentRefs"][0].update(sectionName="http"),
    ),
    "a route without a Gateway": Mistake(
        gke_schema, "parent", "parentRefs", lambda p: p.one("HTTPRoute")["spec"].pop("parentRefs")
    ),
    "another host than the Gateway's": Mistake(
        gke_schema,
        "host",
        "other.example.com",
        lambda p: p.one("HTTPRoute")["spec"].update(hostnames=["other.example.com"]),
    ),
    "an address in place of a host": Mistake(
        gke_schema,
        "host",
        "no DNS name",
        lambda p: _listener(p).update(hostname="https://images.example.com"),
    ),
    "HTTP in the clear": Mistake(
        gke_schema, "https", "80", lambda p: _listener(p).update(protocol="HTTP", port=80)
    ),
    "HTTPS without a certificate": Mistake(
        gke_schema,
        "https",
        "certificate",
        lambda p: p.one("Gateway")["metadata"].pop("annotations"),
    ),
    "a user_config nobody reads": Mistake(
        serve_schema,
        "user-config",
        "budget",
        lambda p: p.deployment("Comic", lambda one: one["user_config"].update(budget=1)),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_caught_and_named(name: str, overlay: Overlay) -> None:
    mistake = MISTAKES[name]
    prod = Prod(overlay("prod"))
    mistake.make(prod)
    found = [one for one in mistake.check.check(prod.manifests) if one.rule == mistake.rule]
    assert [one for one in found if mistake.word in str(one)], found


def test_every_check_is_part_of_validate(overlay: Overlay) -> None:
    checks = {mistake.check for mistake in MISTAKES.values()} - {core}
    chosen = {mistake.check: mistake for mistake in MISTAKES.values() if mistake.check in checks}
    prod = Prod(overlay("prod"))
    for mistake in chosen.values():
        mistake.make(prod)
    found = {(one.check, one.rule) for one in validate(prod.manifests, None).findings}
    assert {(check.CHECK, mistake.rule) for check, mistake in chosen.items()} <= found


# ---------------------------------------------------------------- what is right in another way

RIGHT: dict[str, Callable[[Prod], object]] = {
    "one cluster at a time, and a quota for one": lambda p: (
        p.spec.update(upgradeStrategy={"type": "None"}),
        _quota(p, "requests.nvidia.com/gpu", "4"),
        _quota(p, "requests.cpu", "35"),
    ),
    "a quota of GPUs alone": lambda p: p.one("ResourceQuota")["spec"].update(
        hard={"requests.nvidia.com/gpu": "8"}
    ),
    "a quota that allows none": lambda p: _quota(p, "services.loadbalancers", "0"),
    "ports by name": lambda p: p.flow("operator", "ingress").update(
        ports=[{"port": "dashboard"}, {"port": "serve"}]
    ),
    "a range of ports": lambda p: p.flow("operator", "ingress").update(
        ports=[{"port": 8000, "endPort": 8300}]
    ),
    "every port of a protocol": lambda p: p.flow("operator", "ingress").update(
        ports=[{"protocol": "TCP"}]
    ),
    "directions that follow from the rules": lambda p: p.one("NetworkPolicy", "ray")["spec"].pop(
        "policyTypes"
    ),
    "names by the label of who answers": lambda p: p.flow("names", "egress")["to"][0].update(
        podSelector={"matchLabels": {"k8s-app": "kube-dns"}}
    ),
    "the API server's own address": lambda p: p.flow("autoscaler", "egress").update(
        to=[{"ipBlock": {"cidr": "172.16.0.2/32"}}]
    ),
    "clients of Redis by what they are not": lambda p: p.flow("redis", "ingress").update(
        {
            "from": [
                {
                    "podSelector": {
                        "matchExpressions": [
                            {"key": "ray.io/node-type", "operator": "Exists"},
                            {"key": "ray.io/node-type", "operator": "NotIn", "values": ["worker"]},
                            {"key": "imagen.dev/downloads", "operator": "DoesNotExist"},
                        ]
                    }
                }
            ]
        }
    ),
    "a host below the Gateway's": lambda p: _listener(p).update(hostname="*.unresolved.example"),
    "a certificate of the listener": lambda p: (
        p.one("Gateway")["metadata"].pop("annotations"),
        _listener(p).update(tls={"certificateRefs": [{"name": "imagen-tls"}]}),
    ),
    "models from the image": lambda p: (
        p.models["template"]["metadata"]["labels"].clear(),
        p.serve(
            lambda config: config["applications"][0]["args"].update(
                store={"mirror": "file:///weights/store"}
            )
        ),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_in_another_way_passes(name: str, overlay: Overlay) -> None:
    prod = Prod(overlay("prod"))
    RIGHT[name](prod)
    assert [str(one) for one in validate(prod.manifests, None).errors] == []


# ---------------------------------------------------------------- Google's kinds, without CRDs

FIELDS: dict[str, tuple[str, str, Callable[[Prod], object]]] = {
    "a deadline": (
        "unknown-field",
        "timeoutSecs",
        lambda p: p.one("GCPBackendPolicy")["spec"]["default"].update(timeoutSecs=600),
    ),
    "a machine": (
        "unknown-field",
        "machinetype",
        lambda p: p.one("ComputeClass")["spec"]["priorities"][0].update(machinetype="g2"),
    ),
    "a probe": (
        "unknown-field",
        "path",
        lambda p: p.one("HealthCheckPolicy")["spec"]["default"]["config"]["httpHealthCheck"].update(
            path="/"
        ),
    ),
    "a route": (
        "unknown-field",
        "hosts",
        lambda p: p.one("HTTPRoute")["spec"].update(hosts=[]),
    ),
    "a listener": (
        "schema",
        "'443' is not of type 'integer'",
        lambda p: _listener(p).update(port="443"),
    ),
    "an interval": (
        "schema",
        "30sec",
        lambda p: p.one("PodMonitoring")["spec"]["endpoints"][0].update(interval="30sec"),
    ),
    "an alert": (
        "unknown-field",
        "expression",
        lambda p: p.one("Rules")["spec"]["groups"][0]["rules"][0].update(expression="1"),
    ),
    "an empty policy": (
        "schema",
        "'spec' is a required property",
        lambda p: p.one("GCPBackendPolicy").pop("spec"),
    ),
    "a version": (
        "api-version",
        "networking.gke.io/v2",
        lambda p: p.one("GCPBackendPolicy").update(apiVersion="networking.gke.io/v2"),
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_misspelt_field_of_googles_kinds_is_caught(name: str, overlay: Overlay) -> None:
    rule, word, make = FIELDS[name]
    prod = Prod(overlay("prod"))
    make(prod)
    (found,) = validate(prod.manifests, None).errors
    assert (found.check, found.rule) == ("gke", rule)
    assert word in str(found)


def test_a_crd_of_googles_kind_goes_before_what_is_known_here(
    overlay: Overlay, tmp_path: Path
) -> None:
    crd = yaml.safe_load(CRD)
    crd["spec"] |= {"group": "cloud.google.com", "names": {"kind": "ComputeClass"}}
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"] = anything
    (tmp_path / "crd.yaml").write_text(yaml.safe_dump(crd))
    prod = Prod(overlay("prod"))
    prod.one("ComputeClass")["spec"]["new"] = True
    assert [one.rule for one in validate(prod.manifests, None).errors] == ["unknown-field"]
    assert validate(prod.manifests, Schemas(tmp_path)).errors == []


# ------------------------------------------------------------------------- against a real CRD


def test_a_misspelt_field_of_a_ray_service_is_caught(overlay: Overlay, schemas: Schemas) -> None:
    prod = Prod(overlay("prod"))
    prod.cluster["rayVersoin"] = prod.cluster.pop("rayVersion")
    prod.models["maxReplicas"] = "four"
    found = [str(one) for one in schemas.check(prod.manifests)]
    assert any("unknown-field" in one and "rayVersoin" in one for one in found)
    assert any("maxReplicas" in one and "four" in one for one in found)


# ------------------------------------------------------------------------- against a small one

CRD = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
spec:
  group: ray.io
  names: {kind: RayService}
  versions:
    - name: v1
      schema:
        openAPIV3Schema:
          type: object
          properties:
            apiVersion: {type: string}
            kind: {type: string}
            metadata: {type: object}
            spec:
              type: object
              properties:
                count: {type: integer, format: int32}
                port: {x-kubernetes-int-or-string: true, type: string}
                free: {type: object, x-kubernetes-preserve-unknown-fields: true, properties: {}}
                labels: {type: object, additionalProperties: {type: string}}
                pods:
                  type: array
                  items: {type: object, properties: {name: {type: string}}}
"""


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"count": 1, "port": 80, "free": {"x": 1}, "labels": {"a": "b"}}, []),
        ({"port": "http"}, []),
        ({"cuont": 1}, ["'cuont' was unexpected"]),
        ({"count": "1"}, ["'1' is not of type 'integer'"]),
        ({"labels": {"a": 1}}, ["1 is not of type 'string'"]),
        ({"pods": [{"nmae": "x"}]}, ["'nmae' was unexpected"]),
    ],
)
def test_a_crd_is_read_strictly(tmp_path: Path, spec: dict[str, Any], told: list[str]) -> None:
    (tmp_path / "crd.yaml").write_text(CRD)
    about = {"name": "x", "namespace": "y"}
    one = {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": about, "spec": spec}
    found = Schemas(tmp_path).check(Manifests("x", [one]))
    assert len(found) == len(told)
    assert all(text in one.message for text, one in zip(told, found, strict=True))


def test_crds_are_read_as_kubectl_lists_them(tmp_path: Path) -> None:
    listed = {"apiVersion": "v1", "kind": "List", "items": [yaml.safe_load(CRD)]}
    (tmp_path / "ray.yaml").write_text(yaml.safe_dump(listed))
    assert Schemas(tmp_path).knows({"apiVersion": "ray.io/v1", "kind": "RayService"})


@pytest.mark.parametrize("text", ["", "kind: ConfigMap\n", "a: [\n"])
def test_a_folder_without_crds_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "crd.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"The CRDs cannot be read|no CustomResourceDefinition"):
        Schemas(tmp_path)


def test_a_manifest_of_another_shape_is_told_not_thrown(overlay: Overlay) -> None:
    prod = Prod(overlay("dev"))
    prod.cluster["workerGroupSpecs"][0]["labels"] = ["a"]
    report = validate(prod.manifests, None)
    assert report.errors
