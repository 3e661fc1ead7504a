"""configs/gke.yaml to files: what is committed is up to date, and what depends on what."""

from __future__ import annotations

import copy
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from cli.main import app
from kuberay.checks.manifests import build
from kuberay.checks.validate import validate
from kuberay.quantity import parse_quantity
from kuberay.render.environment import load_environments, merged
from kuberay.render.files import Files, out_of_date, render, write
from kuberay.render.kustomize import GENERATED, difference
from serve_app.jobs.connection import connect
from tests.manifests.conftest import FOLDER, LOCK, OVERLAYS, SOURCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kuberay.checks.manifests import Manifests

    Change = Callable[[dict[str, Any]], object]
    Changed = Callable[[Change], Files]


@pytest.fixture
def changed(tmp_path: Path) -> Changed:
    """Renders the base with something changed in it."""

    def run(change: Change) -> Files:
        values = {"base": yaml.safe_load(SOURCE.read_text())["base"]}
        change(values["base"])
        (tmp_path / "gke.yaml").write_text(yaml.safe_dump(values))
        return render(tmp_path / "gke.yaml", LOCK)

    return run


def service_of(files: Files) -> dict[str, Any]:
    return yaml.safe_load(files["base/rayservice.yaml"])["spec"]


def serve_config(files: Files) -> Any:
    return yaml.safe_load(service_of(files)["serveConfigV2"])


def deployment(files: Files, name: str) -> dict[str, Any]:
    deployments = serve_config(files)["applications"][0]["deployments"]
    return next(one for one in deployments if one["name"] == name)


def model_pod(files: Files) -> dict[str, Any]:
    (group,) = (
        one
        for one in service_of(files)["rayClusterConfig"]["workerGroupSpecs"]
        if one["groupName"] == "models"
    )
    return group["template"]["spec"]


def test_what_is_committed_is_what_is_rendered(rendered: Files) -> None:
    assert out_of_date(rendered, FOLDER) == []
    assert all(text.startswith(GENERATED) for text in rendered.values())


def test_the_command_names_the_files_that_are_out_of_date(tmp_path: Path) -> None:
    folder = tmp_path / "kuberay"
    shutil.copytree(FOLDER, folder)
    (folder / "base" / "rayservice.yaml").write_text(GENERATED + "edited: true\n")
    (folder / "base" / "former.yaml").write_text(GENERATED)
    (folder / "base" / "mine.yaml").write_text("hand: written\n")
    command = ["kuberay", "render", "--folder", str(folder)]
    checked = CliRunner().invoke(app, [*command, "--check"])
    assert checked.exit_code == 1
    assert "base/rayservice.yaml: out of date" in checked.output
    written = CliRunner().invoke(app, command)
    assert re.findall(r"(\S+): written", written.output) == [
        f"{folder}/base/rayservice.yaml",
        f"{folder}/base/former.yaml",
    ]
    assert CliRunner().invoke(app, [*command, "--check"]).exit_code == 0
    assert not (folder / "base" / "former.yaml").exists()
    assert (folder / "base" / "mine.yaml").exists()


def test_the_command_shows_what_is_wrong_with_the_source(tmp_path: Path) -> None:
    (tmp_path / "gke.yaml").write_text("base: {colour: red}\n")
    refused = CliRunner().invoke(app, ["kuberay", "render", "--source", str(tmp_path / "gke.yaml")])
    assert refused.exit_code == 2
    assert "colour" in refused.output


def test_the_store_knows_how_much_of_the_disk_it_may_use(changed: Changed, rendered: Files) -> None:
    def max_bytes(files: Files) -> Any:
        return serve_config(files)["applications"][0]["args"]["store"].get("max_bytes")

    (cache,) = model_pod(rendered)["volumes"]
    assert max_bytes(rendered) == parse_quantity(cache["emptyDir"]["sizeLimit"])
    assert max_bytes(changed(lambda base: base["cache"].update(kind="hostPath"))) is None


def test_a_model_can_have_options_of_its_own(changed: Changed, rendered: Files) -> None:
    own = {"user_config": {"digest": "0123456789abcdef"}}
    files = changed(lambda base: base["serve"].update(models={"comic": own}))
    planned = deployment(rendered, "Comic")["user_config"]
    assert deployment(files, "Comic")["user_config"] == planned | own["user_config"]
    assert deployment(files, "Aged") == deployment(rendered, "Aged")


def test_a_further_model_of_a_task_is_in_the_manifests(changed: Changed, rendered: Files) -> None:
    names = ["upscale-sd-x4", "upscale-realesrgan-x4plus"]
    files = changed(lambda base: base["serve"]["args"].update(serve={"upscale": names}))
    further = deployment(files, "upscale-realesrgan-x4plus")
    assert 0 < further["ray_actor_options"]["num_gpus"] < 1
    assert further["user_config"].keys() == {"max_batch_size", "budget_px"}
    assert further["autoscaling_config"] == deployment(rendered, "Upscale")["autoscaling_config"]
    assert deployment(files, "Upscale") == deployment(rendered, "Upscale")
    pulled = next(yaml.safe_load_all(files["base/site.yaml"]))["data"]["IMAGEN_MODEL_NAMES"]
    assert set(names) <= set(pulled.split())


def test_the_jobs_of_a_cluster_get_every_registry(changed: Changed) -> None:
    both = ["configs/models/production.yaml", "configs/models/starter.yaml"]
    files = changed(lambda base: base["serve"]["args"].update(models=both))
    site = next(yaml.safe_load_all(files["base/site.yaml"]))
    assert site["data"]["IMAGEN_REGISTRY"] == ":".join(both)


def test_shares_batches_and_budgets_follow_the_gpu(changed: Changed, rendered: Files) -> None:
    def on_t4(base: dict[str, Any]) -> None:
        base["gpu"] |= {"type": "t4", "machine": "n1-highmem-8"}

    l4, t4 = deployment(rendered, "Comic"), deployment(changed(on_t4), "Comic")
    assert t4["ray_actor_options"]["num_gpus"] > l4["ray_actor_options"]["num_gpus"] > 0
    assert l4["user_config"].keys() == {"max_batch_size", "budget_px"}


def test_a_disk_that_is_already_filled_is_read_only_and_needs_no_root(changed: Changed) -> None:
    disk = {"kind": "hostPath", "path": "/mnt/disks/models", "read_only": True}
    pod = model_pod(changed(lambda base: base["cache"].update(disk)))
    assert pod["volumes"][0]["hostPath"] == {"path": "/mnt/disks/models", "type": "Directory"}
    assert pod["containers"][0]["volumeMounts"][0]["readOnly"]
    assert "initContainers" not in pod


@pytest.mark.parametrize(("strategy", "clusters"), [({"type": "None"}, 1), ({}, 2)])
def test_the_quota_is_that_of_the_clusters_of_an_upgrade(
    changed: Changed, strategy: dict[str, str], clusters: int
) -> None:
    """KubeRay's default starts a second cluster."""
    files = changed(lambda base: base["ray_service"].update(upgradeStrategy=strategy))
    quota = yaml.safe_load(files["base/resource-quota.yaml"])
    most = load_environments(SOURCE)["prod"].gpu
    assert most
    assert quota["spec"]["hard"]["requests.nvidia.com/gpu"] == str(most.max_nodes * clusters)


def test_spans_are_made_if_the_source_says_so(changed: Changed, rendered: Files) -> None:
    assert "tracing_config" not in serve_config(rendered)
    tracing = {"enabled": True, "sampling_ratio": 0.01}
    config = serve_config(changed(lambda base: base["serve"].update(tracing_config=tracing)))
    assert config["tracing_config"] == tracing
    assert ServeDeploySchema.model_validate(config).tracing_config


def test_the_load_balancer_finishes_the_requests_of_a_pod_that_leaves(changed: Changed) -> None:
    files = changed(lambda base: base["timeouts_s"].update(load_balancer=620))
    *_, policy = yaml.safe_load_all(files["gke/gateway.yaml"])
    backend = policy["spec"]["default"]
    assert backend["connectionDraining"]["drainingTimeoutSec"] >= backend["timeoutSec"] == 620


def test_a_pull_policy_is_optional(changed: Changed) -> None:
    assert changed(lambda base: base["every_pod"]["container"].pop("imagePullPolicy"))


def test_an_overlay_may_start_from_another_one() -> None:
    environments = load_environments(SOURCE)
    prod, disk = environments["prod"], environments["prod-hostpath"]
    assert disk.models.pod == prod.models.pod
    assert (prod.cache.kind, disk.cache.kind) == ("emptyDir", "hostPath")


def test_the_prefetch_job_fills_the_folder_that_pods_read(tmp_path: Path, built: object) -> None:
    values = yaml.safe_load(SOURCE.read_text())
    path = "/mnt/stateful/imagen"
    values["overlays"]["prod-hostpath"]["cache"]["path"] = path
    (tmp_path / "gke.yaml").write_text(yaml.safe_dump(values))
    shutil.copytree(FOLDER, tmp_path / "kuberay")
    write(render(tmp_path / "gke.yaml", LOCK), tmp_path / "kuberay")
    manifests = build(tmp_path / "kuberay" / "overlays" / "prod-hostpath")
    pods = [pod for pod in manifests.pods if "hostPath" in str(pod.spec.get("volumes"))]
    assert len(pods) == 2
    for pod in pods:
        assert pod.spec["volumes"][0]["hostPath"]["path"] == path
        assert pod.environment["IMAGEN_MODELS"] == "/models"
        for container in pod.containers:
            assert container["volumeMounts"][0]["mountPath"] == "/models"
        assert "/models" in pod.containers[0]["command"]


def _edited(values: Any, lines: Any, path: str = "") -> Any:
    """As somebody edits the file: mappings line by line, null stays, a nodeSelector is replaced."""
    if not (isinstance(values, dict) and isinstance(lines, dict)) or path == "nodeSelector":
        return lines
    return values | {key: _edited(values.get(key), one, key) for key, one in lines.items()}


@pytest.fixture
def edited(tmp_path: Path, built: object) -> Callable[[str, Any], Manifests]:
    """Builds an overlay with lines laid upon its own."""

    def run(name: str, lines: Any) -> Manifests:
        values = yaml.safe_load(SOURCE.read_text())
        values["overlays"][name] = _edited(values["overlays"][name], lines)
        (tmp_path / "gke.yaml").write_text(yaml.safe_dump(values))
        shutil.copytree(FOLDER, tmp_path / "kuberay")
        write(render(tmp_path / "gke.yaml", LOCK), tmp_path / "kuberay")
        return build(tmp_path / "kuberay" / "overlays" / name)

    return run


def test_a_rehearsal_needs_no_gpu(edited: Callable[[str, Any], Manifests]) -> None:
    """With the lines of the README."""
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```yaml\n(gpu: null\n.*?)```", readme, re.S)
    manifests = edited("gke-smoke", yaml.safe_load(lines))
    assert [str(one) for one in validate(manifests).errors] == []
    assert not [pod.where for pod in manifests.pods if "nvidia.com/gpu" in pod.limits]


def test_one_value_makes_redis_a_managed_one(edited: Callable[[str, Any], Manifests]) -> None:
    managed = {"address": "rediss://10.0.0.3:6378", "own_ca": True}
    manifests = edited("prod", {"redis": managed})
    assert [str(one) for one in validate(manifests).errors] == []
    assert not manifests.of("StatefulSet")
    options = manifests.cluster["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == managed["address"]
    head, ingress, models = (pod for pod in manifests.pods if pod.role != "other")
    for pod in (head, ingress):
        url, file = pod.environment["REDIS_URL"], pod.environment["RAY_REDIS_CA_CERT"]
        assert url == f"rediss://:$(IMAGEN_REDIS_PASSWORD)@10.0.0.3:6378/0?ssl_ca_certs={file}"
        pool = connect(url.replace("$(IMAGEN_REDIS_PASSWORD)", "secret")).connection_pool
        assert pool.connection_kwargs["ssl_ca_certs"] == file
        (mount,) = (one for one in pod.main["volumeMounts"] if one["name"] == "redis-ca")
        assert file == f"{mount['mountPath']}/ca.pem"
    assert not {"REDIS_URL", "RAY_REDIS_CA_CERT"} & models.environment.keys()
    assert validate(manifests).secrets["imagen-redis"] == ["ca.pem", "password"]


def test_that_value_may_be_the_one_of_the_base(tmp_path: Path) -> None:
    text = SOURCE.read_text(encoding="utf-8")
    own, managed = "address: redis://imagen-redis:6379", "address: rediss://10.0.0.3:6378"
    assert text.count(own) == 1
    (tmp_path / "gke.yaml").write_text(text.replace(own, managed), encoding="utf-8")
    files = render(tmp_path / "gke.yaml", LOCK)
    for name in {*OVERLAYS} - {"dev"}:  # which has no Redis
        patches = yaml.safe_load(files[f"overlays/{name}/generated/kustomization.yaml"])["patches"]
        of_redis = [one["patch"] for one in patches if one["target"]["name"] == "imagen-redis"]
        assert len(of_redis) == 3
        assert all("$patch: delete" in one for one in of_redis)


def test_pods_read_copies_of_a_disk_that_a_job_fills(
    edited: Callable[[str, Any], Manifests],
) -> None:
    disk = {"storage_class": "premium-rwo", "size": None, "snapshot": "models-1"}
    manifests = edited("prod-shared", {"cache": disk})
    assert [str(one) for one in validate(manifests).errors] == []
    claims = {one["metadata"]["name"]: one["spec"] for one in manifests.of("PersistentVolumeClaim")}
    filled, read = claims["imagen-models-source"], claims["imagen-models"]
    assert (filled["accessModes"], read["accessModes"]) == (["ReadWriteOnce"], ["ReadOnlyMany"])
    assert read["dataSource"]["name"] == "models-1"
    used = {
        pod.group or pod.where: volume["persistentVolumeClaim"]
        for pod in manifests.pods
        for volume in pod.spec.get("volumes") or []
        if "persistentVolumeClaim" in volume
    }
    assert used == {
        "models": {"claimName": "imagen-models", "readOnly": True},
        "CronJob/imagen-prefetch": {"claimName": "imagen-models-source"},
    }


def test_the_disk_of_redis_has_a_class_and_a_size(
    edited: Callable[[str, Any], Manifests],
) -> None:
    manifests = edited("portable", {"redis": {"storage_class": "gp3", "disk": "20Gi"}})
    (claim,) = manifests.of("StatefulSet")[0]["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["storageClassName"] == "gp3"
    assert claim["spec"]["resources"]["requests"]["storage"] == "20Gi"


def test_merging_removes_what_is_null_and_replaces_lists() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    over = {"a": {"b": None, "c": [3]}, "e": {"f": None, "g": 1}}
    assert merged(base, over) == {"a": {"c": [3]}, "d": 1, "e": {"g": 1}}


KEYS = st.sampled_from(["a", "b", "/", "~", "a/", "~1"])
VALUES = st.recursive(
    st.sampled_from([None, 0, 1, "", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)
MAPPINGS = st.dictionaries(KEYS, VALUES, max_size=4)


def patched(document: Any, operations: list[dict[str, Any]]) -> Any:
    """Apply a JSON patch (RFC 6902), as far as `difference` uses it."""
    document = copy.deepcopy(document)
    for one in operations:
        *steps, last = (
            step.replace("~1", "/").replace("~0", "~") for step in one["path"].split("/")[1:]
        )
        node = document
        for step in steps:
            node = node[int(step)] if isinstance(node, list) else node[step]
        key: Any = int(last) if isinstance(node, list) else last
        if one["op"] == "remove":
            del node[key]
        else:
            node[key] = one["value"]
    return document


@given(MAPPINGS, MAPPINGS)
def test_a_patch_turns_one_into_the_other(one: Any, other: Any) -> None:
    assert patched(one, difference(one, other)) == other


@pytest.mark.parametrize(
    ("text", "value"), [("500m", 0.5), ("4Gi", 4 * 2**30), ("4", 4), ("1.5k", 1500), ("1e3", 1000)]
)
def test_quantities_are_read(text: str, value: float) -> None:
    assert float(parse_quantity(text)) == value


@pytest.mark.parametrize("text", ["", "4gi", "26Gig", "Gi", "1 Gi", "four", True])
def test_other_texts_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match="not a Kubernetes quantity"):
        parse_quantity(text)
