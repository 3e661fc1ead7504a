"""The command finds the address in a Serve config, and says what is wrong with a bad one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cli.config import address_of, clients_of, config_serving
from cli.main import app
from cli.serving import serve_of
from deployments.catalogue import load_catalogue
from deployments.errors import ConfigError
from deployments.settings import ROOT
from deployments.store.lockfile import Lock, load_lock, lock_path, save_lock


def config(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "serve.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("http_options: {host: '::1'}", "http://[::1]:8000"),
        ("applications: []", "http://127.0.0.1:8000"),
        ("http_options:", "http://127.0.0.1:8000"),
        ("http_options: {port: 9000}", "http://127.0.0.1:9000"),
        ("http_options: {host: 10.0.0.7, port: 80}", "http://10.0.0.7:80"),
        ("http_options: {host: 0.0.0.0}", "http://127.0.0.1:8000"),
        ("applications: [{route_prefix: /}]", "http://127.0.0.1:8000"),
        ("applications: [{route_prefix: /imagen}]", "http://127.0.0.1:8000/imagen"),
    ],
)
def test_the_address_is_the_one_a_config_listens_on(
    text: str, address: str, tmp_path: Path
) -> None:
    assert address_of(config(tmp_path, text)) == address


def test_the_address_of_the_projects_own_config_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert address_of(Path("configs/local.yaml")) == "http://127.0.0.1:8000"


BROKEN = [
    "http_options: [",
    "- a list",
    "",
    "just text",
    "http_options: [1]",
    "http_options: text",
    "applications: [text]",
    "applications: 3",
    "http_options: {port: many}",
    "http_options: {port: null}",
    "made: 2026-99-99",
    b"\xff\xfe\x00",
]


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_config_is_a_config_error(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        address_of(config(tmp_path, text))
    assert "serve.yaml" in caught.value.value
    assert caught.value.remedy


def test_a_config_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        address_of(tmp_path / "absent.yaml")


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_config_ends_the_command_with_one_clear_message(
    text: str | bytes, tmp_path: Path
) -> None:
    outcome = CliRunner().invoke(app, ["run", str(config(tmp_path, text))])
    assert outcome.exit_code == 2
    said = " ".join(outcome.output.split())
    unread = text in ("http_options: [", "made: 2026-99-99", b"\xff\xfe\x00")
    assert (
        "The Serve config cannot be read: " if unread else "The file is no Serve config ("
    ) in said
    assert "Traceback" not in outcome.output


OURS = "import_path: serve_app.app:build"
OPEN = "deployments: [{name: Ingress, user_config: {access: {auth: off}}}]"


@pytest.mark.parametrize(
    ("text", "auth"),
    [
        (f"applications: [{{{OURS}}}]", "keys"),
        (f"http_options: {{host: 0.0.0.0}}\napplications: [{{{OURS}}}]", "keys"),
        (
            f"http_options: {{host: 127.0.0.1}}\napplications: [{{{OURS}, {OPEN}}}]",
            "off",
        ),
        ("applications: [{import_path: other:app, args: {access: 3}}]", None),
    ],
)
def test_whether_keys_are_asked_for_is_known_before_the_start(
    text: str, auth: str | None, tmp_path: Path
) -> None:
    clients = clients_of(config(tmp_path, text))
    assert (clients and clients.access.auth) == auth


@pytest.mark.parametrize(
    "options", ["", "http_options: {host: 0.0.0.0}", "http_options: {host: '::'}"]
)
def test_a_service_without_keys_that_others_reach_is_not_started(
    options: str, tmp_path: Path
) -> None:
    text = f"{options}\napplications: [{{{OURS}, {OPEN}}}]"
    outcome = CliRunner().invoke(app, ["run", str(config(tmp_path, text))])
    assert outcome.exit_code == 2
    shown = " ".join(outcome.output.split())
    assert "access.auth is off, and the service listens on" in shown
    assert "Set access.auth to keys" in shown


def test_a_certificate_makes_the_address_https(tmp_path: Path) -> None:
    text = "http_options: {ssl_certfile: a.pem, ssl_keyfile: b.pem}"
    assert address_of(config(tmp_path, text)) == "https://127.0.0.1:8000"


# --serve


LOCAL = ROOT / "configs/local.yaml"
STARTER = Path("configs/models/starter.yaml")


def test_serve_is_repeated_or_has_commas() -> None:
    assert serve_of(None) == {}
    assert serve_of(["upscale=a, b", "comic=c", "upscale=d"]) == {
        "upscale": ["a", "b", "d"],
        "comic": ["c"],
    }


def test_a_config_that_serves_what_it_says_is_run_as_it_is() -> None:
    assert config_serving(LOCAL, {}) is None


def of_two(folder: Path) -> Path:
    """configs/local.yaml with a registry of a second upscaler, of the same files as the first."""
    catalogue, lock = load_catalogue(STARTER), load_lock(STARTER)
    second = catalogue.find("upscale").model_copy(update={"name": "upscale-second"})
    registry = folder / "second.yaml"
    registry.write_text(json.dumps({"models": [second.model_dump(mode="json")]}))
    save_lock(registry, Lock(models={second.name: lock.models["upscale-starter"]}))
    text = LOCAL.read_text(encoding="utf-8")
    return config(folder, text.replace("configs/models/own.yaml", str(registry)))


def test_serve_changes_the_config_and_a_further_model_is_scaled_as_its_task(
    tmp_path: Path,
) -> None:
    names = ["upscale-starter", "upscale-second"]
    changed = config_serving(of_two(tmp_path), {"upscale": names})
    assert changed is not None
    (application,) = changed["applications"]
    assert application["args"]["serve"] == {"upscale": names}
    options = {one["name"]: one for one in application["deployments"]}
    assert options["Upscale"]["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 1}
    assert options["upscale-second"] == options["Upscale"] | {"name": "upscale-second"}


def test_a_task_that_the_config_leaves_out_has_no_options_either(tmp_path: Path) -> None:
    values = yaml.safe_load(Path("configs/local.yaml").read_text(encoding="utf-8"))
    values["applications"][0]["args"]["serve"] = {"generate": None}
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    changed = config_serving(tmp_path / "local.yaml", {})
    assert changed is not None
    names = {one["name"] for one in changed["applications"][0]["deployments"]}
    assert "Comic" in names
    assert "Generate" not in names


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--serve", "upscale=upscale-x4plus"], 2, "no registry knows"),
        (["--serve", "upscale=comic-ghibli"], 2, "that serves comic"),
        (["--serve", "posters=comic-ghibli"], 2, "serve names no task"),
        (["--serve", "upscale"], 2, "--serve takes a task"),
        (["--serve", "background=background-rmbg14"], 8, "forbids commercial use"),
    ],
)
def test_a_mistake_in_serve_ends_imagen_run_before_anything_starts(
    arguments: list[str], code: int, named: str
) -> None:
    done = CliRunner().invoke(app, ["run", *arguments])
    assert done.exit_code == code
    assert named in " ".join(done.output.split())


def test_a_model_without_a_digest_is_not_started(tmp_path: Path) -> None:
    file = of_two(tmp_path)
    lock_path(tmp_path / "second.yaml").unlink()
    done = CliRunner().invoke(app, ["run", str(file), "--serve", "upscale=upscale-second"])
    assert done.exit_code == 2
    assert "imagen models resolve upscale-second" in " ".join(done.output.split())


def test_a_mistake_in_the_configs_own_serve_ends_imagen_run_too(tmp_path: Path) -> None:
    text = LOCAL.read_text(encoding="utf-8").replace("serve: {}", "serve: {comic: nothing}")
    done = CliRunner().invoke(app, ["run", str(config(tmp_path, text))])
    assert done.exit_code == 2
    assert "no registry knows" in " ".join(done.output.split())
