"""kuberay/gke/*.sh with a fake gcloud and kubectl: what they do, and what they refuse."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from deployments.settings import ROOT
from kuberay.checks.validate import validate
from kuberay.quantity import GIB, as_bytes, parse_quantity

if TYPE_CHECKING:
    from collections.abc import Callable

    from kuberay.checks.manifests import Manifests

    Overlay = Callable[[str], Manifests]

HERE = ROOT / "kuberay" / "gke"
SCRIPTS = sorted(path.name for path in HERE.glob("*.sh") if path.name != "common.sh")
CONTEXT = "gke_my-project_europe-west4_imagen"
SITE = {
    "IMAGEN_PROJECT": "my-project",
    "IMAGEN_REGION": "europe-west4",
    "IMAGEN_ZONES": "europe-west4-a,europe-west4-b",
}
FILLED_IN = {
    "mirror": "gs://my-bucket/models",
    "host": "imagen.example.com",
    "certificate_map": "my-map",
    "oauth_client": "my-client",
    "security_policy": "my-armor",
    "jobs_account": "imagen-jobs@my-project.iam.gserviceaccount.com",
}
JOBS = f"serviceAccount:{FILLED_IN['jobs_account']}"
# Both commands: it logs every call, answers questions, and keeps its standard input.
STAND_IN = """\
#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
case " $* " in
  *" projects describe "*) echo 123456 ;;
  *rayOperatorConfig*) echo "$FAKE_ADDON" ;;
  *" config current-context "*) echo "$FAKE_CONTEXT" ;;
  *metadata.generation*) echo 7 ;;
  *upgradeStrategy.type*) echo "$FAKE_STRATEGY" ;;
  *rayClusterName*) echo imagen-abcde ;;
  *" kustomize "*) exec "$REAL_KUBECTL" "$@" ;;
  *" describe "* | *" get "*) [ -n "$THERE" ] ;;
  *" create secret "*) cat >> "$STDIN"; echo >> "$STDIN" ;;
esac
"""


class Cloud:
    """A folder where the scripts run, with the fake commands."""

    def __init__(self, place: Path) -> None:
        self.place, self.gke = place, HERE
        (place / "bin").mkdir()
        for name in ("gcloud", "kubectl"):
            (place / "bin" / name).write_text(STAND_IN)
            (place / "bin" / name).chmod(0o755)
        self.source(lambda base: None)
        self.variables = {
            "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
            "HOME": str(place),
            "CALLS": str(place / "calls"),
            "STDIN": str(place / "stdin"),
            "REAL_KUBECTL": shutil.which("kubectl") or "",
            "IMAGEN_PYTHON": sys.executable,
            "IMAGEN_SITE": str(place / "site.env"),
            "IMAGEN_SOURCE": str(place / "gke.yaml"),
            "PYTHONPATH": str(ROOT),
            **dict.fromkeys(("THERE", "FAKE_ADDON", "FAKE_STRATEGY", "FAKE_CONTEXT"), ""),
            **SITE,
        }

    def source(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Write a configs/gke.yaml without placeholders, with something changed in its base."""
        values = yaml.safe_load((ROOT / "configs" / "gke.yaml").read_text())
        base = values["base"]
        base["site"] |= FILLED_IN
        base["serve"]["args"]["jobs"]["storage"] = "gs://my-bucket/jobs"
        for name in ("imagen-cpu", "imagen-gpu"):
            repository = f"europe-west4-docker.pkg.dev/my-images/imagen/{name}"
            base["images"][name]["repository"] = repository
        change(base)
        (self.place / "gke.yaml").write_text(yaml.safe_dump(values))

    def run(
        self, script: str, *arguments: str, say: str = "", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.gke / script, *arguments],
            cwd=self.place,
            env=self.variables | variables,
            input=say,
            capture_output=True,
            text=True,
            timeout=120,  # generous, for a busy machine
        )

    def shown(self, script: str, *arguments: str) -> list[list[str]]:
        """The commands that a dry run prints, in words; it must have run none."""
        done = self.run(script, *arguments, "--dry-run")
        assert (done.returncode, done.stderr) == (0, "")
        assert self.calls == []
        text = done.stdout.replace("\\\n", "")
        return [shlex.split(line[2:]) for line in text.splitlines() if line.startswith("+ ")]

    @property
    def calls(self) -> list[str]:
        file = self.place / "calls"
        return file.read_text().splitlines() if file.exists() else []

    @property
    def changes(self) -> list[str]:
        """The calls that change something."""
        asks = re.compile(r" (describe|get|diff|kustomize|config|--dry-run=server) ")
        return [call for call in self.calls if not asks.search(call)]


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def options(command: list[str]) -> dict[str, str]:
    """The `--name=value` words; a flag has an empty value."""
    return {
        name: value
        for word in command
        if word.startswith("--")
        for name, _, value in [word[2:].partition("=")]
    }


def creation(commands: list[list[str]], *words: str) -> list[str]:
    """The one command that creates the thing."""
    wanted = ["gcloud", *words, "create"]
    (found,) = (one for one in commands if one[: len(wanted)] == wanted)
    return found


# --- every script ---


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_and_runs_nothing(script: str, cloud: Cloud) -> None:
    done = cloud.run(script, "--help", IMAGEN_PROJECT="")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: kuberay/gke/{script}")
    assert "--dry-run" in done.stdout
    assert cloud.calls == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_option_is_refused(script: str, cloud: Cloud) -> None:
    done = cloud.run(script, "--force")
    assert done.returncode == 2
    assert f"{script}: unknown option: --force" in done.stderr
    assert cloud.calls == []


@pytest.mark.parametrize("name", SITE)
def test_a_missing_setting_is_named_with_what_it_means(name: str, cloud: Cloud) -> None:
    done = cloud.run("cluster.sh", "--dry-run", **{name: ""})
    assert done.returncode == 2
    assert re.search(rf"^  {name}: .*(project|region|zones)", done.stderr, re.M)
    assert not any(f"{other}:" in done.stderr for other in set(SITE) - {name})
    assert (done.stdout, cloud.calls) == ("", [])


def test_settings_come_from_the_file_unless_the_environment_has_them(cloud: Cloud) -> None:
    (cloud.place / "site.env").write_text("# ours\nIMAGEN_PROJECT=other\nIMAGEN_CLUSTER=green\n")
    (command,) = [c for c in cloud.shown("operator.sh") if "describe" in c]
    assert command[:5] == ["gcloud", "container", "clusters", "describe", "green"]
    assert options(command)["project"] == "my-project"


def test_an_unknown_setting_is_refused(cloud: Cloud) -> None:
    (cloud.place / "site.env").write_text("IMAGEN_REGOIN=europe-west4\n")
    done = cloud.run("cluster.sh", "--dry-run")
    assert (done.returncode, "IMAGEN_REGOIN" in done.stderr) == (2, True)


def test_settings_are_read_as_people_write_them(cloud: Cloud) -> None:
    lines = [
        "# ours",
        '  IMAGEN_PROJECT="my-project"  # not the other one',
        "IMAGEN_REGION='europe-west4'",
        "IMAGEN_ZONES= europe-west4-a,europe-west4-b ",
        "",
        "IMAGEN_CPU_NODES_MAX=9\t# for the launch",
        "IMAGEN_CPU_DISK_GB= # as it is",
    ]
    (cloud.place / "site.env").write_bytes("\r\n".join(lines).encode())
    for name in SITE:
        cloud.variables[name] = ""
    made = options(creation(cloud.shown("cluster.sh"), "container", "clusters"))
    assert (made["project"], made["location"]) == ("my-project", "europe-west4")
    assert made["node-locations"] == "europe-west4-a,europe-west4-b"
    assert (made["total-max-nodes"], made["disk-size"]) == ("9", "250")


@pytest.mark.parametrize(
    "line",
    [
        "IMAGEN_.*=x",
        "IMAGEN_CLUSTER",
        "export IMAGEN_CLUSTER=x",
        "IMAGEN_CLUSTER = x",
        'IMAGEN_CLUSTER="one" two',
    ],
)
def test_a_line_that_is_no_setting_is_named(line: str, cloud: Cloud) -> None:
    (cloud.place / "site.env").write_text(f"# ours\n{line}\n")
    done = cloud.run("cluster.sh", "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert "site.env, line 2: " in done.stderr
    assert line in done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("IMAGEN_PROJECT", "My Project"),
        ("IMAGEN_PROJECT", "123456789012"),
        ("IMAGEN_PROJECT", '"my-project'),
        ("IMAGEN_REGION", "europe-west4-a"),
        ("IMAGEN_REGION", "europe west"),
        ("IMAGEN_ZONES", "europe-west4-a, europe-west4-b"),
        ("IMAGEN_ZONES", "europe-west4-a,"),
        ("IMAGEN_ZONES", "us-central1-a"),
        ("IMAGEN_CLUSTER", "Imagen"),
        ("IMAGEN_OVERLAY", "kuberay/overlays/prod"),
        ("IMAGEN_CPU_MACHINE", "large"),
        ("IMAGEN_CPU_DISK_GB", "250GB"),
        ("IMAGEN_CPU_NODES_MAX", "one"),
        ("IMAGEN_CPU_NODES_MAX", "1"),
    ],
)
def test_a_setting_that_cannot_be_right_is_named(name: str, value: str, cloud: Cloud) -> None:
    done = cloud.run("cluster.sh", "--dry-run", **{name: value})
    assert (done.returncode, done.stdout, cloud.calls) == (2, "", [])
    assert f"\n  {name}='{value}': " in done.stderr


def test_every_setting_is_checked(cloud: Cloud) -> None:
    known = re.findall(r"^(IMAGEN_\w+)=", (HERE / "site.env.example").read_text(), re.M)
    done = cloud.run("cluster.sh", "--dry-run", **dict.fromkeys(known, "?"))
    assert re.findall(r"^  (IMAGEN_\w+)='\?'", done.stderr, re.M) == known


@pytest.mark.parametrize(
    ("script", "key"),
    [("bucket.sh", "site.mirror"), ("registry.sh", "images.imagen-cpu"), ("edge.sh", "site.host")],
)
def test_a_placeholder_of_the_manifests_is_named(script: str, key: str, cloud: Cloud) -> None:
    done = cloud.run(script, IMAGEN_SOURCE=str(ROOT / "configs" / "gke.yaml"))
    assert done.returncode == 2
    assert f"{key}: " in done.stderr
    assert "unresolved" in done.stderr
    assert cloud.calls == []


def test_shellcheck_finds_nothing() -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: THE SCRIPTS ARE NOT LINTED")
    files = [f"kuberay/gke/{path.name}" for path in HERE.glob("*.sh")]
    done = subprocess.run([shellcheck, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


def test_the_runbook_names_every_script() -> None:
    text = (ROOT / "kuberay" / "README.md").read_text()
    assert [name for name in SCRIPTS if f"kuberay/gke/{name}" not in text] == []


# --- what they create ---


def test_the_cluster_has_what_the_manifests_rely_on(cloud: Cloud) -> None:
    commands = cloud.shown("cluster.sh")
    made = options(creation(commands, "container", "clusters"))
    assert made["location"] == "europe-west4"  # a region
    assert made["workload-pool"] == "my-project.svc.id.goog"
    assert made["gateway-api"] == "standard"
    assert {"enable-dataplane-v2", "enable-managed-prometheus", "enable-image-streaming"} <= set(
        made
    )
    assert commands[-1][:4] == ["gcloud", "container", "clusters", "get-credentials"]


def test_cpu_pods_find_their_pool_and_fit_it(cloud: Cloud, overlay: Overlay) -> None:
    made = options(creation(cloud.shown("node-pool.sh", "cpu"), "container", "node-pools"))
    first = options(creation(cloud.shown("cluster.sh"), "container", "clusters"))
    same = ("machine-type", "disk-size", "node-labels", "total-max-nodes", "total-min-nodes")
    assert [made[key] for key in same] == [first[key] for key in same]
    cluster = overlay("prod").of("RayService")[0]["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    ingress = cluster["workerGroupSpecs"][0]
    key, value = made["node-labels"].split("=")
    for pod in (head, ingress["template"]["spec"]):
        assert pod["nodeSelector"][key] == value
    # e2-standard-N has N CPUs and 4 GB for each; GKE and its pods keep a CPU and 5 GB here.
    cpus = int(made["machine-type"].removeprefix("e2-standard-")) - 1
    ram = (cpus + 1) * 4e9 - 5e9
    publish = overlay("prod").of("CronJob")[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    sizes = [
        one["containers"][0]["resources"]["requests"]
        for one in (publish, head, ingress["template"]["spec"])
    ]
    assert max(as_bytes(size["memory"]) for size in sizes) < ram
    # GKE's rule for boot disks of this size: 35 % and 6 GiB for itself, 10 % before it evicts.
    disk = 0.55 * int(made["disk-size"]) - 6
    assert as_bytes(sizes[0]["ephemeral-storage"]) < disk * GIB
    # An upgrade runs all of them twice, and a model may be published meanwhile.
    sidecar = cluster["autoscalerOptions"]["resources"]["requests"]["cpu"]
    one, two, three = (parse_quantity(size["cpu"]) for size in sizes)
    wanted = one + 2 * (two + parse_quantity(sidecar) + ingress["maxReplicas"] * three)
    assert float(wanted) < cpus * int(made["total-max-nodes"])


def test_gpu_pools_are_those_of_the_compute_class(cloud: Cloud) -> None:
    compute_class = yaml.safe_load((HERE / "compute-class.yaml").read_text())
    name, rules = compute_class["metadata"]["name"], compute_class["spec"]["priorities"]
    quota = yaml.safe_load((ROOT / "kuberay/base/resource-quota.yaml").read_text())["spec"]["hard"]
    pools = [c for c in cloud.shown("node-pool.sh", "gpu") if "create" in c]
    assert [c[4] for c in pools] == [f"{name}-spot", f"{name}-on-demand"]
    for pool, rule in zip(map(options, pools), rules, strict=True):
        card, disk = rule["gpu"], rule["storage"]
        assert ("spot" in pool) == rule["spot"]
        assert pool["machine-type"] == rule["machineType"]
        assert pool["accelerator"] == (
            f"type={card['type']},count={card['count']},gpu-driver-version={card['driverVersion']}"
        )
        assert pool["ephemeral-storage-local-ssd"] == f"count={disk['localSSDCount']}"
        assert (pool["disk-type"], int(pool["disk-size"])) == (
            disk["bootDiskType"],
            disk["bootDiskSize"],
        )
        assert (pool["num-nodes"], pool["total-min-nodes"]) == ("0", "0")
        assert pool["total-max-nodes"] == quota["requests.nvidia.com/gpu"]
        assert f"cloud.google.com/compute-class={name}" in pool["node-labels"].split(",")
        assert pool["node-taints"] == f"cloud.google.com/compute-class={name}:NoSchedule"
        assert "enable-image-streaming" in pool


def test_gpu_pools_follow_the_source(cloud: Cloud) -> None:
    t4 = {"type": "t4", "machine": "n1-highmem-8", "max_nodes": 3, "spot_first": False}
    cloud.source(lambda base: base["gpu"].update(t4))
    pool = options(creation(cloud.shown("node-pool.sh", "gpu"), "container", "node-pools"))
    assert pool["accelerator"].startswith("type=nvidia-tesla-t4,")
    assert (pool["machine-type"], pool["total-max-nodes"]) == ("n1-highmem-8", "6")
    assert "spot" not in pool


def test_a_gpu_machine_that_holds_no_pod_is_refused(cloud: Cloud) -> None:
    cloud.source(lambda base: base["gpu"].update(machine="g2-standard-4"))
    done = cloud.run("node-pool.sh", "gpu")
    assert (done.returncode, cloud.calls) == (2, [])
    assert "does not fit a g2-standard-4" in done.stderr


def test_the_component_for_manual_pools_names_them(cloud: Cloud, tmp_path: Path) -> None:
    kubectl = cloud.variables["REAL_KUBECTL"] or pytest.skip("kubectl is not on the PATH")
    shutil.copytree(ROOT / "kuberay", tmp_path / "kuberay")
    place = tmp_path / "kuberay" / "overlays" / "manual"
    place.mkdir()
    parts = {"resources": ["../prod"], "components": ["../../gke/manual-pool"]}
    (place / "kustomization.yaml").write_text(yaml.safe_dump(parts))
    built = subprocess.run([kubectl, "kustomize", place], capture_output=True, text=True)
    found = list(yaml.safe_load_all(built.stdout))
    (spec,) = (one["spec"] for one in found if one["kind"] == "ComputeClass")
    pools = [c[4] for c in cloud.shown("node-pool.sh", "gpu") if "create" in c]
    assert spec["priorities"] == [{"nodepools": [pool]} for pool in pools]
    assert spec["nodePoolAutoCreation"] == {"enabled": False}


def test_pods_enter_the_bucket_by_workload_identity(cloud: Cloud, overlay: Overlay) -> None:
    done = cloud.run("bucket.sh")
    assert done.returncode == 0, done.stderr
    made = options(creation([shlex.split(call) for call in cloud.calls], "storage", "buckets"))
    assert {"uniform-bucket-level-access", "public-access-prevention"} <= set(made)
    assert "soft-delete-duration" not in made
    given = {
        (options(words)["member"], options(words)["role"])
        for words in map(shlex.split, cloud.calls)
        if "add-iam-policy-binding" in words
    }
    pool = "projects/123456/locations/global/workloadIdentityPools/my-project.svc.id.goog"
    account = f"principal://iam.googleapis.com/{pool}/subject/ns/imagen/sa"
    assert given == {
        (f"{account}/imagen-worker", "roles/storage.objectViewer"),
        (f"{account}/imagen-publisher", "roles/storage.objectViewer"),
        (f"{account}/imagen-publisher", "roles/storage.objectCreator"),
        (JOBS, "roles/storage.objectUser"),
        (JOBS, "roles/storage.legacyBucketReader"),
        (JOBS, "roles/iam.serviceAccountTokenCreator"),
        (
            "serviceAccount:my-project.svc.id.goog[imagen/imagen-ingress]",
            "roles/iam.workloadIdentityUser",
        ),
    }
    accounts = {one["metadata"]["name"] for one in overlay("prod").of("ServiceAccount")}
    assert {"imagen-worker", "imagen-publisher"} <= accounts


def test_the_ingress_may_change_nothing_but_pictures_of_jobs(
    cloud: Cloud, overlay: Overlay
) -> None:
    given = [c for c in cloud.shown("bucket.sh") if "add-iam-policy-binding" in c]
    (words,) = (c for c in given if options(c)["role"] == "roles/storage.objectUser")
    folder = "projects/_/buckets/my-bucket/objects/jobs/"
    assert options(words)["condition"] == (
        f'title=imagen-jobs,expression=resource.name.startsWith("{folder}")'
    )
    pods = {pod.group: pod.spec["serviceAccountName"] for pod in overlay("prod").pods if pod.group}
    assert (pods["ingress"], pods["models"]) == ("imagen-ingress", "imagen-worker")
    (account,) = (
        one
        for one in overlay("prod").of("ServiceAccount")
        if one["metadata"]["name"] == "imagen-ingress"
    )
    assert account["metadata"]["annotations"].keys() == {"iam.gke.io/gcp-service-account"}


def test_a_bucket_of_its_own_for_jobs_is_made_and_torn_down(cloud: Cloud) -> None:
    cloud.source(lambda base: base["serve"]["args"]["jobs"].update(storage="gs://my-jobs/a/b/"))
    commands = cloud.shown("bucket.sh")
    made = [c[4] for c in commands if c[1:4] == ["storage", "buckets", "create"]]
    assert made == ["gs://my-bucket", "gs://my-jobs"]
    (words,) = (c for c in commands if "--role=roles/storage.objectUser" in c)
    assert "gs://my-jobs" in words
    assert 'startsWith("projects/_/buckets/my-jobs/objects/a/b/")' in options(words)["condition"]
    gone = [c[-2] for c in cloud.shown("teardown.sh", "all") if c[1:3] == ["storage", "rm"]]
    assert gone == ["gs://my-bucket", "gs://my-jobs"]


def test_the_registry_is_that_of_the_images(cloud: Cloud) -> None:
    commands = cloud.shown("registry.sh")
    made = creation(commands, "artifacts", "repositories")
    assert (made[4], options(made)["project"]) == ("imagen", "my-images")
    assert options(made)["location"] == "europe-west4"
    (reader,) = (c for c in commands if "add-iam-policy-binding" in c)
    assert options(reader)["role"] == "roles/artifactregistry.reader"


def test_the_certificate_is_of_the_gateways_host_and_map(cloud: Cloud) -> None:
    commands = cloud.shown("edge.sh")
    assert (
        options(creation(commands, "certificate-manager", "certificates"))["domains"]
        == (FILLED_IN["host"])
    )
    assert FILLED_IN["certificate_map"] in creation(commands, "certificate-manager", "maps")
    entry = options(creation(commands, "certificate-manager", "maps", "entries"))
    assert (entry["hostname"], entry["map"]) == (FILLED_IN["host"], FILLED_IN["certificate_map"])
    assert FILLED_IN["security_policy"] in creation(commands, "compute", "security-policies")


@pytest.mark.parametrize(
    "script", ["cluster.sh", "node-pool.sh cpu", "bucket.sh", "registry.sh", "edge.sh"]
)
def test_what_exists_is_not_created_again(script: str, cloud: Cloud) -> None:
    done = cloud.run(*script.split(), THERE="1")
    assert done.returncode == 0, done.stderr
    assert [call for call in cloud.calls if " create" in call] == []


# --- the operator ---


def test_the_operator_is_pinned_and_where_the_network_policies_expect_it(cloud: Cloud) -> None:
    (file,) = (ROOT / "kuberay" / "operator").iterdir()
    operator = yaml.safe_load(file.read_text())
    (source,) = operator["resources"]
    assert re.search(r"ref=v\d+\.\d+\.\d+$", source)
    policies = yaml.safe_load_all((ROOT / "kuberay/base/network-policy.yaml").read_text())
    (policy,) = (one for one in policies if one["metadata"]["name"] == "operator")
    (peer,) = policy["spec"]["ingress"][0]["from"]
    assert operator["namespace"] in peer["namespaceSelector"]["matchLabels"].values()
    assert f"--namespace={operator['namespace']}" in cloud.shown("operator.sh")[-1]


def test_never_two_operators(cloud: Cloud) -> None:
    done = cloud.run("operator.sh", FAKE_ADDON="True")
    assert done.returncode == 2
    assert "RayOperator" in done.stderr
    assert [call for call in cloud.calls if call.startswith("kubectl")] == []


# --- secrets ---


def test_secrets_are_those_of_the_manifests_and_never_seen(cloud: Cloud, overlay: Overlay) -> None:
    (cloud.place / "oauth").write_text("of-the-client\n")
    (cloud.place / "keys").write_text("keys: [of-clients]\n")
    done = cloud.run("secrets.sh", "--oauth-file", "oauth", "--keys-file", "keys")
    assert done.returncode == 0, done.stderr
    made = {
        words[-2]: [words[-1].removeprefix("--from-file=").partition("=")[0]]
        for words in (call.split() for call in cloud.changes)
        if "secret" in words
    }
    assert made == validate(overlay("prod")).secrets
    values = [line for line in (cloud.place / "stdin").read_text().splitlines() if line]
    redis, token, oauth, keys = values
    assert keys == "keys: [of-clients]"
    assert oauth == "of-the-client"
    assert redis != token
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in (redis, token))
    seen = done.stdout + done.stderr + "\n".join(cloud.calls)
    assert [value for value in values if value in seen] == []


def test_existing_secrets_stay(cloud: Cloud) -> None:
    done = cloud.run("secrets.sh", THERE="1")
    assert (done.returncode, cloud.changes) == (0, [])


def test_iap_needs_its_secret(cloud: Cloud) -> None:
    assert "--oauth-file" in cloud.run("secrets.sh").stderr
    (cloud.place / "oauth").write_text("of-the-client\n")
    assert "--keys-file" in cloud.run("secrets.sh", "--oauth-file", "oauth").stderr
    done = cloud.run("secrets.sh", "--oauth-file", "nowhere")
    assert (done.returncode, "nowhere" in done.stderr) == (2, True)


# --- rollout ---


@pytest.fixture
def history(cloud: Cloud) -> Cloud:
    """The scripts in a repository with one commit."""
    shutil.copytree(ROOT / "kuberay", cloud.place / "kuberay")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com", "-C", cloud.place]
    for command in (["init", "--quiet"], ["add", "kuberay"], ["commit", "--quiet", "-m", "x"]):
        subprocess.run([*git, *command], check=True, env=cloud.variables)
    cloud.gke = cloud.place / "kuberay" / "gke"
    return cloud


def test_a_rollout_shows_asks_deploys_and_waits(cloud: Cloud) -> None:
    commands = cloud.shown("rollout.sh")
    deploy = [[Path(c[0]).name, *c[1:]] for c in commands if c[0].endswith("deploy.sh")]
    there = ["--context", CONTEXT, "prod"]
    assert deploy == [["deploy.sh", "--dry-run", *there], ["deploy.sh", *there]]
    waits = [options(c)["for"] for c in commands if "wait" in c]
    assert waits[-2:] == ["condition=UpgradeInProgress=false", "condition=Ready"]


def test_it_deploys_to_our_cluster_wherever_kubectl_is(history: Cloud) -> None:
    (history.place / "kuberay" / "deploy.sh").write_text('#!/bin/sh\necho "deploys: $*"\n')
    done = history.run("rollout.sh", "--yes", FAKE_CONTEXT="minikube")
    assert done.returncode == 0, done.stderr
    assert f"deploys: --context {CONTEXT} prod" in done.stdout
    assert "minikube" not in done.stdout + done.stderr


def test_a_rollback_applies_the_manifests_of_a_commit(history: Cloud) -> None:
    if not history.variables["REAL_KUBECTL"]:
        pytest.skip("kubectl is not on the PATH: no overlay can be built")
    shutil.rmtree(history.place / "kuberay" / "overlays")  # not those of the working tree
    done = history.run("rollout.sh", "--to", "HEAD", say="dev\n", IMAGEN_OVERLAY="dev")
    assert done.returncode == 0, done.stdout + done.stderr
    tried = [call for call in history.calls if " --dry-run=server --validate=strict " in call]
    (applied,) = (call for call in history.changes if " apply " in call)
    assert history.calls.index(tried[0]) < history.calls.index(applied)
    assert applied.startswith(f"kubectl --context={CONTEXT} apply --server-side ")


def commit(history: Cloud) -> None:
    if not history.variables["REAL_KUBECTL"]:
        pytest.skip("kubectl is not on the PATH: no overlay can be built")
    subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@example.com", "commit", "-qam", "y",
         "--allow-empty"],
        cwd=history.place, check=True, env=history.variables,
    )  # fmt: skip


def fill_in(history: Cloud, digest: str) -> None:
    """Replace the placeholders in every manifest."""
    for file in history.place.glob("kuberay/**/*.yaml"):
        text = re.sub(r"sha256:\w+", f"sha256:{digest}", file.read_text())
        file.write_text(text.replace("unresolved", "mine"))


def test_a_rollback_is_not_checked_against_the_present_ray(history: Cloud) -> None:
    fill_in(history, "ab" * 32)
    service = history.place / "kuberay" / "base" / "rayservice.yaml"
    before = re.sub(r"rayVersion: .*", "rayVersion: 2.58.0", service.read_text())
    assert before != service.read_text()
    service.write_text(before)
    commit(history)
    done = history.run("rollout.sh", "--to", "HEAD", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert any(" apply " in call for call in history.changes)


@pytest.mark.parametrize(
    ("digest", "words"),
    [("unresolved", "sha256:unresolved is a placeholder"), ("ab", "is not pinned")],
)
def test_a_commit_that_is_not_pinned_is_not_applied(
    history: Cloud, digest: str, words: str
) -> None:
    if digest == "unresolved":
        for file in history.place.glob("kuberay/overlays/prod/generated/*.yaml"):
            file.write_text(re.sub(r"sha256:\w+", "sha256:unresolved", file.read_text()))
    else:
        fill_in(history, digest)
    commit(history)
    done = history.run("rollout.sh", "--to", "HEAD", "--yes")
    assert done.returncode == 1
    assert words in done.stderr
    assert history.changes == []


def test_a_rollback_needs_a_commit(history: Cloud) -> None:
    done = history.run("rollout.sh", "--to", "nowhere")
    assert (done.returncode, "no such commit: nowhere" in done.stderr) == (2, True)


def test_a_cluster_is_replaced_only_where_kuberay_does_not(history: Cloud) -> None:
    variables = {"FAKE_CONTEXT": CONTEXT}
    (history.place / "kuberay" / "deploy.sh").write_text("#!/bin/sh\n")
    refused = history.run("rollout.sh", "--replace-cluster", "--yes", FAKE_STRATEGY="", **variables)
    assert refused.returncode == 2
    assert [call for call in history.calls if " delete " in call] == []
    done = history.run(
        "rollout.sh", "--replace-cluster", "--yes", FAKE_STRATEGY="None", **variables
    )
    assert done.returncode == 0, done.stderr
    (deleted,) = (call for call in history.calls if " delete " in call)
    assert deleted.endswith("delete raycluster imagen-abcde --timeout=30m")


# --- tear-down ---


@pytest.mark.parametrize("what", ["service", "cluster", "all"])
def test_nothing_is_deleted_without_a_confirmation(what: str, cloud: Cloud) -> None:
    done = cloud.run("teardown.sh", what, say="yes\n", THERE="1")
    assert (done.returncode, cloud.changes) == (1, [])
    assert "Nothing was done." in done.stdout
    lost = {
        "service": "the disk of Redis",
        "cluster": "the cluster imagen",
        "all": "gs://my-bucket",
    }
    assert lost[what] in done.stdout
    assert (lost["all"] in done.stdout) == (what == "all")


def test_the_service_goes_before_its_namespace_and_its_cluster(cloud: Cloud) -> None:
    done = cloud.run("teardown.sh", "all", say="imagen\n", THERE="1")
    assert done.returncode == 0, done.stderr
    order = ["delete rayservice", "wait raycluster", "delete --kustomize", "clusters delete", "rm"]
    places = [next(i for i, c in enumerate(cloud.calls) if f" {w}" in c) for w in order]
    assert all(one < other for one, other in pairwise(places))


def test_tearing_down_twice_is_no_error(cloud: Cloud) -> None:
    done = cloud.run("teardown.sh", "all", "--yes")
    assert (done.returncode, cloud.changes) == (0, [])


def test_bucket_and_images_outlive_the_cluster_by_default(cloud: Cloud) -> None:
    text = [" ".join(command) for command in cloud.shown("teardown.sh", "cluster")]
    assert [one for one in text if "storage" in one or "artifacts" in one] == []


# --- the runbook ---


def test_the_runbook_has_the_times_of_prod(overlay: Overlay) -> None:
    text = (ROOT / "kuberay" / "README.md").read_text()
    cold = text[text.index("## Cold start") : text.index("## Cost")]
    service = overlay("prod").of("RayService")[0]["spec"]
    ingress, model, *_ = yaml.safe_load(service["serveConfigV2"])["applications"][0]["deployments"]
    scaling = model["autoscaling_config"]
    models = service["rayClusterConfig"]["workerGroupSpecs"][1]
    delay = overlay("prod").of("ComputeClass")[0]["spec"]["autoscalingPolicy"]
    for words in (
        f"The engine waits {ingress['user_config']['request_timeout_s']} s",
        f"{scaling['upscale_delay_s']} s (`upscale_delay_s`)",
        f"{scaling['downscale_to_zero_delay_s']} s until a model's replicas end",
        f"{models['idleTimeoutSeconds']} s until Ray gives the pod",
        f"{delay['consolidationDelayMinutes']} minutes until GKE gives the node back",
    ):
        assert words in cold
    assert f"stays {service['rayClusterDeletionDelaySeconds']} s" in text


def section(heading: str) -> str:
    """The part of the runbook from a heading to the next of the same level or above."""
    text = (ROOT / "kuberay" / "README.md").read_text()
    level = heading.partition(" ")[0]
    start = text.index(f"\n{heading}\n")
    end = re.compile(rf"^#{{2,{len(level)}}} ", re.M).search(text, start + len(heading) + 2)
    return text[start : end.start() if end else None]


def test_the_runbook_sends_alerts_of_every_severity_to_somebody() -> None:
    text = section("### Send alerts to a receiver")
    config = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.S)[0])
    rules = yaml.safe_load((HERE / "rules.yaml").read_text())["spec"]["groups"][0]["rules"]
    severities = {rule["labels"]["severity"] for rule in rules}
    receivers = {one["name"] for one in config["receivers"]}
    (page,) = config["route"]["routes"]
    assert {config["route"]["receiver"], page["receiver"]} == receivers
    assert page["matchers"] == ['severity="page"']
    assert severities == {
        "page",
        "warn",
    }  # the default receiver gets the others
    (test,) = re.findall(r"<<'YAML'\n(.*?)\nYAML\n", text, re.S)
    test = yaml.safe_load(test)
    (rule,) = test["spec"]["groups"][0]["rules"]
    assert (test["kind"], rule["labels"]["severity"]) == ("Rules", "page")
    assert f"delete rules.monitoring.googleapis.com {test['metadata']['name']}" in text


def test_the_runbook_says_where_the_manifests_logs_go(overlay: Overlay) -> None:
    text = section("## Logs")
    cluster = overlay("prod").of("RayService")[0]["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        set_there = {f"{one['name']}={one.get('value')}" for one in container["env"]}
        assert "RAY_LOG_TO_STDERR=1" in set_there
        assert not any(one.startswith("RAY_SERVE_THROUGHPUT_OPTIMIZED") for one in set_there)
        assert container["name"] in text
    assert "set `RAY_LOG_TO_STDERR=1`" in text
    assert "`RAY_SERVE_THROUGHPUT_OPTIMIZED=1` is not set" in text


def test_the_runbook_leads_to_kind_without_google() -> None:
    """From the installation to the removal, by way of a picture, a change and a way back."""
    text = section("### On kind or k3d")
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S))
    order = ("IMAGES=python", "kind create", "kuberay/operator", "image-dev", "OVERLAY=dev")
    order += ("/images/style/comic", "What changed", "switch --detach", "kind delete")
    places = [commands.index(words) for words in order]
    assert places == sorted(places)
    assert "kuberay/gke" not in commands
