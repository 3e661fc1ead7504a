"""Mistakes that people make in manifests: each is caught, under its own name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from deployments.errors import ConfigError
from serve_app.kuberay import autoscaler, core, policy, rules, serve_schema, timing, wiring
from serve_app.kuberay.crd import Schemas
from serve_app.kuberay.manifests import Manifests
from serve_app.kuberay.validate import validate

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
        lambda p: p.one("PodDisruptionBudget", "imagen-models")["spec"].update(
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
        wiring, "quota", "GPUs", lambda p: p.models.update(maxReplicas=9)
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
