"""`imagen keys`: what it prints, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from deployments.settings import ROOT, KeyLimits
from serve_app.access.keys import KeyFile

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result

DEFAULTS = KeyLimits()


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "new" / "keys.yaml"
    monkeypatch.setenv("IMAGEN_KEYS", str(place))
    return place


def keys(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments])


def as_json(*arguments: str) -> Any:
    done = keys(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_new_key_is_printed_once_and_works(file: Path) -> None:
    done = keys("create", "Ann's laptop")
    token = done.stdout.strip()
    key = KeyFile(file, DEFAULTS).find(token)
    assert (done.exit_code, key and key.name) == (0, "Ann's laptop")
    assert token not in done.stderr
    assert token not in file.read_text()
    assert token not in keys("list").output
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [one.name for one in file.parent.iterdir()] == ["keys.yaml"]


def test_limits_of_a_key_replace_the_defaults_one_by_one(file: Path) -> None:
    made = as_json("create", "a", "--requests-per-s", "0.5", "--queue-share", "0")
    assert made["limits"] == {"requests_per_s": 0.5, "queue_share": 0}
    defaults = KeyLimits(pictures=3)
    key = KeyFile(file, defaults).find(made["token"])
    assert key is not None
    expected = defaults.model_copy(update={"requests_per_s": 0.5, "queue_share": 0})
    assert key.limits == expected


def test_keys_are_listed_and_revoked_and_stay_in_the_list(file: Path) -> None:
    first, second = as_json("create", "first"), as_json("create", "second")
    revoked = as_json("revoke", first["id"])
    assert revoked["revoked"]
    assert as_json("revoke", first["id"]) == revoked, "twice is the same"
    listed = as_json("list")["keys"]
    assert [one["name"] for one in listed] == ["first", "second"]
    assert [bool(one["revoked"]) for one in listed] == [True, False]
    assert "sha256" not in listed[0]
    known = KeyFile(file, DEFAULTS)
    assert known.find(first["token"]) is None
    assert known.find(second["token"]) is not None
    assert "first" in keys("list").stdout


def test_no_file_is_no_keys() -> None:
    assert as_json("list") == {"keys": []}
    assert "There are no keys." in keys("list").stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["revoke", "00000000"], "no key with this id"),
        (["create", ""], "name of the key"),
        (["create", "a\nb"], "name of the key"),
        (["create", "a" * 101], "name of the key"),
        (["create", "a", "--queue-share", "2"], "queue_share"),
        (["create", "a", "--requests-per-s", "0"], "requests_per_s"),
        (["create", "a", "--keys", "/proc/none/keys.yaml"], "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(
    arguments: list[str], word: str, file: Path
) -> None:
    as_json("create", "there before")
    before = file.read_bytes()
    done = keys(*arguments, "--json")
    assert done.exit_code == 2
    assert word in json.loads(done.stdout)["error"]["message"]
    assert "Traceback" not in done.output
    assert file.read_bytes() == before


@pytest.mark.parametrize("text", ["", "keys: [", "keys: [{id: 1}]"])
def test_a_damaged_file_is_never_overwritten(text: str, file: Path) -> None:
    file.parent.mkdir()
    file.write_text(text)
    for command in (["create", "a"], ["list"], ["revoke", "00000000"]):
        done = keys(*command)
        assert done.exit_code == 2
        assert "cannot be read" in done.stderr
    assert file.read_text() == text


def test_keys_made_at_once_are_all_kept(file: Path) -> None:
    making = [
        subprocess.Popen(
            [sys.executable, "-m", "cli.main", "keys", "create", f"client {n}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for n in range(4)
    ]
    tokens = [one.communicate()[0].strip() for one in making]
    known = KeyFile(file, DEFAULTS)
    found = [known.find(token) for token in tokens]
    assert [key and key.name for key in found] == [f"client {n}" for n in range(4)]
