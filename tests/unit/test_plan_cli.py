"""`imagen plan`: what it prints, and what it leaves alone in the file it writes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from cli.main import app
from cli.plan import write_shares
from deployments.errors import ConfigError

PRODUCTION = Path("configs/models/production.yaml").absolute()
SERVE = """\
# Imagen on GPUs.
http_options: {host: 0.0.0.0}   # everybody

applications:
  - name: imagen
    import_path:   serve_app.app:build   # the spaces stay
    args:
      models: configs/models/production.yaml
      model_num_cpus: 0.5
    deployments:
      - name: Ingress
        ray_actor_options: {num_cpus: 0.1}
      - name: Upscale # the largest
        # one replica, for now
        autoscaling_config: &one {min_replicas: 1}
        user_config: &tuning {batch_window_s: 0.0, max_batch_size: 4} # shared

      # SDXL
      - name: Enhance
        ray_actor_options: {num_cpus: 1,  num_gpus: 0.2} # cautious
        user_config: *tuning
      - name: Comic
        user_config:
          # no waiting
          batch_window_s: 0.0

          # of last week
          digest: "0123456789abcdef"
      # the faces
      - name: Aged
        user_config: *tuning
        autoscaling_config: *one
      - {name: BackgroundRemove}
  - name: other
    import_path: somebody.else:app
    deployments:
      - name: Comic
        user_config: *tuning
"""


@pytest.fixture
def serve(tmp_path: Path) -> Path:
    path = tmp_path / "serve.yaml"
    path.write_text(SERVE)
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, args)])


def shares(*names: str, num_gpus: float = 0.35, rows: int = 3, budget_px: int = 999) -> Any:
    return {
        name: {
            "ray_actor_options": {"num_gpus": num_gpus},
            "user_config": {"max_batch_size": rows, "budget_px": budget_px},
        }
        for name in names
    }


def deployments(path: Path, application: int = 0) -> dict[str, Any]:
    values = yaml.safe_load(path.read_text())
    return {entry["name"]: entry for entry in values["applications"][application]["deployments"]}


# -------------------------------------------------------------------------------------- printed


@pytest.mark.parametrize("gpu", ["l4", "t4", "h200", "L4", "A100-40"])
def test_the_five_are_planned_without_naming_them(gpu: str) -> None:
    done = run("--gpu", gpu)
    assert done.exit_code == 0, done.output
    for name in ("upscale-sd-x4", "enhance-sdxl-refiner", "comic-ghibli", "aged-sd21"):
        assert name in done.stdout
    assert "background-rmbg14 is not accepted" in done.stderr


def test_every_figure_of_an_estimate_is_marked_as_one() -> None:
    lines = run("--gpu", "a100-40").stdout.splitlines()  # which nobody has measured
    table = next(line for line in lines if "comic-ghibli" in line)
    assert len(re.findall(r"\d GiB", table)) == len(re.findall(r"~\d+\.\d\d GiB", table)) == 5
    assert re.search(r"~0\.\d+", table)
    assert "estimate" in table


def test_a_model_may_be_named_by_its_task() -> None:
    values = json.loads(run("--gpu", "l4", "comic", "Upscale", "comic-ghibli", "--json").stdout)
    assert sorted(m["name"] for m in values["models"]) == ["comic-ghibli", "upscale-sd-x4"]


def test_json_holds_the_plan_and_nothing_else() -> None:
    values = json.loads(run("--gpu", "a100-40", "--gpus", 2, "--json").stdout)
    assert values["gpus"] == 2
    assert values["context_source"] == "estimate"
    assert len(values["models"]) == 5
    for entry in values["models"]:
        assert 0 < entry["num_gpus"] <= 1
        assert entry["need_bytes"] <= entry["num_gpus"] * values["total_bytes"]
        assert entry["budget_px"] > 0
        assert entry["source"].startswith("estimate")


def test_named_models_alone_are_planned() -> None:
    done = run("--gpu", "t4", "upscale-realesrgan-x4plus", "comic-ghibli", "--json")
    names = [entry["name"] for entry in json.loads(done.stdout)["models"]]
    assert names == ["upscale-realesrgan-x4plus", "comic-ghibli"]


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (["--gpu", "t4", "--gpus", "1"], 9, "Give --gpus"),
        (["--gpu", "v100"], 2, "Known: t4"),
        (["--gpu", "l4", "nothing"], 2, "No such model"),
        (["--gpu", "l4", "whisper-large-v3-ct2"], 2, "Artefacts"),
        (["--gpu", "l4", "--write"], 2, "--config"),
        (["--gpu", "l4", "--models", "configs/models/starter.yaml"], 2, "make profile-gpu"),
        (["--gpu", "l4", "--gpus", "0"], 2, ""),
        ([], 2, "--gpu"),
    ],
)
def test_what_cannot_be_planned_ends_with_its_code_and_a_remedy(
    args: list[str], code: int, told: str
) -> None:
    done = run(*args)
    assert done.exit_code == code
    assert told in done.stderr
    if code == 9:
        error = json.loads(run(*args, "--json").stdout)
        assert error["exit_code"] == 9
        assert error["error"]["code"] == "gpu_too_small"


# -------------------------------------------------------------------------------------- written


def test_only_the_lines_that_must_change_do(serve: Path) -> None:
    changed = write_shares(serve, shares("Enhance"), PRODUCTION)
    assert changed == ["Enhance"]
    before, after = SERVE.splitlines(), serve.read_text().splitlines()
    assert [line for line in after if line not in before] == [
        "        ray_actor_options: {num_cpus: 1, num_gpus: 0.35} # cautious",
        "        user_config: {batch_window_s: 0.0, max_batch_size: 3, budget_px: 999}",
    ]
    assert len(after) == len(before)


def test_comments_and_other_deployments_stay(serve: Path) -> None:
    ours = ("Upscale", "Enhance", "Comic", "Aged", "BackgroundRemove")
    before, other = deployments(serve), deployments(serve, 1)
    write_shares(serve, shares(*ours), PRODUCTION)
    after = deployments(serve)
    for name in ours:
        assert after[name]["ray_actor_options"]["num_gpus"] == 0.35
        assert after[name]["user_config"]["budget_px"] == 999
        assert after[name]["user_config"]["max_batch_size"] == 3
    assert after["Comic"]["user_config"]["digest"] == "0123456789abcdef"
    # The section replaces the application's own, which has model_num_cpus.
    assert after["Upscale"]["ray_actor_options"]["num_cpus"] == 0.5
    assert after["Enhance"]["ray_actor_options"]["num_cpus"] == 1
    assert after["Ingress"] == before["Ingress"]
    assert after["Aged"]["autoscaling_config"] == {"min_replicas": 1}
    assert deployments(serve, 1) == other
    text = serve.read_text()
    comments = re.findall(r"#.*", SERVE)
    assert re.findall(r"#.*", text) == comments
    # Comments stay above what they speak of.
    assert "# no waiting\n          batch_window_s" in text
    assert "# of last week\n          digest" in text
    assert "# one replica, for now\n        autoscaling_config: &one" in text
    assert "# the faces\n      - name: Aged" in text
    assert "\n    import_path:   serve_app.app:build   # the spaces stay\n" in text


@pytest.mark.parametrize("name", ["Upscale", "Enhance", "Aged"])
def test_a_shared_mapping_changes_for_one_deployment_alone(serve: Path, name: str) -> None:
    before = deployments(serve)
    write_shares(serve, shares(name), PRODUCTION)
    after = deployments(serve)
    assert after[name]["user_config"]["budget_px"] == 999
    assert {n: e for n, e in after.items() if n != name} == {
        n: e for n, e in before.items() if n != name
    }
    assert deployments(serve, 1)["Comic"]["user_config"] == before[name]["user_config"]


def test_a_merged_mapping_does_not_leak_either(tmp_path: Path) -> None:
    text = SERVE.replace(
        "      - {name: BackgroundRemove}\n",
        "      - name: BackgroundRemove\n        user_config:\n          <<: *tuning\n"
        "          digest: 0123456789abcdee\n",
    )
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    before = deployments(path)["BackgroundRemove"]
    write_shares(path, shares("Upscale"), PRODUCTION)
    assert deployments(path)["BackgroundRemove"] == before
    write_shares(path, shares("BackgroundRemove", rows=7), PRODUCTION)
    assert deployments(path)["BackgroundRemove"]["user_config"]["max_batch_size"] == 7
    assert deployments(path)["Upscale"]["user_config"]["max_batch_size"] == 3


def test_the_second_write_changes_nothing(serve: Path) -> None:
    assert run("--gpu", "l4", "--config", serve, "--write").exit_code == 0
    once, inode = serve.read_bytes(), serve.stat().st_ino
    done = run("--gpu", "l4", "--config", serve, "--write", "--json")
    assert json.loads(done.stdout)["changed"] == []
    assert serve.read_bytes() == once
    assert serve.stat().st_ino == inode


def test_the_command_writes_what_it_prints(serve: Path) -> None:
    done = run("--gpu", "h200", "--gpus", 1, "--config", serve, "--write", "--json")
    values = json.loads(done.stdout)
    assert set(values["changed"]) == {"Upscale", "Enhance", "Comic", "Aged", "BackgroundRemove"}
    enhance = next(m for m in values["models"] if m["task"] == "enhance")
    written = deployments(serve)["Enhance"]
    assert written["ray_actor_options"]["num_gpus"] == enhance["num_gpus"]
    assert written["user_config"]["budget_px"] == enhance["budget_px"]
    assert written["user_config"]["max_batch_size"] == enhance["max_batch_size"]


def test_line_endings_mode_and_a_symbolic_link_stay(tmp_path: Path) -> None:
    path, link = tmp_path / "real.yaml", tmp_path / "link.yaml"
    path.write_bytes(SERVE.replace("\n", "\r\n").encode())
    path.chmod(0o640)
    link.symlink_to(path)
    write_shares(link, shares("Comic", "Enhance"), PRODUCTION)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert b"\n" not in path.read_bytes().replace(b"\r\n", b"")
    assert deployments(path)["Comic"]["user_config"]["budget_px"] == 999


def test_sequences_without_indentation_are_kept_as_they_are(tmp_path: Path) -> None:
    text = "# top\napplications:\n- import_path: serve_app.app:build\n  args: {models: MODELS}\n"
    text += "  deployments:\n  - name: Comic # c\n  # next\n  - name: Aged\n"
    path = tmp_path / "serve.yaml"
    path.write_text(text.replace("MODELS", str(PRODUCTION)))
    write_shares(path, shares("Comic"), PRODUCTION)
    assert (
        "  - name: Comic # c\n    ray_actor_options: {num_cpus: 0.2, num_gpus: 0.35}\n"
        in path.read_text()
    )
    assert path.read_text().endswith("  # next\n  - name: Aged\n")


BROKEN = {
    "no YAML": "applications: [",
    "a list": "- 1",
    "text": "text",
    "nothing": "",
    "no application of ours": SERVE.replace("serve_app.app:build", "mine:build"),
    "other models": SERVE.replace("production.yaml", "starter.yaml"),
    "no such deployment": SERVE.replace("name: Enhance", "name: Enhanced"),
    "a name twice": SERVE.replace("num_cpus: 1,", "num_gpus: 1,"),
    "another shape": SERVE.replace("{num_cpus: 1,  num_gpus: 0.2}", "[1]"),
    "no UTF-8": b"\xff\xfe",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_file_that_cannot_be_written_is_left_as_it_is(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "serve.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    former = path.read_bytes()
    done = run("--gpu", "l4", "--config", path, "--write")
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    assert path.read_bytes() == former
    assert [entry.name for entry in tmp_path.iterdir()] == ["serve.yaml"]


def test_a_layout_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(SERVE.replace("      models: conf", "           models: conf"))
    former = path.read_text()
    with pytest.raises(ConfigError, match="layout"):
        write_shares(path, shares("Comic"), PRODUCTION)
    assert path.read_text() == former


def test_a_disk_that_fails_leaves_the_file_as_it_is(
    serve: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_shares(serve, shares("Comic"), PRODUCTION)
    assert serve.read_text() == SERVE
    assert [entry.name for entry in serve.parent.iterdir()] == ["serve.yaml"]
