"""The committed overlays: without a mistake, in the schemas of the cluster, and as documented."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import yaml
from typer.testing import CliRunner

from cli.main import app
from deployments.catalogue import load_catalogue
from deployments.gpu.plan import plan
from deployments.settings import ROOT
from kuberay.checks import autoscaler
from kuberay.checks.manifests import build
from kuberay.checks.timeouts import timeouts
from kuberay.checks.validate import validate
from tests.manifests.conftest import OVERLAYS
from tests.manifests.prod import Prod
from tests.manifests.schemas import core_errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kuberay.checks.manifests import Manifests
    from tests.manifests.schemas import Schemas

    Overlay = Callable[[str], Manifests]


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_has_no_mistake(name: str, overlay: Overlay) -> None:
    assert [str(finding) for finding in validate(overlay(name)).errors] == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_in_the_schemas_of_kubernetes(name: str, overlay: Overlay) -> None:
    assert list(core_errors(overlay(name))) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_in_the_schemas_of_kuberay(
    name: str, overlay: Overlay, schemas: Schemas
) -> None:
    assert list(schemas.errors(overlay(name))) == []


def test_the_schemas_are_strict(overlay: Overlay, schemas: Schemas) -> None:
    prod = Prod(overlay("prod"))
    prod.cluster["rayVersoin"] = prod.cluster.pop("rayVersion")
    prod.models["maxReplicas"] = "four"
    prod.change("head pod", {"nodeSelecter": {}})
    wrong = "\n".join([*schemas.errors(prod.manifests), *core_errors(prod.manifests)])
    assert all(word in wrong for word in ("rayVersoin", "four", "nodeSelecter"))


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_are_what_a_restricted_namespace_takes(name: str, overlay: Overlay) -> None:
    """All but the one container that hands a folder of the node to the images' user."""
    for pod in overlay(name).pods:
        own, sidecar = pod.spec["securityContext"], pod.containers
        assert own["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod.spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        for container in (one for one in sidecar if one["name"] != "own-cache"):
            context = own | container["securityContext"]
            assert context["runAsNonRoot"] is True
            assert context["runAsUser"] > 0
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
        if name != "prod-hostpath":
            assert "hostPath" not in str(pod.spec.get("volumes"))
    (space,) = overlay(name).of("Namespace")
    level = space["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert level == ("privileged" if name == "prod-hostpath" else "restricted")


def test_placeholders_are_refused_unless_they_are_allowed(overlay: Overlay, tmp_path: Path) -> None:
    (tmp_path / "prod.yaml").write_text(yaml.safe_dump_all(overlay("prod").documents))
    command = ["kuberay", "validate", "--json", str(tmp_path / "prod.yaml")]
    refused = CliRunner().invoke(app, command)
    allowed = CliRunner().invoke(app, [*command, "--allow-placeholder"])
    assert (refused.exit_code, allowed.exit_code) == (1, 0)
    (report,) = json.loads(allowed.stdout)["manifests"]
    assert {one["rule"] for one in report["findings"]} == {"placeholder", "licence", "digest"}
    assert "sha256:unresolved is a placeholder" in refused.stdout


def test_without_a_file_every_overlay_is_validated(built: object, tmp_path: Path) -> None:
    folder = tmp_path / "kuberay"
    (folder / "overlays").mkdir(parents=True)
    for name in ("base", "overlays/dev"):
        (folder / name).symlink_to(ROOT / "kuberay" / name)
    done = CliRunner().invoke(app, ["kuberay", "validate", "--folder", str(folder)])
    assert done.exit_code == 0
    assert "dev: 14 objects, no mistakes" in done.output
    one = CliRunner().invoke(app, ["kuberay", "validate", str(folder / "overlays/dev")])
    assert one.output == done.output
    assert "Ray's autoscaler: one replica of each deployment: 1 ingress, 1 models" in done.output


@pytest.mark.parametrize("node", ["cpu=4", "cpu=4,memory=12GB", "4", "cpu=-4,memory=12Gi"])
def test_a_node_that_is_not_readable_is_refused(node: str) -> None:
    done = CliRunner().invoke(app, ["kuberay", "validate", "--node", node])
    assert done.exit_code == 2
    assert "Write it like cpu=4,memory=12Gi" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- a\n- b\n", "document 1 is a list, not an object"),
        ("a: [1\nb: 2\n", "line 2, column 2: "),
    ],
)
def test_a_file_without_manifests_is_refused_with_its_fault(
    text: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "built.yaml").write_text(text)
    done = CliRunner().invoke(app, ["kuberay", "validate", str(tmp_path / "built.yaml")])
    assert done.exit_code == 2
    assert reason in " ".join(done.output.split())


def test_a_rehearsal_needs_images_and_nothing_else_to_be_filled_in(overlay: Overlay) -> None:
    """No bucket, no licence, no digest of a model, no host name."""
    report = validate(overlay("gke-smoke"))
    assert {one.rule for one in report.placeholders} == {"placeholder"}
    assert all("@sha256:unresolved" in one.message for one in report.placeholders)
    assert report.secrets.keys() == {"imagen-keys", "imagen-ray-token", "imagen-redis"}


def test_the_dev_overlay_has_no_placeholder(overlay: Overlay) -> None:
    assert validate(overlay("dev")).placeholders == []


def test_each_caller_outlasts_its_callee(overlay: Overlay) -> None:
    manifests = overlay("prod")
    waits = timeouts(manifests)
    assert list(waits) == ["client", "load balancer", "Serve", "engine"]
    assert all(outer > inner for outer, inner in pairwise(waits.values()))


def test_the_readme_has_the_timeouts_of_prod(overlay: Overlay) -> None:
    manifests = overlay("prod")
    text = (ROOT / "kuberay" / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (client|load balancer|Serve|engine) \| (\d+) s \|", text, re.M))
    waits = timeouts(manifests)
    assert rows == {who: f"{waits_s:g}" for who, waits_s in waits.items()}


def test_idle_no_gpu_node_runs_and_one_of_each_model_takes_the_nodes_of_the_plan(
    overlay: Overlay,
) -> None:
    manifests = overlay("prod")
    ray = autoscaler.autoscaling_config_of(manifests)
    asked = autoscaler.demands(manifests)
    served = load_catalogue(ROOT / "configs/models/production.yaml")
    accepted = tuple(entry.name for entry in served.entries)
    models = served.model_copy(update={"accept_noncommercial": accepted}).served().values()
    assert autoscaler.nodes(ray, []) == ({"ingress": 2}, 0)
    assert autoscaler.nodes(ray, asked) == (
        {"ingress": 2, "models": plan(list(models), "l4").gpus},
        0,
    )


@pytest.mark.parametrize("name", ["prod", "prod-hostpath"])
def test_a_disruption_budget_allows_drains(name: str, overlay: Overlay) -> None:
    manifests = overlay(name)
    cluster = manifests.of("RayService")[0]["spec"]["rayClusterConfig"]
    fewest = {one["groupName"]: one["minReplicas"] for one in cluster["workerGroupSpecs"]}
    (budget,) = manifests.of("PodDisruptionBudget")
    spec = budget["spec"]
    assert spec.keys() == {"minAvailable", "selector"}  # a RayCluster has no scale to count by
    assert spec["minAvailable"] < fewest[spec["selector"]["matchLabels"]["ray.io/group"]]


def test_a_single_pod_has_no_budget(overlay: Overlay) -> None:
    assert overlay("dev").of("PodDisruptionBudget") == []


def test_prod_names_the_secrets_that_must_exist(overlay: Overlay) -> None:
    assert validate(overlay("prod")).secrets == {
        "imagen-keys": ["keys.yaml"],
        "imagen-oauth": ["key"],
        "imagen-ray-token": ["auth_token"],
        "imagen-redis": ["password"],
    }


def test_a_refusal_of_kustomize_is_shown_with_its_reason(built: object, tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [nowhere.yaml]\n")
    with pytest.raises(Exception, match=r"kustomize refuses the overlay: .*nowhere"):
        build(tmp_path)
