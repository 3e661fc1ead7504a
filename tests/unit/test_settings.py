"""A typo in a configuration file is named, and no model hub is ever asked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import ConfigError
from deployments.settings import (
    ROOT,
    ClientSettings,
    Settings,
    StoreSettings,
    Tuning,
    enforce_offline,
    parse_settings,
    resolve,
)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"devise": "cpu"}, "devise: Extra inputs"),
        ({"device": "tpu"}, "device: "),
        ({"torch_threads": 0}, "torch_threads: "),
        ({"pixel_threads": 65}, "pixel_threads: "),
        ({"jobs": {"keep_s": 0}}, "jobs.keep_s: "),
        ({"store": None}, "store: "),
        ([], "the file: "),
        (None, "the file: "),
        ("cpu", "the file: "),
    ],
)
def test_a_wrong_setting_is_named_with_its_file(values: Any, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(Settings, values, "The config x.yaml")
    assert str(caught.value).startswith("The config x.yaml is wrong: ")
    assert named in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"request_timeout_s": 0}, "request_timeout_s: "),
        ({"retry_after_s": 0}, "retry_after_s: "),
        ({"limits": {"max_body_byte": 1}}, "limits.max_body_byte: Extra inputs"),
        ({"limits": {"max_input_px": 0}}, "limits.max_input_px: "),
        ({"limits": {"max_input_px": 2**31}}, "limits.max_input_px: "),
        ({"limits": None}, "limits: "),
        ({"uploads": {"max_held_bytes": 1024}}, "uploads.max_held_bytes must not be below limits"),
        (
            {
                "grpc": {"enabled": True},
                "limits": {"max_body_bytes": 1024},
                "uploads": {"max_held_bytes": 2047},
            },
            "must not be below twice limits.max_body_bytes",
        ),
        # Beyond this Serve would refuse first, in plain text.
        ({"max_uploads": 9000}, "is 10500, above 10000"),
    ],
)
def test_what_clients_may_do_has_bounds(values: Any, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(ClientSettings, values, "The user_config")
    assert named in caught.value.message


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"limits": {}}, "limits: "),
        ({"access": {"auth": "off"}, "request_timeout_s": 9}, "access, request_timeout_s: "),
        ({"jobs": {"max_queued": 5, "keep_s": 60}}, "jobs.max_queued: "),
    ],
)
def test_the_former_place_of_a_setting_is_refused_with_the_new_one(args: Any, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(Settings, args, "args")
    assert named in caught.value.message
    assert "is in the user_config of the deployment Ingress" in caught.value.message


def test_every_wrong_setting_is_named_at_once() -> None:
    values = {"batch_window_s": -1, "max_batch_size": 0, "windou": 1}
    with pytest.raises(ConfigError, match=r"batch_window_s.*max_batch_size.*windou"):
        parse_settings(Tuning, values, "user_config")


def test_settings_may_all_be_left_out() -> None:
    assert parse_settings(Settings, {}, "here") == Settings()
    assert parse_settings(Tuning, {}, "here") == Tuning()
    assert parse_settings(ClientSettings, {}, "here") == ClientSettings()


@pytest.mark.parametrize("kind", [Settings, Tuning, ClientSettings])
def test_settings_cannot_be_changed(kind: type[Settings | Tuning | ClientSettings]) -> None:
    for name in kind.model_fields:
        with pytest.raises(ValueError, match="frozen"):
            setattr(kind(), name, 1)


def test_relative_paths_count_from_the_project_wherever_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(Path("configs/local.yaml")) == ROOT / "configs/local.yaml"
    assert resolve(Path("configs/local.yaml")).is_file()
    assert resolve(tmp_path / "other.yaml") == tmp_path / "other.yaml"


def test_no_model_hub_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
    caches = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE")
    for name in (*offline, *caches, "XDG_CACHE_HOME", "HF_TOKEN"):
        monkeypatch.setenv(name, "as the user had it")
    enforce_offline()
    assert [os.environ[name] for name in offline] == ["1", "1", "1"]
    assert "HF_TOKEN" not in os.environ
    for name in caches:
        assert Path(os.environ[name]).is_absolute()
        assert not Path(os.environ[name]).exists()


def test_the_store_lies_below_an_absolute_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("IMAGEN_MODELS")
        else:
            monkeypatch.setenv("IMAGEN_MODELS", unset)
        assert StoreSettings().folder == tmp_path / ".cache/imagen-models"
    monkeypatch.setenv("IMAGEN_MODELS", "~/models")
    assert StoreSettings().folder == tmp_path / "models"
    assert StoreSettings(root=Path("~/other")).folder == tmp_path / "other"
    assert StoreSettings(root=Path("other")).folder == ROOT / "other"


def test_a_store_relative_to_wherever_one_stands_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IMAGEN_MODELS", "models")
    with pytest.raises(ConfigError, match="relative") as caught:
        _ = StoreSettings().folder
    assert "absolute path" in caught.value.remedy


def test_a_user_without_a_home_is_told_to_name_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "IMAGEN_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 54321)  # of no passwd entry
    with pytest.raises(ConfigError) as caught:
        _ = StoreSettings().folder
    assert "Set IMAGEN_MODELS" in caught.value.remedy
