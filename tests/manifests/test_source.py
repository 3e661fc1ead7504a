"""configs/gke.yaml and the files by hand: what is wrong in them is told in words, not by Python."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from cli.main import app
from deployments.settings import ROOT
from kuberay.checks import promql
from kuberay.checks.manifests import Manifests, build

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Overlay = Callable[[str], Manifests]

WHOLE = yaml.safe_load((ROOT / "configs" / "gke.yaml").read_text())
ONE_GPU = "1 has no GPUs"


class Project:
    """A copy of what is rendered from, to spoil."""

    def __init__(self, folder: Path) -> None:
        self.kuberay, self._source = folder / "kuberay", folder / "gke.yaml"
        shutil.copytree(ROOT / "kuberay", self.kuberay)
        self.values = yaml.safe_load(yaml.safe_dump(WHOLE))

    def set(self, path: str, value: object) -> None:
        """`None` removes, as nothing else here needs it."""
        node: Any = self.values
        *steps, last = path.split("/")
        for step in steps:
            node = node.setdefault(step, {})
        node.pop(last) if value is None else node.update({last: value})

    def edit(self, name: str, change: Callable[[Any], object]) -> None:
        path = self.kuberay / name
        values = yaml.safe_load(path.read_text())
        change(values)
        path.write_text(yaml.safe_dump(values))

    def render(self) -> tuple[int, str]:
        self._source.write_text(yaml.safe_dump(self.values))
        command = ["kuberay", "render", "--source", str(self._source)]
        done = CliRunner().invoke(app, [*command, "--folder", str(self.kuberay)])
        assert isinstance(done.exception, SystemExit | None), done.exception
        return done.exit_code, " ".join(done.output.split())

    def refused(self, word: str) -> None:
        code, told = self.render()
        assert code == 2
        assert word in told

    def read(self, name: str) -> list[Any]:
        return list(yaml.safe_load_all((self.kuberay / name).read_text()))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        ("memory/process", "3Gig", "memory.process: Value error, '3Gig'"),
        ("memory/reserved", "4", "its unit"),
        ("cache/scratch", "10GiB", "cache.scratch"),
        ("cache/scratch", "-10Gi", "cache.scratch"),
        ("models/size/memory", "26Gig", "models.size"),
        ("models/size/memory", "-26Gi", "models.size: Value error, '-26Gi'"),
        ("head/size/cpu", "1e9999999", "no Kubernetes quantity"),
        ("models/size/memory", None, "memory must be said"),
        ("models/size/nvidia.com/gpu", "0.5", ""),
        ("head/size/cpu", "two", "head.size"),
        ("head/size/cpu", "0", "head.size"),
        ("head/size", {}, "cpu and memory must be said"),
        ("ingress/size/mem", "4Gi", "mem"),
        ("ingress/group/maxReplicas", None, "ingress.group.maxReplicas must be said"),
        ("ingress/group/maxReplicas", "four", "'four'"),
        ("ingress/group/maxReplicas", True, "True"),
        ("ingress/group/maxReplicas", 1, "does not hold"),
        ("models/group/minReplicas", -1, "-1"),
        ("serve/args/store", [1], "store"),
        ("serve/tracing_config", "on", "tracing_config: Input should be a valid dictionary"),
        ("timeouts_s/load_balancer", 3601, "load_balancer"),
        ("timeouts_s/engine", 0, "engine"),
        ("cache/mount", "models", "no absolute path"),
        ("cache/mount", "/models/../app", "no absolute path"),
        ("cache/mount", "/models/", "no absolute path"),
        ("cache/mount", "/app", "hide"),
        ("cache/mount", "/tmp/models", "hide"),
        ("cache/path", "var/models", "no absolute path"),
        ("cache/path", "/var", "of ours alone"),
    ],
)
def test_a_wrong_value_is_named(project: Project, path: str, value: object, word: str) -> None:
    if path == "models/size/nvidia.com/gpu":
        project.values["base"]["models"]["size"]["nvidia.com/gpu"] = value
        project.refused("nvidia.com/gpu '0.5' is no count")
    else:
        project.set(f"base/{path}", value)
        project.refused(word)


@pytest.mark.parametrize(
    ("overlays", "word"),
    [
        ({"prod": None}, "prod is no mapping"),
        ({"prod": ["gke"]}, "prod is no mapping"),
        ({"prod": {"from": "prod"}}, "circle"),
        ({"prod": {"from": "dev"}, "dev": {"from": "prod"}}, "dev from prod from dev"),
        ({"prod": {"from": ["base"]}}, "No such overlay"),
        ({"base": {}}, "base"),
        ({"../prod": {}}, "a folder's"),
        (["prod"], "cannot be read"),
        ("prod", "cannot be read"),
    ],
)
def test_a_wrong_overlay_is_named(project: Project, overlays: Any, word: str) -> None:
    project.values["overlays"] = overlays
    project.refused(word)


@pytest.mark.parametrize(
    ("kind", "count", "word"),
    [("models", "2", "models.size"), ("models", None, "models.size"), ("head", "1", "head.size")],
)
def test_pods_ask_for_the_gpus_that_a_node_has(
    project: Project, kind: str, count: str | None, word: str
) -> None:
    size = project.values["base"][kind]["size"]
    size.pop("nvidia.com/gpu", None)
    size.update({"nvidia.com/gpu": count} if count else {})
    project.refused(word)


def test_a_node_without_gpus_gives_none(project: Project) -> None:
    project.values["overlays"]["dev"]["models"]["size"]["nvidia.com/gpu"] = "1"
    project.refused("dev in")


def test_the_cache_fits_the_disk_it_lies_on(project: Project) -> None:
    project.set("base/cache/copies", 40)
    project.refused("local SSD")


def test_a_folder_of_the_node_fits_the_boot_disk(project: Project) -> None:
    project.set("overlays/prod-hostpath/gpu/boot_disk_gb", 50)
    project.refused("boot_disk_gb 50")


def test_one_cluster_of_gpus_needs_upgrades_that_start_no_second(project: Project) -> None:
    project.set("base/gpu/during_upgrade", 1)
    project.refused(ONE_GPU)
    project.set("base/ray_service/upgradeStrategy", None)
    project.refused(ONE_GPU)  # KubeRay's default is NewCluster
    project.set("base/ray_service/upgradeStrategy", {"type": "None"})
    assert project.render()[0] == 0
    (quota,) = project.read("base/resource-quota.yaml")
    most = WHOLE["base"]["gpu"]["max_nodes"]
    assert quota["spec"]["hard"]["requests.nvidia.com/gpu"] == str(most)


def test_spans_are_made_where_the_source_says_so(project: Project) -> None:
    def config() -> dict[str, Any]:
        assert project.render()[0] == 0
        (service,) = project.read("base/rayservice.yaml")
        return yaml.safe_load(service["spec"]["serveConfigV2"])

    assert "tracing_config" not in config()
    wanted = {"enabled": True, "sampling_ratio": 0.01}
    project.set("base/serve/tracing_config", wanted)
    assert config()["tracing_config"] == wanted
    assert ServeDeploySchema.model_validate(config()).tracing_config


def test_the_load_balancer_cuts_no_request_of_a_pod_that_leaves(project: Project) -> None:
    project.set("base/timeouts_s/load_balancer", 620)
    assert project.render()[0] == 0
    policy = project.read("gke/gateway.yaml")[-1]["spec"]["default"]
    assert policy["connectionDraining"]["drainingTimeoutSec"] >= policy["timeoutSec"] == 620


@pytest.mark.parametrize("name", ["prod", "prod-hostpath"])
def test_a_budget_lets_the_owner_of_no_scale_drain(name: str, overlay: Overlay) -> None:
    manifests = overlay(name)
    cluster = manifests.of("RayService")[0]["spec"]["rayClusterConfig"]
    least = {one["groupName"]: one["minReplicas"] for one in cluster["workerGroupSpecs"]}
    budgets = manifests.of("PodDisruptionBudget")
    assert budgets
    for budget in budgets:
        spec = budget["spec"]
        assert "maxUnavailable" not in spec
        assert isinstance(spec["minAvailable"], int)
        assert spec["minAvailable"] < least[spec["selector"]["matchLabels"]["ray.io/group"]]


def test_a_single_pod_has_no_budget(overlay: Overlay) -> None:
    assert overlay("dev").of("PodDisruptionBudget") == []


def test_the_prefetch_job_fills_the_folder_that_pods_read(project: Project, built: object) -> None:
    wanted = {"kind": "hostPath", "path": "/mnt/stateful/imagen", "mount": "/mnt/models"}
    project.values["overlays"]["prod-hostpath"]["cache"] |= wanted
    assert project.render()[0] == 0
    manifests = build(project.kuberay / "overlays" / "prod-hostpath")
    pods = [pod for pod in manifests.pods if "hostPath" in str(pod.spec.get("volumes"))]
    assert len(pods) == 2
    for pod in pods:
        assert pod.spec["volumes"][0]["hostPath"]["path"] == wanted["path"]
        assert {"name": "IMAGEN_MODELS", "value": wanted["mount"]} in pod.main["env"]
        for container in pod.containers:
            assert container["volumeMounts"][0]["mountPath"] == wanted["mount"]
        assert wanted["mount"] in pod.containers[0]["command"]


def test_a_pull_policy_need_not_be_said(project: Project) -> None:
    project.set("base/every_pod/container/imagePullPolicy", None)
    assert project.render()[0] == 0


def test_a_prefetch_job_without_a_folder_is_refused(project: Project) -> None:
    def spoil(job: Any) -> None:
        job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["volumes"] = []

    project.edit("prefetch/prefetch.yaml", spoil)
    project.refused("Restore it")


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("panels.yaml", lambda v: v["panels"][0].pop("unit"), "panels.0.unit"),
        ("panels.yaml", lambda v: v["panels"][0].update(units="s"), "units"),
        ("panels.yaml", lambda v: v["panels"][0].update(queries={"a": "rate(x)"}), "no PromQL"),
        ("panels.yaml", lambda v: v.update(variables={}), "no PromQL"),
        ("alerts.yaml", lambda v: v.clear(), "groups"),
        ("alerts.yaml", lambda v: v["groups"][0]["rules"][0].pop("for"), "rules.0.for"),
        ("alerts.yaml", lambda v: v["groups"][0]["rules"][0].update(expr="sum(x"), "no PromQL"),
    ],
)
def test_wrong_alerts_and_panels_are_named(
    project: Project, name: str, change: Callable[[Any], object], word: str
) -> None:
    project.edit(f"monitoring/{name}", change)
    project.refused(word)


def test_an_empty_file_of_alerts_is_named(project: Project) -> None:
    (project.kuberay / "monitoring" / "alerts.yaml").write_text("")
    project.refused("alerts.yaml")


def validated(folder: Path, expression: str) -> tuple[int, str]:
    rule = {"alert": "A", "expr": expression}
    about = {"name": "imagen", "namespace": "imagen"}
    spec = {"groups": [{"name": "imagen", "rules": [rule]}]}
    kind = {"apiVersion": "monitoring.googleapis.com/v1", "kind": "Rules"}
    (folder / "rules.yaml").write_text(yaml.safe_dump(kind | {"metadata": about, "spec": spec}))
    done = CliRunner().invoke(app, ["kuberay", "validate", str(folder / "rules.yaml")])
    return done.exit_code, " ".join(done.output.split())


def test_validate_parses_the_expressions_of_alerts(tmp_path: Path) -> None:
    assert validated(tmp_path, "sum(x) > 1")[0] == 0
    code, told = validated(tmp_path, "sum(x > 1")
    assert code == 1
    assert "promql/expression" in told


def test_validate_says_so_where_it_cannot_parse_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promql, "find_spec", lambda name: None)
    code, told = validated(tmp_path, "sum(x > 1")
    assert code == 3
    assert "NOT CHECKED: the alerts' expressions" in told
