"""The registry names one model per task, and a mistake in it is named before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from deployments.catalogue import load_catalogue, load_registry
from deployments.contract import complete, parse, unused_notes
from deployments.errors import ConfigError, InvalidParameter, LicenceRefused
from deployments.registry import check_defaults
from deployments.settings import ROOT
from deployments.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Callable

STARTER = ROOT / "configs/models/starter.yaml"


def starter() -> dict[str, dict[str, Any]]:
    """The starter models by task, as plain values to spoil."""
    values = yaml.safe_load(STARTER.read_text(encoding="utf-8"))
    return {model["task"]: model for model in values["models"]}


@pytest.fixture
def load(tmp_path: Path) -> Callable[[Any], Any]:
    def load(values: Any) -> Any:
        path = tmp_path / "models.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return load_registry(path)

    return load


def test_the_starter_models_serve_every_task() -> None:
    registry = load_registry(Path("configs/models/starter.yaml"))
    assert set(registry) == set(Task)
    assert all(spec.task == task for task, spec in registry.items())
    assert registry[Task.UPSCALE].scale == 4
    assert registry[Task.COMIC].scale == 1


@pytest.mark.parametrize("path", sorted((ROOT / "configs/models").glob("*.yaml")))
def test_every_registry_in_the_project_loads(path: Path) -> None:
    catalogue = load_catalogue(path)
    tasks = set[Task]() if path.stem == "own" else set(Task)
    assert {model.task for model in catalogue.models} == tasks
    unserved = {Task.GENERATE} if path.stem == "production" else set[Task]()
    assert not tasks or set(catalogue.accepting().served()) == tasks - unserved


def test_what_a_family_reads_is_what_its_tasks_take() -> None:
    for task in Task:
        for family in task.families:
            assert task.parameters(family) <= task.request.model_fields.keys()
    assert Task.UPSCALE.parameters("upscale_gan") == {
        *("output_format", "output_compression", "metadata", "strict"),
        *("scale", "width", "height"),
    }


@pytest.mark.parametrize(
    ("task", "change", "named"),
    [
        ("upscale", {"famly": "img2img"}, "famly: Extra inputs"),
        ("upscale", {"name": "Upscale Starter"}, "name: "),
        ("upscale", {"task": "enlarge"}, "task: "),
        ("upscale", {"family": "stylegan"}, "family stylegan cannot serve"),
        ("upscale", {"licence": None}, "licence: "),
        ("upscale", {"tile_px": 100}, "tile_px: "),
        ("upscale", {"tile_px": 24}, "tile_px: "),
        ("upscale", {"max_batch_size": 0}, "max_batch_size: "),
        ("upscale", {"num_gpus": -1}, "num_gpus: "),
        ("upscale", {"dtype": "int8"}, "dtype: "),
        ("upscale", {"family": "matting"}, "family matting cannot serve the task upscale"),
        ("comic", {"family": "upscale_gan"}, "family upscale_gan cannot serve the task comic"),
        ("upscale", {"attention": "xformers"}, "family upscale_gan has no attention"),
        ("upscale", {"noise": "model"}, "family upscale_gan draws no noise"),
        ("comic", {"noise": "float16"}, "noise: "),
        ("comic", {"buckets": []}, "buckets belong to families img2img and text2img"),
        ("upscale", {"buckets": [[512, 512]]}, "buckets belong to families img2img and text2img"),
        ("comic", {"buckets": [[512, 500]]}, "multiple of 64"),
        ("comic", {"buckets": [[0, 512]]}, "multiple of 64"),
        ("comic", {"buckets": [[-64, 512]]}, "multiple of 64"),
        ("comic", {"buckets": [[512]]}, "buckets.0"),
        ("comic", {"defaults": {"steps": 151}}, "steps: "),
        ("comic", {"defaults": {"steps": 3, "strength": 0.1}}, r"int(3 * 0.1) is 0"),
        ("comic", {"defaults": {"steps": 1}}, r"int(1 * 0.5) is 0"),
        ("comic", {"defaults": {"noise_level": 20}}, "noise_level"),
        ("upscale", {"defaults": {"steps": 20}}, "steps"),
        ("upscale", {"defaults": {"scale": 2}}, "chooses for itself"),
        ("upscale", {"defaults": {"width": 2000}}, "chooses for itself"),
        ("background", {"defaults": {"color": "#000000"}}, "color needs output=color"),
        ("background", {"defaults": {"colour": "#000000"}}, "colour"),
        ("comic", {"ignores": ["steps"]}, "ignores.0: "),
        ("upscale", {"ignores": ["prompt"]}, "family upscale_gan has no prompt to ignore"),
        ("generate", {"ignores": ["prompt"]}, "family text2img has no prompt to ignore"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(
    task: str, change: dict[str, Any], named: str, load: Callable[[Any], Any]
) -> None:
    models = starter()
    models[task] |= change
    with pytest.raises(ConfigError) as caught:
        load({"models": list(models.values())})
    assert named in caught.value.message
    assert "models." in caught.value.message
    assert "models.yaml" in caught.value.message


@pytest.mark.parametrize("key", ["name", "task", "family", "origins", "summary", "commercial"])
def test_a_key_left_out_is_named(key: str, load: Callable[[Any], Any]) -> None:
    models = starter()
    del models["comic"][key]
    with pytest.raises(ConfigError, match=rf"models\.2\.{key}: Field required"):
        load({"models": list(models.values())})


def test_a_task_twice_is_refused(load: Callable[[Any], Any]) -> None:
    models = [*starter().values(), starter()["comic"] | {"name": "comic-two"}]
    with pytest.raises(ConfigError, match="several models for the task comic") as caught:
        load({"models": models})
    assert caught.value.value == "comic-starter, comic-two"
    assert "serving" in caught.value.remedy
    chosen = load({"models": models, "serving": {"comic": "comic-two"}})
    assert chosen[Task.COMIC].name == "comic-two"


def test_a_task_without_a_model_is_not_served(load: Callable[[Any], Any]) -> None:
    models = [model for task, model in starter().items() if task != "aged"]
    assert set(load({"models": models})) == set(Task) - {Task.AGED}


def test_a_registry_that_serves_nothing_is_refused(load: Callable[[Any], Any]) -> None:
    with pytest.raises(ConfigError, match="serves no task"):
        load({"models": []})


def test_a_non_commercial_model_is_served_only_if_accepted_by_name(
    load: Callable[[Any], Any],
) -> None:
    models = [m | {"commercial": m["task"] != "comic"} for m in starter().values()]
    with pytest.raises(LicenceRefused, match="comic-starter") as caught:
        load({"models": models})
    assert "accept_noncommercial: [comic-starter]" in caught.value.remedy
    assert load({"models": models, "accept_noncommercial": ["comic-starter"]})
    with pytest.raises(ConfigError, match="names no model"):
        load({"models": models, "accept_noncommercial": ["comic-startr"]})


@pytest.mark.parametrize(
    ("origin", "named"),
    [
        ({"source": "file://x", "files": ["../secret"]}, "plain relative path"),
        ({"source": "file://x", "files": ["/etc/passwd"]}, "plain relative path"),
        ({"source": "file://x", "files": ["a/./b"]}, "plain relative path"),
        ({"source": "file://x", "files": ["manifest.json"]}, "store's own"),
        ({"source": "file://x", "files": []}, "at least 1"),
        ({"source": "file://x", "files": ["a.json"], "into": "../x"}, "plain relative path"),
        ({"source": "file://x", "files": ["model.pth"]}, "pickle"),
        ({"source": "file://x", "files": ["unet/weights.bin"]}, "pickle"),
        ({"source": "hf://a/b@main", "files": ["a.json"]}, "40 hex digits"),
        ({"source": "ftp://host/x", "files": ["a.json"]}, "ftp"),
    ],
)
def test_an_origin_that_cannot_be_trusted_is_refused(
    origin: dict[str, Any], named: str, load: Callable[[Any], Any]
) -> None:
    models = starter()
    models["comic"]["origins"] = [origin]
    with pytest.raises(ConfigError, match=named):
        load({"models": list(models.values())})


@pytest.mark.parametrize("values", [None, [], "models", {}, {"models": {}}, {"modles": []}])
def test_a_file_of_another_shape_is_refused(values: Any, load: Callable[[Any], Any]) -> None:
    with pytest.raises(ConfigError, match=r"models\.yaml is wrong"):
        load(values)


@pytest.mark.parametrize(
    "content",
    [
        b"models: [",
        b"models: \xff\xfe",
        b"models: !!python/object:os.system {}",
        b"models: &a [*b]",
        b"made: 2026-99-99",
    ],
)
def test_what_is_no_yaml_is_refused_with_its_place(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        load_registry(path)
    assert caught.value.value == str(path)[:200]


def test_a_file_that_is_not_there_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file") as caught:
        load_registry(tmp_path / "absent.yaml")
    assert "absent.yaml" in caught.value.value


def test_production_sizes_are_accepted(load: Callable[[Any], Any]) -> None:
    models = starter()
    models["upscale"] |= {
        "family": "upscale_diffusion",
        "dtype": "float16",
        "variant": "fp16",
        "attention": "xformers",
        "num_gpus": 0.25,
        "defaults": {"noise_level": 350, "steps": 75},
    }
    spec = load({"models": list(models.values())})[Task.UPSCALE]
    assert "noise_level" in spec.parameters
    assert spec.scale == 4


def test_a_prompt_that_a_model_ignores_is_the_models_own() -> None:
    spec = load_registry(STARTER)[Task.COMIC]
    sent = parse(spec.task.request, {"prompt": "a dog", "steps": "8"})
    done = complete(sent, spec.defaults, spec.parameters)
    assert (done.prompt, done.steps) == ("comic style", 8)
    assert [note.text for note in unused_notes(sent, spec.parameters)] == [
        "The model behind comic does not read prompt."
    ]
    strict = sent.model_copy(update={"strict": True})
    with pytest.raises(InvalidParameter, match="does not read prompt"):
        complete(strict, spec.defaults, spec.parameters)


def test_new_defaults_of_a_running_model_are_held_to_the_contract() -> None:
    spec = load_registry(STARTER)[Task.COMIC]
    check_defaults(spec, {"steps": 150})
    with pytest.raises(ValueError, match="steps: Input should be less than or equal to 150"):
        check_defaults(spec, {"steps": 151})
    with pytest.raises(ValueError, match="noise_level"):
        check_defaults(spec, {"noise_level": 1})
    with pytest.raises(ValueError, match="output_format"):
        check_defaults(spec, {"output_format": "webp"})
