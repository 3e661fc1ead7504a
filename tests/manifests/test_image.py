"""The Dockerfile, its context and the script that builds it, without Docker."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.settings import ROOT
from deployments.store.lockfile import load_lock
from kuberay.render.environment import BASE, load_environments
from kuberay.render.images import UNRESOLVED
from tests.manifests.conftest import SOURCE

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
IGNORE = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
TARGETS = ("cpu", "gpu", "airgapped")
DIGEST = "sha256:" + "ab" * 32
Stage = list[tuple[str, str]]
"""Instructions and their arguments."""


def stages() -> dict[str, Stage]:
    """The stages of the Dockerfile by name; lines before the first are in ""."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", TEXT, flags=re.M))
    found: dict[str, Stage] = {"": []}
    for line in filter(None, map(str.strip, joined.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            found[rest.rpartition(" AS ")[2]] = []
        found[list(found)[-1]].append((instruction, rest.strip()))
    return found


STAGES = stages()


def chain(target: str) -> Stage:
    """Every instruction of a target, including those of its base."""
    own = STAGES[target]
    parent = own[0][1].split()[0]
    return (chain(parent) if parent in STAGES else []) + own


def ignored(path: str) -> bool:
    """Whether .dockerignore excludes a path; the last matching pattern decides."""
    result = False
    for pattern in filter(lambda line: line and not line.startswith("#"), IGNORE):
        glob = re.escape(pattern.removeprefix("!"))
        glob = glob.replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(f"{glob}(/.*)?", path):
            result = not pattern.startswith("!")
    return result


def context() -> list[str]:
    """Every file of the build context."""
    tops = {line[1:].split("/")[0] for line in IGNORE if line.startswith("!")}
    found = [ROOT / top for top in sorted(tops)]
    files = [one for top in found for one in (top.rglob("*") if top.is_dir() else [top])]
    paths = [str(one.relative_to(ROOT)) for one in files if one.is_file()]
    return [path for path in paths if not ignored(path)]


def copies(stage: str) -> list[tuple[list[str], str]]:
    """The sources and the destination of each COPY from the context."""
    found = [rest.split() for name, rest in STAGES[stage] if name == "COPY"]
    return [(words[:-1], words[-1]) for words in found if not words[0].startswith("--from")]


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed: THE DOCKERFILE IS NOT LINTED")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_image_stands_on_one_base_that_the_lock_pins() -> None:
    before: list[str] = ["scratch"]
    outside = []
    for name, stage in list(STAGES.items())[1:]:
        parent = stage[0][1].split()[0]
        outside += [parent] if parent not in before else []
        before.append(name)
    python = load_environments(SOURCE)[BASE].images["python"]
    assert outside == [f"{python.repository}:{python.tag}@${{PYTHON_DIGEST}}"]
    assert STAGES[""] == [("ARG", f"PYTHON_DIGEST=sha256:{UNRESOLVED}")]
    assert all(chain(target)[0] == STAGES["base"][0] for target in TARGETS)


def test_ray_and_python_are_those_of_the_manifests_and_of_the_tests() -> None:
    environment = load_environments(SOURCE)[BASE]
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={environment.ray_cluster['rayVersion']}" in constraints
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert (environment.images["python"].tag or "").startswith(f"{ours}-")
    installs = [
        command
        for stage in STAGES.values()
        for name, rest in stage
        if name == "RUN"
        for command in rest.split("&&")
        if "pip install" in command
    ]
    assert len(installs) == 4
    assert all("--constraint constraints.txt" in one for one in installs)


@pytest.mark.parametrize("target", TARGETS)
def test_it_runs_as_the_user_of_the_pods_and_can_be_probed(target: str) -> None:
    pod = load_environments(SOURCE)[BASE].every_pod.pod["securityContext"]
    users = [rest for name, rest in chain(target) if name == "USER"]
    assert users[-1] == f"{pod['runAsUser']}:{pod['runAsGroup']}"
    assert any("install" in rest and " wget" in rest for name, rest in chain(target))
    # KubeRay and Jobs set the command.
    assert not any(name == "ENTRYPOINT" for name, _ in chain(target))


def test_the_context_holds_what_is_copied_and_nothing_private() -> None:
    files = context()
    for stage in STAGES:
        for sources, _ in copies(stage) if stage else []:
            assert all(any(f"{f}/".startswith(f"{one}/") for f in files) for one in sources), stage
    assert {path.split("/")[0] for path in files} == {
        *("LICENSE", "constraints.txt", "pyproject.toml"),
        *("benchmarks", "cli", "configs", "deployments", "docs", "kuberay", "serve_app"),
        "starter_models",
    }
    for path in (".venv/x", ".git/config", ".env", "tests/x.py", "benchmarks/results/x.json"):
        assert ignored(path), path
    assert not [path for path in files if "__pycache__" in path or "training" in path]
    weights = {path for path in files if path.endswith((".safetensors", ".bin", ".pt", ".onnx"))}
    starter = {
        f"{origin.source.removeprefix('file://')}/{file.path}"
        for model in load_lock(ROOT / "configs/models/starter.yaml").models.values()
        for origin in model.origins
        for file in origin.files
    }
    assert weights < starter < set(files)


def test_what_is_copied_serves_the_starter_models_and_refills_a_store(tmp_path: Path) -> None:
    app = tmp_path / "app"
    for (source,), destination in copies("application"):
        assert destination in ("/", f"/{source}")
        for path in context():
            if f"{path}/".startswith(f"{source}/"):
                (app / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / path, app / path)
    # As in the image, the source is on the path and not installed. The second pull is that of a pod
    # without a network, from an image with weights.
    code = """
import sys, yaml
from deployments.settings import ROOT
from serve_app.app import build
from cli.main import app
from benchmarks.load import load_plan
from benchmarks.load.workload import photos
assert str(ROOT) == sys.argv[1], ROOT
build(yaml.safe_load((ROOT / "configs/local.yaml").read_text())["applications"][0]["args"])
photos(load_plan(ROOT / "benchmarks/plans/smoke.yaml"))
for arguments in (["--store", f"{ROOT}/weights"],
                  ["--store", f"{ROOT}/models", "--mirror", f"file://{ROOT}/weights/store"]):
    app(["models", "pull", "--all", *arguments], standalone_mode=False)
"""
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(app)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(app)],
        cwd=app,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (app / "weights" / "store").iterdir()}
    assert names == set(load_lock(ROOT / "configs/models/starter.yaml").models)
    assert {path.name for path in (app / "models" / "store").iterdir()} == names


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A tree with the script, a pinned base, and a docker that only logs its arguments."""
    (tmp_path / "kuberay").mkdir()
    shutil.copy(ROOT / "kuberay" / "image.sh", tmp_path / "kuberay")
    (tmp_path / "kuberay" / "images.lock").write_text(f"python: {DIGEST}\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "docker").write_text('#!/bin/sh\necho "docker $*" >> "$LOG"\n')
    (tmp_path / "bin" / "docker").chmod(0o755)
    (tmp_path / "weights" / "store").mkdir(parents=True)
    return tmp_path


def build(project: Path, *arguments: str, **variables: str) -> tuple[int, str, list[str]]:
    """Run the script: exit code, output, and the calls of docker."""
    log = project / "log"
    path = f"{project / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        [project / "kuberay" / "image.sh", *arguments],
        env={"PATH": path, "LOG": str(log), "TAG": "abc123"} | variables,
        capture_output=True,
        text=True,
    )
    asked = log.read_text().splitlines() if log.exists() else []
    return done.returncode, done.stdout + done.stderr, asked


def test_both_images_are_built_upon_the_base_of_the_lock(project: Path) -> None:
    code, _, asked = build(project)
    pinned = f"--build-arg PYTHON_DIGEST={DIGEST}"
    assert (code, asked) == (
        0,
        [
            f"docker build --target {one} {pinned} --tag imagen-{one}:abc123 ."
            for one in ("cpu", "gpu")
        ],
    )


def test_a_registry_is_pushed_to_and_a_dry_run_only_tells(project: Path) -> None:
    registry = "europe-docker.pkg.dev/mine/imagen"
    _, output, asked = build(project, "--dry-run", "cpu", REGISTRY=registry)
    assert f"docker push {registry}/imagen-cpu:abc123" in output
    assert not asked
    _, _, asked = build(project, "cpu", REGISTRY=f"{registry}/")
    assert asked[-1] == f"docker push {registry}/imagen-cpu:abc123"


def test_a_dry_run_shows_the_command_before_the_base_is_locked(project: Path) -> None:
    placeholder = f"sha256:{UNRESOLVED}"
    (project / "kuberay" / "images.lock").write_text(f"python: {placeholder}\n")
    code, output, asked = build(project, "--dry-run", "cpu")
    assert (code, asked) == (0, [])
    assert f"PYTHON_DIGEST={placeholder} --tag imagen-cpu:abc123" in output


def test_models_come_from_a_store_that_is_filled(project: Path) -> None:
    _, _, asked = build(project, "airgapped", MODELS=str(project / "weights"))
    assert f"--build-context models={project / 'weights'} ." in asked[0]


@pytest.mark.parametrize(
    ("arguments", "lock", "words"),
    [
        ([], f"python: sha256:{UNRESOLVED}\n", "make image-lock IMAGES=python"),
        ([], f"redis: {DIGEST}\n", "no line"),
        (["cpu", "tpu"], f"python: {DIGEST}\n", "no target 'tpu'"),
        (["cpu", "airgapped"], f"python: {DIGEST}\n", "imagen models pull"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is(
    project: Path, arguments: list[str], lock: str, words: str
) -> None:
    (project / "kuberay" / "images.lock").write_text(lock)
    code, output, asked = build(project, *arguments)
    assert (code, asked) == (2, [])
    assert words in output
    assert len(output.splitlines()) == 1
