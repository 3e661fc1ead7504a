"""Registry files load together, and `serve` says which of their models run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from deployments.catalogue import Catalogue, Registry, load_catalogue, load_registry
from deployments.errors import ConfigError, InvalidParameter, LicenceRefused
from deployments.settings import Settings, parse_settings
from deployments.store.lockfile import load_lock
from deployments.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STARTER = Path("configs/models/starter.yaml")
PRODUCTION = Path("configs/models/production.yaml")
STARTED = list(load_registry(STARTER))
"""Tasks that have a starter model; others are not served."""
X4PLUS = "upscale-realesrgan-x4plus"


@pytest.fixture(scope="module")
def both() -> Catalogue:
    return load_catalogue(STARTER, PRODUCTION)


def named(registry: Registry) -> dict[str, list[str]]:
    return {str(task): [model.name for model in registry.of(task)] for task in registry}


def test_the_first_file_with_a_model_for_a_task_decides_its_default(both: Catalogue) -> None:
    starters = {str(task): [f"{task}-starter"] for task in STARTED}
    assert named(both.served()) == starters
    assert both.find("upscale").name == "upscale-starter"
    assert both.find(X4PLUS) in both.models
    defaults = [entry.name for entry in both.entries if both.is_default(entry)]
    assert defaults == [f"{task}-starter" for task in STARTED]
    production = load_catalogue(PRODUCTION, STARTER).accepting().served()
    assert production[Task.UPSCALE].name == "upscale-sd-x4"  # by `serving` in that file
    assert production[Task.COMIC].name == "comic-ghibli"
    assert Task.GENERATE not in production, "whose default is null in that file"


def test_each_entry_keeps_its_file_and_its_lock(both: Catalogue) -> None:
    assert both.file_of(both.find("comic-starter")) == STARTER
    assert both.accepting().file_of(both.find(X4PLUS)) == PRODUCTION
    assert load_lock(STARTER, PRODUCTION).models.keys() == {entry.name for entry in both.entries}


def test_a_catalogue_of_few_tasks_serves_them(tmp_path: Path) -> None:
    values = yaml.safe_load(PRODUCTION.read_text(encoding="utf-8"))
    values["models"] = [one for one in values["models"] if one["task"] == "upscale"]
    del values["serving"]["background"]
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert named(load_registry(tmp_path / "one.yaml")) == {"upscale": ["upscale-sd-x4"]}


def test_no_later_file_decides_what_an_earlier_one_leaves_open(tmp_path: Path) -> None:
    values = yaml.safe_load(PRODUCTION.read_text(encoding="utf-8"))
    del values["serving"]["upscale"]
    (tmp_path / "open.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    catalogue = load_catalogue(tmp_path / "open.yaml", STARTER).accepting()
    with pytest.raises(ConfigError, match="several models for the task upscale"):
        catalogue.served()
    assert catalogue.served({"upscale": [X4PLUS]})[Task.UPSCALE].name == X4PLUS


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    copy = tmp_path / "copy.yaml"
    copy.write_text(STARTER.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"copy\.yaml is wrong.*twice: aged-starter"):
        load_catalogue(STARTER, copy)


def test_serve_says_which_models_run_and_the_rest_keep_their_default(both: Catalogue) -> None:
    registry = both.served({"upscale": [X4PLUS, "upscale-starter", X4PLUS]})
    assert named(registry)["upscale"] == [X4PLUS, "upscale-starter"]
    assert registry[Task.UPSCALE].name == X4PLUS
    assert [model.name for model in registry.models if model.task != Task.UPSCALE] == [
        f"{task}-starter" for task in STARTED if task != Task.UPSCALE
    ]


@pytest.mark.parametrize(
    ("serve", "fact", "remedy"),
    [
        ({"upscale": ["upscale-x4plus"]}, "no registry knows", X4PLUS),
        ({"upscale": ["comic-ghibli"]}, "that serves comic", X4PLUS),
        ({"upscale": ["upscale-starter", "whisper-large-v3-ct2"]}, "no registry knows", X4PLUS),
        ({"upscaling": [X4PLUS]}, "serve names no task", "upscale, enhance"),
    ],
)
def test_a_mistake_in_serve_is_named(
    serve: dict[str, Sequence[str]], fact: str, remedy: str, both: Catalogue
) -> None:
    with pytest.raises(ConfigError, match=fact) as caught:
        both.served(serve)
    assert remedy in caught.value.remedy
    assert caught.value.value in {*serve, *serve[next(iter(serve))]}


def test_a_further_model_needs_a_licence_too(both: Catalogue) -> None:
    with pytest.raises(LicenceRefused, match="background-rmbg14"):
        both.served({"background": ["background-starter", "background-rmbg14"]})


def test_a_default_has_its_tasks_deployment_and_a_further_model_its_own(both: Catalogue) -> None:
    registry = both.served({"upscale": ["upscale-starter", X4PLUS]})
    deployments = [registry.deployment(model) for model in registry.models]
    assert deployments[:4] == ["Upscale", X4PLUS, "Enhance", "Comic"]
    assert deployments[4:] == ["Aged", "BackgroundRemove", "Generate"]


def test_a_request_chooses_by_name(both: Catalogue) -> None:
    registry = both.served({"upscale": ["upscale-starter", X4PLUS]})
    assert registry.choose(Task.UPSCALE).name == "upscale-starter"
    assert registry.choose(Task.UPSCALE, X4PLUS).name == X4PLUS


@pytest.mark.parametrize(
    ("name", "fact", "remedy"),
    [
        ("nothing", "There is no such model for upscale.", ""),
        ("comic-starter", "comic-starter serves comic, not upscale.", ""),
        (
            "upscale-sd-x4",
            "upscale-sd-x4 is known here, but it is not served.",
            "`imagen run --serve upscale=upscale-starter,upscale-sd-x4`",
        ),
    ],
)
def test_a_model_that_is_not_served_is_refused_with_the_way_to_it(
    name: str, fact: str, remedy: str, both: Catalogue
) -> None:
    with pytest.raises(InvalidParameter) as caught:
        both.served().choose(Task.UPSCALE, name)
    assert (caught.value.message, caught.value.value) == (fact, name)
    assert caught.value.remedy.startswith("Send one of: upscale-starter.")
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("name", [None, "generate-gone"])
def test_a_task_that_no_model_serves_is_refused_with_the_way_to_one(
    name: str | None, both: Catalogue
) -> None:
    with pytest.raises(InvalidParameter, match="No model serves the task generate here") as caught:
        both.served({"generate": None}).choose(Task.GENERATE, name)
    assert "Served: upscale, " in caught.value.remedy
    assert "`imagen run --serve generate=NAME`" in caught.value.remedy


def test_a_production_model_can_run_on_a_machine_without_a_gpu(both: Catalogue) -> None:
    (model,) = both.served({"upscale": [X4PLUS]}).on_cpu().of(Task.UPSCALE)
    assert (model.num_gpus, model.dtype) == (0, "float32")


@pytest.mark.parametrize("names", ["a,b", "a, b", ["a", "b"]])
def test_names_are_a_list_or_have_commas(names: Any) -> None:
    settings = parse_settings(Settings, {"serve": {"upscale": names}}, "args")
    assert settings.serve == {"upscale": ("a", "b")}


@pytest.mark.parametrize("serve", [{"upscale": []}, ["upscale"]])
def test_a_task_is_not_served_by_nothing(serve: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError, match="serve"):
        parse_settings(Settings, {"serve": serve}, "args")


def test_one_registry_needs_no_list() -> None:
    assert parse_settings(Settings, {"models": str(STARTER)}, "args").models == (STARTER,)
