"""`imagen plan`: the table, the JSON object and the fragment of a Serve config."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from typer.testing import CliRunner, Result

from cli import plan as plan_module
from cli.main import app
from deployments.gpu.profiles import Gpu
from deployments.settings import Settings, Tuning
from deployments.tasks import Task


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, args)])


# -------------------------------------------------------------------------------------- printed


@pytest.mark.parametrize("gpu", ["l4", "t4", "h200", "L4", "A100-40"])
def test_the_five_are_planned_without_naming_them(gpu: str) -> None:
    done = run("--gpu", gpu)
    assert done.exit_code == 0, done.output
    for name in ("upscale-sd-x4", "enhance-sdxl-refiner", "comic-ghibli", "aged-sd21"):
        assert name in done.stdout
    assert (
        "background-rmbg14 is planned, but the registry does not accept its licence" in done.stderr
    )


def test_every_figure_of_an_estimate_is_marked_as_one() -> None:
    lines = run("--gpu", "a100-40").stdout.splitlines()  # a GPU type without measurements
    table = next(line for line in lines if "comic-ghibli" in line)
    assert len(re.findall(r"\d GiB", table)) == len(re.findall(r"~\d+\.\d\d GiB", table)) == 6
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
    ("args", "code", "message"),
    [
        (["--gpu", "t4", "--gpus", "1"], 9, "Give --gpus"),
        (["--gpu", "v100"], 2, "Known: t4"),
        (["--gpu", "l4", "nothing"], 2, "No such model"),
        (["--gpu", "l4", "whisper-large-v3-ct2"], 2, "Artefacts"),
        (["--gpu", "l4", "--models", "configs/models/starter.yaml"], 2, "make profile-gpu"),
        (["--gpu", "l4", "--gpus", "0"], 2, ""),
        ([], 2, "--gpu"),
    ],
)
def test_what_cannot_be_planned_ends_with_its_code_and_a_remedy(
    args: list[str], code: int, message: str
) -> None:
    done = run(*args)
    assert done.exit_code == code
    assert message in done.stderr
    if code == 9:
        error = json.loads(run(*args, "--json").stdout)
        assert error["exit_code"] == 9
        assert error["error"]["code"] == "gpu_too_small"


# ------------------------------------------------------------------- the Serve config's fragment


@pytest.mark.parametrize("gpus", [[], ["--gpus", "1"]])
def test_the_fragment_to_paste_is_the_plan(gpus: list[str]) -> None:
    shown = run("--gpu", "h200", *gpus).stdout
    values = json.loads(run("--gpu", "h200", *gpus, "--json").stdout)
    fragment = yaml.safe_load(shown[shown.index("\ndeployments:") :])
    assert fragment["deployments"] == values["deployments"]
    planned = {model["task"]: model for model in values["models"]}
    assert {Task(task).deployment for task in planned} == {e["name"] for e in values["deployments"]}
    for task, model in planned.items():
        entry = next(e for e in values["deployments"] if e["name"] == Task(task).deployment)
        assert entry["ray_actor_options"]["num_gpus"] == model["num_gpus"]
        # The section replaces the application's own, which has the CPUs.
        assert entry["ray_actor_options"]["num_cpus"] == Settings().model_num_cpus
        tuning = Tuning.model_validate(entry["user_config"])
        assert (tuning.max_batch_size, tuning.budget_px) == (
            model["max_batch_size"],
            model["budget_px"],
        )


@pytest.mark.parametrize(
    "arguments",
    [
        ("upscale-sd-x4", "upscale-realesrgan-x4plus", "comic", "aged", "enhance", "background"),
        ("--serve", "upscale=upscale-sd-x4,upscale-realesrgan-x4plus"),
    ],
)
def test_a_further_model_of_a_task_is_planned_under_its_own_name(arguments: list[str]) -> None:
    values = json.loads(run("--gpu", "h200", *arguments, "--json").stdout)
    entries = {entry["name"]: entry for entry in values["deployments"]}
    planned = {Task(model["task"]).deployment for model in values["models"]}
    assert set(entries) == {*planned, "upscale-realesrgan-x4plus"}
    assert entries["upscale-realesrgan-x4plus"]["ray_actor_options"]["num_gpus"] > 0


@pytest.mark.parametrize(
    "serve", ["upscale", "upscale=", "upscale=nothing", "upscale=comic-ghibli", "up=upscale-sd-x4"]
)
def test_a_mistake_in_serve_ends_the_plan(serve: str) -> None:
    assert run("--gpu", "h200", "--serve", serve).exit_code == 2


# ------------------------------------------------------------------------------ the card at hand


def test_without_a_gpu_one_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run()
    assert done.exit_code == 2
    assert "--gpu l4" in done.stderr


def test_the_card_at_hand_gets_what_fits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Gpu("my-card", "My card", 12 * 2**30, "")
    monkeypatch.setattr(plan_module, "gpus_at_hand", lambda: (card, 1))
    done = run("--json")
    assert done.exit_code == 0, done.stderr
    assert "enhance-sdxl-refiner does not fit beside the others: it is left out." in done.stderr
    assert "upscale-sd-x4 does not fit beside the others: upscale-real" in done.stderr
    values = json.loads(done.stdout)
    assert values["gpu"] == "my-card"
    assert sum(model["num_gpus"] for model in values["models"]) <= 1
    named = run("upscale-sd-x4", "enhance-sdxl-refiner", "aged-sd21", "comic-ghibli")
    assert named.exit_code == 9, "what is named is wanted as it is"
