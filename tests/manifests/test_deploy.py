"""kuberay/deploy.sh with a fake kubectl: what it refuses, and what it applies."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from typer.testing import CliRunner

from cli.main import app
from deployments.catalogue import load_catalogue
from deployments.settings import ROOT
from deployments.store.lockfile import conversion_of

if TYPE_CHECKING:
    from collections.abc import Callable

    Deploy = Callable[..., "Deployed"]

HERE = Path(__file__).parent
KEYS = "imagen-keys:keys.yaml"
SECRETS = f"{KEYS} imagen-oauth:key imagen-ray-token:auth_token imagen-redis:password"
SITE = {"IMAGEN_PROJECT": "my-project", "IMAGEN_REGION": "europe-west4"}
GKE = "gke_my-project_europe-west4_imagen"
# Runs the command, but looks at the same manifests only once: importing Ray takes seconds.
IMAGEN = """\
#!/usr/bin/env bash
run() { "$REAL_PYTHON" -m cli.main "$@"; }
case "$1 $2 $3" in
  "kuberay validate "*) key=$(cat "$3"; echo "${@:4}") ;;
  "kuberay render --check") key=$(find "${5%/*}" "$7" -type f -print0 | sort -z | xargs -0 cat) ;;
  *) run "$@"; exit ;;
esac
saved=$CACHE/$(sha256sum <<<"$2 $key" | cut -d ' ' -f 1)
[ -e "$saved" ] || { run "$@" >"$saved.out" 2>"$saved.err"; echo $? >"$saved"; }
cat "$saved.out"
cat "$saved.err" >&2
exit "$(cat "$saved")"
"""
SCRIPTS = ["kuberay/deploy.sh", "kuberay/image.sh", "tests/manifests/fake_kubectl"]


class Deployed:
    """A run of the script, and the manifests that it applied."""

    def __init__(self, done: subprocess.CompletedProcess[str], log: Path) -> None:
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr
        self.asked = log.read_text().splitlines() if log.exists() else []
        applied = Path(f"{log}.applied")
        self.applied_text = applied.read_text() if applied.exists() else ""
        contexts = Path(f"{log}.contexts")
        self.contexts = set(contexts.read_text().splitlines()) if contexts.exists() else set()

    @property
    def applied(self) -> bool:
        return self.applied_text != ""

    @property
    def verdict(self) -> str:
        """The last line of stderr."""
        return (self.err.splitlines() or [""])[-1]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("validated")


def put_imagen(folder: Path) -> None:
    """An `imagen` and its Python."""
    (folder / "imagen").write_text(IMAGEN)
    (folder / "python").write_text('#!/bin/sh\nexec "$REAL_PYTHON" "$@"\n')
    for tool in ("imagen", "python"):
        (folder / tool).chmod(0o755)


@pytest.fixture
def deploy(tmp_path: Path, cache: Path) -> Deploy:
    """Runs the deploy.sh of a project."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not on the PATH: no overlay can be built")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kubectl").symlink_to(HERE / "fake_kubectl")
    put_imagen(tmp_path / "bin")
    for tool, answer in (
        ("docker", 'echo "$FAKE_IMAGE_ID"; test -n "$FAKE_IMAGE_ID"'),
        ("kind", ""),
        ("k3d", ""),
    ):
        (tmp_path / "bin" / tool).write_text(
            f'#!/bin/sh\necho "{tool} $*" >>"$FAKE_LOG"\n{answer}\n'
        )
        (tmp_path / "bin" / tool).chmod(0o755)

    def run(project: Path, *arguments: str, **variables: str | None) -> Deployed:
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "REAL_PYTHON": sys.executable,
            "CACHE": str(cache),
            "PYTHONPATH": str(ROOT),
            "REAL_KUBECTL": kubectl,
            "FAKE_LOG": str(tmp_path / "log"),
            "FAKE_CRDS": "customresourcedefinition.apiextensions.k8s.io/rayservices.ray.io",
            "FAKE_CONTEXT": "a-cluster" if "dev" in arguments else GKE,
            "FAKE_IMAGE_ID": "sha256:first",
            "FAKE_SECRETS": KEYS if "dev" in arguments else "",
            "IMAGEN_SITE": str(tmp_path / "site.env"),
            **SITE,
        }
        Path(f"{tmp_path / 'log'}.applied").unlink(missing_ok=True)
        command = [project / "kuberay" / "deploy.sh", *arguments]
        settings = {k: v for k, v in (environment | variables).items() if v is not None}
        done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
        return Deployed(done, tmp_path / "log")

    return run


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with every placeholder filled in."""
    root = tmp_path_factory.mktemp("filled")
    for name in ("configs", "kuberay"):
        shutil.copytree(ROOT / name, root / name)
    registry = root / "configs" / "models" / "production.yaml"
    edit(registry, "accept_noncommercial: []", "accept_noncommercial: [background-rmbg14]")
    lock = registry.with_suffix(".lock.json")
    locked = json.loads(lock.read_text())
    for entry in load_catalogue(registry).entries:
        locked["models"][entry.name] |= {"digest": "ab" * 32}
        if how := conversion_of(entry):
            locked["models"][entry.name] |= {"conversion": how}
    lock.write_text(json.dumps(locked))
    edit(root / "kuberay" / "images.lock", "sha256:unresolved", "sha256:" + "ab" * 32)
    edit(root / "configs" / "gke.yaml", "configs/models/production.yaml", str(registry))
    edit(root / "configs" / "gke.yaml", "unresolved", "mine")
    render(root)
    return root


@pytest.fixture
def spoiled(filled: Path, tmp_path: Path) -> Path:
    """A copy of it, which the test may change."""
    return Path(shutil.copytree(filled, tmp_path / "project"))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def render(root: Path) -> None:
    places = ["--source", str(root / "configs" / "gke.yaml"), "--folder", str(root / "kuberay")]
    assert CliRunner().invoke(app, ["kuberay", "render", *places]).exit_code == 0


def test_a_project_that_is_filled_in_is_applied(filled: Path, deploy: Deploy) -> None:
    done = deploy(filled, "prod", FAKE_SECRETS=SECRETS, FAKE_NAMESPACE="yes")
    assert (done.code, done.err.count("deploy.sh")) == (0, 0), done.err
    assert f"context {GKE}" in done.out
    assert done.contexts == {GKE}
    assert "a difference" in done.out
    dry_run, diff, apply, generation, wait = done.asked[-5:]
    assert dry_run.startswith("apply --server-side --dry-run=server --validate=strict --filename")
    assert diff.startswith("diff --server-side")
    assert apply.startswith("apply --server-side --filename")
    assert "metadata.generation" in generation
    assert wait.endswith("--for=jsonpath={.status.observedGeneration}=3")
    assert "wait rayservice/imagen" in done.out


def test_a_dry_run_lists_what_a_first_deployment_creates(filled: Path, deploy: Deploy) -> None:
    done = deploy(filled, "--dry-run", "dev")
    assert (done.code, done.applied) == (0, False), done.err
    assert "  RayService/imagen\n" in done.out
    assert "  Namespace/imagen\n" in done.out
    assert "The API server was not asked" in done.out
    assert not [line for line in done.asked if "apply" in line or "create" in line]


def test_a_first_deployment_creates_the_namespace_and_asks_the_api_server(
    filled: Path, deploy: Deploy
) -> None:
    done = deploy(filled, "dev")
    assert (done.code, done.applied) == (0, True), done.err
    asked = [line for line in done.asked if line.startswith(("apply", "create"))]
    assert asked[0] == "create namespace imagen"
    assert asked[1].startswith("apply --server-side --dry-run=server")


@pytest.mark.parametrize("arguments", [["dev"], ["--dry-run", "dev"]])
def test_what_the_api_server_refuses_is_not_applied(
    filled: Path, deploy: Deploy, arguments: list[str]
) -> None:
    refusal = 'strict decoding error: unknown field "spec.rayVersoin"'
    done = deploy(filled, *arguments, FAKE_NAMESPACE="yes", FAKE_REFUSAL=refusal)
    assert (done.code, done.applied) == (1, False)
    assert refusal in done.err
    assert "the API server refuses the manifests" in done.verdict


def test_what_the_operator_refuses_is_shown(filled: Path, deploy: Deploy) -> None:
    verdict = "ValidationFailed: the headGroupSpec should have at least one container"
    running = {"FAKE_CLUSTERS": "imagen-abcde other", "FAKE_NAMESPACE": "yes"}
    done = deploy(filled, "dev", FAKE_VERDICT=verdict, **running)
    assert (done.code, done.applied) == (1, True)
    assert verdict in done.err
    assert "the KubeRay operator did not accept the RayService" in done.verdict
    assert not [line for line in done.asked if " delete " in line]


def mark(deployed: Deployed) -> str:
    """The mark of the pods that were applied."""
    documents = [one for one in yaml.safe_load_all(deployed.applied_text) if one]
    [service] = [one for one in documents if one["kind"] == "RayService"]
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]
    return head["template"]["metadata"]["annotations"]["imagen.dev/made-of"]


def test_a_new_build_under_the_same_tag_replaces_the_pods(filled: Path, deploy: Deploy) -> None:
    kind = {"FAKE_CONTEXT": "kind-mine", "FAKE_NAMESPACE": "yes"}
    first = deploy(filled, "dev", **kind)
    assert first.code == 0, first.err
    running = f"imagen-abcde {mark(first)}"
    same = deploy(filled, "dev", **kind, FAKE_CLUSTERS=running)
    assert mark(same) == mark(first)
    assert not [line for line in same.asked if " delete " in line]
    rebuilt = deploy(filled, "dev", **kind, FAKE_CLUSTERS=running, FAKE_IMAGE_ID="sha256:second")
    assert mark(rebuilt) != mark(first)
    load, apply, *_, delete = rebuilt.asked[-6:]
    assert load == "kind load docker-image imagen-cpu:dev --name mine"
    assert apply.startswith("apply --server-side")
    assert delete == "--namespace imagen delete raycluster imagen-abcde"


def test_the_image_is_loaded_into_the_nodes_of_k3d(filled: Path, deploy: Deploy) -> None:
    done = deploy(filled, "dev", FAKE_CONTEXT="k3d-mine", FAKE_NAMESPACE="yes")
    assert done.code == 0, done.err
    assert "k3d image import imagen-cpu:dev --cluster mine" in done.asked


def commands(section: str) -> list[str]:
    """Those of a section of the README that need no cluster."""
    text = (ROOT / "kuberay" / "README.md").read_text(encoding="utf-8")
    body = text.partition(f"\n{section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^(\S.*?) +# needs no cluster", body, re.M)


def test_the_commands_of_the_readme_that_need_no_cluster_run_without_one(
    spoiled: Path, deploy: Deploy, cache: Path, tmp_path: Path
) -> None:
    """In their order, from the installation to the way back."""
    (tmp_path / "own").mkdir()
    put_imagen(tmp_path / "own")
    variables = {
        "PATH": f"{tmp_path / 'own'}:{os.environ['PATH']}",
        "REAL_PYTHON": sys.executable,
        "CACHE": str(cache),
        "PYTHONPATH": str(ROOT),
        "KUBECONFIG": os.devnull,
        "HOME": str(tmp_path / "own"),
    }
    lines = commands("### On kind or k3d")
    assert len(lines) == 8
    # `imagen` takes relative paths from its own project; here it is a copy.
    places = "--source $PWD/configs/gke.yaml --folder $PWD/kuberay"
    for line in lines:
        here = line.replace("kuberay render", f"kuberay render {places}")
        done = subprocess.run(
            ["bash", "-c", here], cwd=spoiled, env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        if "deploy.sh" in line:
            assert "  RayService/imagen\n" in done.stdout
            assert "Dry run without a cluster" in done.stdout


def test_without_a_cluster_a_mistake_is_found_and_nothing_is_applied(
    spoiled: Path, deploy: Deploy
) -> None:
    environment = {"KUBECONFIG": os.devnull, "FAKE_CONTEXT": None}
    assert "kubectl knows no cluster" in deploy(spoiled, "dev", **environment).verdict
    edit(spoiled / "kuberay/base/redis.yaml", "--appendfsync always", "--appendfsync no")
    done = deploy(spoiled, "--dry-run", "prod", **environment)
    assert (done.code, done.applied) == (1, False)
    assert "--appendfsync always is missing" in done.out + done.err


def test_a_new_size_replaces_the_pods_of_dev(spoiled: Path, deploy: Deploy) -> None:
    first = deploy(spoiled, "dev", FAKE_NAMESPACE="yes")
    edit(
        spoiled / "configs/gke.yaml",
        "size: {cpu: 500m, memory: 2Gi}",
        "size: {cpu: 500m, memory: 1Gi}",
    )
    render(spoiled)
    done = deploy(spoiled, "dev", FAKE_NAMESPACE="yes", FAKE_CLUSTERS=f"imagen-abcde {mark(first)}")
    assert done.asked[-1] == "--namespace imagen delete raycluster imagen-abcde"


def test_the_cluster_of_prod_is_never_deleted(filled: Path, deploy: Deploy) -> None:
    clusters = {"FAKE_CLUSTERS": "imagen-abcde other", "FAKE_NAMESPACE": "yes"}
    done = deploy(filled, "prod", FAKE_SECRETS=SECRETS, **clusters)
    assert done.code == 0, done.err
    assert "made-of" not in done.applied_text
    assert not [line for line in done.asked if "raycluster" in line.split()]


def test_the_nodes_of_another_cluster_need_not_be_there_yet(filled: Path, deploy: Deploy) -> None:
    """Its own autoscaler adds them."""
    secrets = SECRETS.replace("imagen-oauth:key ", "")
    done = deploy(filled, "portable", FAKE_CONTEXT="eks", FAKE_SECRETS=secrets)
    assert (done.code, done.applied) == (0, True), done.err
    assert not [line for line in done.asked if line.startswith("get nodes")]


def test_an_image_that_is_not_built_is_refused(filled: Path, deploy: Deploy) -> None:
    done = deploy(filled, "dev", FAKE_IMAGE_ID="")
    assert (done.code, done.applied) == (1, False)
    assert "make image-dev" in done.verdict


def test_a_node_without_room_for_an_upgrade_is_refused(spoiled: Path, deploy: Deploy) -> None:
    edit(
        spoiled / "configs/gke.yaml",
        "ray_service: {upgradeStrategy: {type: None}}",
        "ray_service: {}",
    )
    render(spoiled)
    done = deploy(spoiled, "dev", FAKE_NAMESPACE="yes")
    assert (done.code, done.applied) == (1, False)
    assert "the nodes have 4 CPUs; two clusters at a time" in done.err
    assert deploy(spoiled, "dev", FAKE_NODES="cpu=8,memory=24Gi").code == 0


@pytest.mark.parametrize(
    ("overlay", "current", "words"),
    [
        ("prod", "minikube", f"kubectl config use-context {GKE}"),
        ("prod", "gke_my-project_us-central1_imagen", f"kubectl config use-context {GKE}"),
        ("prod-hostpath", "minikube", f"kubectl config use-context {GKE}"),
        ("dev", GKE, "dev is not for GKE"),
        ("portable", GKE, "portable is not for GKE"),
    ],
)
def test_an_overlay_is_refused_on_another_cluster(
    filled: Path, deploy: Deploy, overlay: str, current: str, words: str
) -> None:
    done = deploy(filled, overlay, FAKE_CONTEXT=current)
    assert (done.code, done.contexts) == (1, set())
    assert words in done.verdict
    assert f"kubectl is at {current}" in done.verdict
    assert f"--context {current} {overlay}" in done.verdict


def test_the_settings_name_the_cluster(filled: Path, deploy: Deploy, tmp_path: Path) -> None:
    missing = deploy(filled, "prod", IMAGEN_PROJECT="")
    assert (missing.code, missing.contexts) == (1, set())
    assert "IMAGEN_PROJECT: id of the Google Cloud project" in missing.err
    assert "site.env does not name the cluster" in missing.verdict
    (tmp_path / "site.env").write_text("IMAGEN_PROJECT='my-project'\nIMAGEN_CLUSTER=green # ours\n")
    done = deploy(filled, "--dry-run", "prod", IMAGEN_PROJECT="", FAKE_SECRETS=SECRETS)
    assert (done.code, done.contexts) == (1, set())
    assert "name gke_my-project_europe-west4_green" in done.verdict


def test_a_context_can_be_named(filled: Path, deploy: Deploy) -> None:
    done = deploy(filled, "--context", "mine", "--dry-run", "prod", IMAGEN_PROJECT="")
    assert (done.code, done.contexts) == (1, {"mine"})
    assert "lacks Secrets" in done.verdict
    assert "  kubectl --context mine --namespace imagen create secret generic" in done.err
    assert not [line for line in done.asked if line.startswith("config")]


def test_placeholders_are_refused(deploy: Deploy) -> None:
    done = deploy(ROOT, "prod", FAKE_SECRETS=SECRETS, FAKE_NAMESPACE="yes")
    assert (done.code, done.applied) == (1, False)
    assert "sha256:unresolved is a placeholder" in done.err
    assert "nothing was applied. Fill in configs/gke.yaml, run make image-lock" in done.verdict


def test_missing_secrets_are_named_with_the_commands_that_create_them(
    filled: Path, deploy: Deploy
) -> None:
    done = deploy(filled, "prod", FAKE_SECRETS="imagen-oauth:key imagen-redis:user")
    assert (done.code, done.applied) == (1, False)
    *_, space, keys, token, redis, verdict = done.err.splitlines()
    assert space.endswith("kubectl create namespace imagen")
    assert "imagen keys create NAME --keys keys.yaml && kubectl" in keys
    assert keys.endswith("create secret generic imagen-keys --from-file=keys.yaml")
    assert "create secret generic imagen-ray-token --from-literal=auth_token=" in token
    assert redis.endswith("kubectl --namespace imagen edit secret imagen-redis")
    assert "imagen-ray-token (key auth_token), imagen-redis (key password)" in verdict
    assert "imagen-oauth" not in done.err


def test_what_cannot_be_compared_is_not_applied(filled: Path, deploy: Deploy) -> None:
    done = deploy(filled, "dev", FAKE_NAMESPACE="yes", FAKE_DIFF="2")
    assert (done.code, done.applied) == (1, False)
    assert "kubectl cannot compare" in done.verdict


def test_an_image_that_is_not_pinned_is_refused(spoiled: Path, deploy: Deploy) -> None:
    edit(spoiled / "kuberay/base/publish.yaml", "image: imagen-cpu", "image: docker.io/mine:v1")
    done = deploy(spoiled, "prod", FAKE_SECRETS=SECRETS, FAKE_NAMESPACE="yes")
    assert (done.code, done.applied) == (1, False)
    assert "docker.io/mine:v1 is not pinned" in done.err
    assert "prod is not ready" in done.verdict


def test_manifests_that_are_out_of_date_are_refused(spoiled: Path, deploy: Deploy) -> None:
    edit(spoiled / "kuberay/base/rayservice.yaml", "maxReplicas: 4", "maxReplicas: 5")
    done = deploy(spoiled, "prod")
    assert (done.code, done.applied) == (1, False)
    assert "base/rayservice.yaml: out of date" in done.err
    assert "Run: make manifests" in done.verdict


@pytest.mark.parametrize(
    ("definitions", "words"),
    [("", "has no KubeRay"), (None, "cluster of a-cluster does not answer")],
)
def test_a_cluster_that_is_not_ready_is_refused(
    filled: Path, deploy: Deploy, definitions: str | None, words: str
) -> None:
    done = deploy(filled, "dev", FAKE_CRDS=definitions)
    assert (done.code, done.applied) == (1, False)
    assert words in done.verdict


@pytest.mark.parametrize(
    "arguments",
    [[], ["prod", "dev"], ["production"], ["--dry-run"], ["--context"], ["--force", "dev"]],
)
def test_an_unknown_overlay_is_refused_with_the_known_ones(
    filled: Path, deploy: Deploy, arguments: list[str]
) -> None:
    done = deploy(filled, *arguments)
    assert (done.code, done.asked) == (2, [])
    assert "one of: dev gke-smoke portable prod-hostpath prod-shared prod" in done.verdict


def test_without_kubectl_it_says_so(filled: Path, deploy: Deploy, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(shutil.which(name) or name)
    done = deploy(filled, "prod", PATH=str(tools))
    assert (done.code, "kubectl is not on the PATH" in done.verdict) == (1, True)


def test_shellcheck_finds_nothing() -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: SCRIPTS ARE NOT LINTED")
    done = subprocess.run([shellcheck, *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
