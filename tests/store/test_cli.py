"""`imagen models`: what it prints, what it does, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from cli import console
from cli.main import app
from cli.models import bring, session, show
from deployments.settings import ROOT, framework_caches
from deployments.store import locks
from deployments.store.cache import Store
from deployments.store.events import Event
from deployments.store.gc import make_room
from deployments.store.lockfile import load_lock
from tests.store.common import KIB, random_files, settings_of, staged, write_files

IMAGEN = [sys.executable, "-m", "cli.main"]


class Operator:
    """A registry of three entries, and the command."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.root = tmp_path / "models"
        self.registry = tmp_path / "registry.yaml"
        self.store = Store(settings_of(self.root))
        self.entries = [
            self._entry("first", 1, task="upscale", family="upscale_gan"),
            self._entry("second", 2),
            self._entry("third", 3, licence="CC-BY-NC-4.0", commercial=False),
        ]
        self.write()

    def _entry(self, name: str, seed: int, **changes: Any) -> dict[str, Any]:
        files = random_files(seed)
        origin = write_files(self.tmp_path / "origins" / name, files)
        values = {"name": name, "summary": f"The {name}", "licence": "MIT", "commercial": True}
        return values | {
            "origins": [{"source": f"file://{origin}", "files": sorted(files)}],
            **changes,
        }

    def write(self, **more: Any) -> None:
        models = [e for e in self.entries if "task" in e]
        artefacts = [e for e in self.entries if "task" not in e]
        values = {"models": models, "artefacts": artefacts, **more}
        self.registry.write_text(yaml.safe_dump(values))

    def resolve(self) -> None:
        assert self("resolve", "--all").exit_code == 0

    def arguments(self, command: str, *arguments: str) -> list[str]:
        options = ["--store", str(self.root)]
        if command != "where":
            options += ["--registry", str(self.registry)]
        return ["models", command, *arguments, *options]

    def __call__(self, command: str, *arguments: str) -> Result:
        outcome = CliRunner().invoke(app, self.arguments(command, *arguments))
        if outcome.exception and not isinstance(outcome.exception, SystemExit):
            raise outcome.exception
        return outcome

    def json(self, command: str, *arguments: str, code: int = 0) -> Any:
        outcome = self(command, *arguments, "--json")
        assert outcome.exit_code == code, outcome.output
        return json.loads(outcome.stdout)

    def digest(self, name: str) -> str:
        return load_lock(self.registry).models[name].digest

    def damage(self, name: str) -> None:
        path = self.store.folder(name, self.digest(name)) / "model_index.json"
        path.chmod(0o644)
        path.write_bytes(b'{"a": 2}\n')


@pytest.fixture
def bare(tmp_path: Path) -> Operator:
    """With nothing looked up yet."""
    return Operator(tmp_path)


@pytest.fixture
def operator(bare: Operator) -> Operator:
    bare.resolve()
    return bare


def limit(monkeypatch: pytest.MonkeyPatch, **limits: Any) -> None:
    """Give the store of every command these settings."""
    plain = session.store_settings
    limited = lambda *a, **more: plain(*a, **more).model_copy(update=limits)  # noqa: E731
    monkeypatch.setattr(session, "store_settings", limited)


def status(values: Any) -> dict[str, str]:
    return {row["name"]: row["status"] for row in values["models"]}


def squeeze(text: str) -> str:
    return " ".join(text.split())


# What there is


def test_list_shows_what_is_in_the_store(operator: Operator) -> None:
    operator("pull", "first", "second")
    operator.damage("second")
    (operator.store.folder("second", operator.digest("second")) / "model_index.json").write_text("")
    rows = {row["name"]: row for row in operator.json("list")["models"]}
    assert {name: row["in_store"] for name, row in rows.items()} == {
        "first": "yes",
        "second": "damaged",
        "third": "no",
    }
    assert rows["first"]["task"] == "upscale"
    assert rows["second"]["task"] is None
    assert rows["third"]["commercial"] is False
    assert rows["third"]["bytes"] == sum(map(len, random_files(3).values()))
    text = operator("list").stdout
    for name in rows:
        assert f"{name} " in text
        assert operator.digest(name)[:16] in text


def test_list_says_what_is_unresolved(bare: Operator) -> None:
    row = bare.json("list")["models"][0]
    assert (row["digest"], row["bytes"], row["in_store"]) == (None, None, "no")
    assert bare("list").stdout.count("unresolved") == 6


def test_list_shows_another_digest_in_the_store(operator: Operator) -> None:
    operator("pull", "first")
    old = operator.digest("first")
    (operator.tmp_path / "origins" / "first" / "model_index.json").write_text("{}")
    operator.registry.with_suffix(".lock.json").unlink()
    operator.resolve()
    row = operator.json("list")["models"][0]
    assert (row["in_store"], row["stored"]) == ("other", [old[:16]])
    assert old[:16] in operator("list").stdout


def test_info_shows_every_file_uncut_on_any_terminal(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = operator.json("info", "first")
    assert values["family"] == "upscale_gan"
    assert values["digest"] == operator.digest("first")
    (origin,) = values["origins"]
    assert [f["path"] for f in origin["files"]] == sorted(random_files())
    monkeypatch.setenv("COLUMNS", "40")
    text = operator("info", "first").stdout
    assert all(f["sha256"] in text for f in origin["files"])


def test_a_model_may_be_named_by_its_task(operator: Operator, tmp_path: Path) -> None:
    assert operator.json("info", "upscale")["name"] == "first"
    for command in ("resolve", "pull", "verify", "clear"):
        rows = operator.json(command, "upscale", "Upscale", "first")["models"]
        assert [row["name"] for row in rows] == ["first"], command
    target = f"file://{tmp_path / 'mirror'}"
    published = operator.json("publish", "upscale", target, "--no-smoke")
    assert published["url"].startswith(f"{target}/first/")


def test_where_says_place_and_room(operator: Operator) -> None:
    values = operator.json("where")
    assert values["store"] == str(operator.root)
    assert values["exists"] is False
    assert 0 < values["free_bytes"] <= values["total_bytes"]
    assert "not made yet" in operator("where").stdout


def test_where_warns_of_a_network_file_system(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(show, "network_filesystem", lambda _: "nfs4")
    outcome = operator("where")
    assert "network file system (nfs4)" in outcome.stderr
    assert operator.json("where")["network"] is True


def test_where_env_is_for_the_shell(bare: Operator, tmp_path: Path) -> None:
    bare.root = tmp_path / "a b"
    lines = bare("where", "--env").stdout
    script = f"{lines}\nenv"
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=True)
    for name, value in framework_caches(bare.root).items():
        assert f"{name}={value}\n" in done.stdout


def test_the_root_is_that_of_the_environment(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("IMAGEN_MODELS", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("IMAGEN_REGISTRY", str(operator.registry))
    outcome = CliRunner().invoke(app, ["models", "pull", "first"])
    assert outcome.exit_code == 0
    assert (tmp_path / "elsewhere" / "store" / "first").is_dir()


def test_relative_paths_are_the_users(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(operator.tmp_path)
    command = ["models", "pull", "first", "--registry", "registry.yaml", "--store", "here"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert (operator.tmp_path / "here" / "store" / "first").is_dir()


def test_a_relative_root_of_the_environment_ends_with_2(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEN_MODELS", "here")
    command = ["models", "pull", "first", "--registry", str(operator.registry)]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 2
    assert "Give an absolute path" in squeeze(outcome.stderr)


def test_an_empty_root_is_not_the_current_folder(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(operator.tmp_path)
    command = ["models", "pull", "first", "--registry", str(operator.registry), "--store", ""]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 2
    assert "it is empty" in outcome.stderr
    assert not (operator.tmp_path / "store").exists()


# Resolving


def test_resolve_writes_the_lock_file(bare: Operator) -> None:
    values = bare.json("resolve", "--all")
    assert set(status(values).values()) == {"resolved"}
    assert [row["digest"] for row in values["models"]] == [
        bare.digest(name) for name in ("first", "second", "third")
    ]
    assert set(status(bare.json("resolve", "--all")).values()) == {"unchanged"}


def test_resolve_keeps_what_it_found_before_a_failure(bare: Operator) -> None:
    (bare.tmp_path / "origins" / "second" / "model_index.json").unlink()
    values = bare.json("resolve", "--all", code=7)
    assert status(values) == {"first": "resolved", "second": "failed", "third": "resolved"}
    assert set(load_lock(bare.registry).models) == {"first", "third"}


@pytest.mark.parametrize("count", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_processes_that_resolve_at_once_keep_each_others_entries(
    bare: Operator, count: int
) -> None:
    names = [f"m{i}{j}" for i in range(count) for j in range(10)]
    bare.entries = [{**bare.entries[1], "name": name} for name in names]
    bare.write()
    script = (
        "import sys\n"
        "from deployments.store import resolve\n"
        "from cli.main import app\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "app(sys.argv[1:])\n"
    )
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                script,
                *bare.arguments("resolve", *names[i * 10 : i * 10 + 10]),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for i in range(count)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in started:
        process.communicate()
    assert [process.returncode for process in started] == [0] * count
    assert sorted(load_lock(bare.registry).models) == names
    assert not list(bare.tmp_path.glob("*.new"))


# Pulling


def test_a_dry_run_says_what_it_would_do_and_does_nothing(operator: Operator) -> None:
    operator("pull", "first")
    before = sorted(operator.root.rglob("*"))
    values = operator.json("pull", "first", "second", "--dry-run")
    assert status(values) == {"first": "present", "second": "to pull"}
    size = sum(map(len, random_files(2).values()))
    assert values["bytes_to_pull"] == size
    second = values["models"][1]
    assert (second["files"], second["bytes"]) == (4, size)
    assert second["sources"] == [f"file://{operator.tmp_path}/origins/second"]
    text = squeeze(operator("pull", "first", "second", "--dry-run").stdout)
    assert "already there" in text
    assert f"({size} bytes)" in text
    assert sorted(operator.root.rglob("*")) == before


def test_a_dry_run_says_what_cannot_be_pulled(operator: Operator) -> None:
    values = operator.json("pull", "third", "--dry-run", code=8)
    assert status(values) == {"third": "failed"}


def test_pull_brings_models_and_finds_them_again(operator: Operator) -> None:
    values = operator.json("pull", "first", "second")
    assert status(values) == {"first": "pulled", "second": "pulled"}
    for row in values["models"]:
        assert Path(row["folder"]) == operator.store.folder(row["name"], row["digest"])
        assert row["fetched_bytes"] > 300 * KIB
        operator.store.check(row["name"], row["digest"], "full")
    assert set(status(operator.json("pull", "first", "second")).values()) == {"present"}


def test_pull_heals_a_damaged_folder(operator: Operator) -> None:
    operator("pull", "first")
    operator.damage("first")
    outcome = operator("pull", "first", "--json")
    assert status(json.loads(outcome.stdout)) == {"first": "pulled"}
    assert "Quarantined the damaged folder" in outcome.stderr
    operator.store.check("first", operator.digest("first"), "full")


def test_one_failure_does_not_stop_the_others_and_the_first_gives_the_code(
    operator: Operator,
) -> None:
    (operator.tmp_path / "origins" / "first" / "model_index.json").unlink()
    outcome = operator("pull", "--all", "--json")
    values = json.loads(outcome.stdout)
    assert outcome.exit_code == values["exit_code"] == 7
    assert status(values) == {"first": "failed", "second": "pulled", "third": "failed"}
    assert [row["error"]["exit_code"] for row in values["models"] if "error" in row] == [7, 8]
    assert "first: A file of the source cannot be read" in outcome.stderr
    assert "2 of 3 failed." in outcome.stderr
    assert operator("pull", "third", "first").exit_code == 8


def test_an_accepted_licence_is_pulled(operator: Operator) -> None:
    operator.write(accept_noncommercial=["third"])
    assert status(operator.json("pull", "third")) == {"third": "pulled"}


def test_an_unresolved_model_is_not_pulled(bare: Operator) -> None:
    values = bare.json("pull", "first", code=2)
    assert "imagen models resolve first" in values["models"][0]["error"]["remedy"]


def test_a_held_lock_times_out(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    operator("pull", "second")
    limit(monkeypatch, lock_timeout_s=0)
    path = operator.store.lock_path(operator.digest("first"))
    with locks.exclusive(path, "another pull", 0):
        values = operator.json("pull", "first", code=6)
    assert f"pid {os.getpid()}" in values["models"][0]["error"]["message"]


def test_a_model_that_does_not_fit_is_refused(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.store.staging._HEADROOM_SHARE", 2.0)
    monkeypatch.setattr("deployments.store.staging._HEADROOM_BYTES", 2**60)
    values = operator.json("pull", "first", code=5)
    assert "imagen models gc" in values["models"][0]["error"]["remedy"]


def test_room_is_made_before_a_pull(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(operator.root / "store" / "gone" / ("1" * 16), {"a": b"12345"})
    full = partial(make_room, used=lambda _: 99.0)
    monkeypatch.setattr(bring, "make_room", full)
    outcome = operator("pull", "first")
    assert outcome.exit_code == 0
    assert f"removed gone@{'1' * 16}: 5 bytes" in outcome.stderr
    write_files(operator.root / "store" / "gone" / ("1" * 16), {"a": b"12345"})
    operator("pull", "first")
    assert ("gone", "1" * 16) in operator.store.models(), "nothing had to be pulled"


def test_without_a_terminal_progress_comes_as_lines(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_LINE_S", 0.05)
    limit(monkeypatch, max_bytes_per_s=300_000)
    outcome = operator("pull", "first", "--json")
    assert re.search(r"^first: \d+ %, \d.* of 378\.9 kB", outcome.stderr, re.MULTILINE)
    assert status(json.loads(outcome.stdout)) == {"first": "pulled"}


def test_bytes_that_come_twice_are_not_more_than_all() -> None:
    meter = console.Meter(console.Output(as_json=False))
    meter.on_event(Event("bytes", "m", 5))  # of one that is not being pulled: no matter
    for kind, amount in [("miss", 10), ("bytes", 10), ("verify_failure", 0), ("bytes", 4)]:
        meter.on_event(Event(kind, "m", amount))
    (task,) = meter._bars.tasks
    assert console._line(task).startswith("m: 40 %, 4 bytes of 10 bytes")
    meter.on_event(Event("done", "m"))
    assert task.finished
    assert meter.fetched("m") == 14
    assert meter.fetched("other") is None


# Verifying


def test_verify_checks_what_is_there(operator: Operator) -> None:
    operator("pull", "first", "second")
    assert status(operator.json("verify")) == {"first": "whole", "second": "whole"}
    assert status(operator.json("verify", "first", "--full")) == {"first": "whole"}


def test_verify_finds_one_wrong_byte_and_leaves_it(operator: Operator) -> None:
    operator("pull", "first", "second")
    operator.damage("first")
    values = operator.json("verify", code=4)
    assert status(values) == {"first": "failed", "second": "whole"}
    assert "model_index.json: expected crc32c" in values["models"][0]["error"]["message"]
    assert operator("verify", "first").exit_code == 4, "nothing was moved"


def test_verify_checks_other_digests_and_other_names_too(operator: Operator) -> None:
    operator("pull", "first", "second")
    old = operator.digest("first")
    operator.damage("first")
    (operator.tmp_path / "origins" / "first" / "model_index.json").write_text("{}")
    assert operator("resolve", "first", "--renew").exit_code == 0
    operator("pull", "first")
    operator.entries = operator.entries[::2]
    operator.write()
    second = f"second@{operator.digest('second')[:16]}"
    values = operator.json("verify", code=4)
    assert status(values) == {"first": "whole", f"first@{old[:16]}": "failed", second: "whole"}


def test_verify_misses_what_is_named_and_absent(operator: Operator) -> None:
    assert operator("verify").exit_code == 0
    assert "No model is in the store." in operator("verify").stderr
    operator("pull", "second")
    assert operator("verify", "second", "first").exit_code == 3
    assert operator("verify", "--all").exit_code == 3


# Publishing and converting


def test_publish_pulls_first_and_is_pulled_from(operator: Operator, tmp_path: Path) -> None:
    target = f"file://{tmp_path / 'mirror'}"
    values = operator.json("publish", "second", target)
    assert (values["status"], values["files"]) == ("published", 5)
    assert operator.json("publish", "second", target)["status"] == "present"
    assert "already there" in operator("publish", "second", target).stderr
    operator("clear", "second")
    (operator.tmp_path / "origins" / "second" / "model_index.json").unlink()
    assert status(operator.json("pull", "second", "--mirror", target)) == {"second": "pulled"}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("second", "ftp://x"), 2),
        (("second", "file:/tmp/x"), 2),
        (("second", "FILE:///tmp/x"), 2),
        (("second", "file://"), 2),
        (("nobody", "file:///tmp/x"), 2),
        (("third", "file:///tmp/x"), 8),
    ],
)
def test_publish_refuses(operator: Operator, arguments: tuple[str, str], code: int) -> None:
    assert operator.json("publish", *arguments, code=code)["exit_code"] == code


def test_publish_does_not_publish_what_does_not_load(operator: Operator, tmp_path: Path) -> None:
    target = f"file://{tmp_path / 'mirror'}"
    values = operator.json("publish", "first", target, code=4)
    assert "does not load" in values["error"]["message"]
    assert operator.json("publish", "first", target, "--no-smoke")["status"] == "published"


def test_publish_converts_first(bare: Operator, tmp_path: Path) -> None:
    origin = write_files(tmp_path / "origins" / "net", {})
    origin.mkdir(parents=True)
    torch.save({"params": {"w": torch.ones(3)}}, origin / "net.pth")
    entry = bare.entries[1] | {
        "name": "net",
        "origins": [{"source": f"file://{origin}", "files": ["net.pth"]}],
        "convert": {"to": "safetensors", "key": "params", "config": {"a": 1}},
    }
    bare.entries = [entry]
    bare.write()
    outcome = bare("resolve", "net")
    assert "now run `imagen models convert net`" in outcome.stderr
    assert bare.json("publish", "net", f"file://{tmp_path / 'mirror'}")["files"] == 3
    assert bare.json("convert", "net")["status"] == "present"
    again = bare.json("convert", "net", "--again")
    assert (again["status"], again["digest"]) == ("converted", bare.digest("net"))
    bare("clear", "net")
    assert bare("pull", "net").exit_code == 2
    assert bare("pull", "net", "--mirror", f"file://{tmp_path / 'mirror'}").exit_code == 0


def test_convert_refuses_what_needs_none(operator: Operator) -> None:
    assert operator.json("convert", "first", code=2)["error"]["code"] == "config"


# Removing


def test_gc_removes_leftovers(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    # However full this machine's disk is, it does not call for room.
    limit(monkeypatch, gc_start_percent=100)
    operator("pull", "first")
    write_files(operator.root / ".staging" / f"{'1' * 16}.host.uuid", {"a": b"123"})
    write_files(operator.root / "store" / "gone" / ("1" * 16), {"a": b"12345"})
    assert [row["kind"] for row in operator.json("gc")["removed"]] == ["staging"]
    values = operator.json("gc", "--now")
    assert values["removed"] == [{"kind": "model", "name": "gone", "digest": "1" * 16, "bytes": 5}]
    assert values["bytes"] == 5
    assert operator("verify", "first").exit_code == 0


def test_clear_removes_every_digest_of_a_model(operator: Operator) -> None:
    operator("pull", "first", "second")
    write_files(operator.root / "store" / "first" / ("1" * 16), {"a": b"12345"})
    values = operator.json("clear", "first", "third")
    assert status(values) == {"first": "removed", "third": "absent"}
    assert [model for model, _ in operator.store.models()] == ["second"]
    assert set(operator.store.refs()) == {"second"}
    assert status(operator.json("clear", "--all")) == {"second": "removed"}


def test_clear_leaves_what_is_in_use(operator: Operator) -> None:
    operator("pull", "first", "second")
    with operator.store.lease(operator.digest("first")):
        values = operator.json("clear", "first", "second", code=5)
    assert "is in use" in values["models"][0]["error"]["message"]
    assert status(values) == {"first": "failed", "second": "removed"}


# Misuse


@pytest.mark.parametrize(
    "arguments",
    [
        ("pull",),
        ("pull", "first", "--all"),
        ("pull", "nobody"),
        ("verify", "nobody"),
        ("clear",),
        ("clear", "nobody"),
        ("info", "nobody"),
        ("resolve",),
        ("pull", "first", "--mirror", "ftp://x"),
        ("pull", "first", "--wrong"),
    ],
)
def test_misuse_ends_with_2_and_a_reason(operator: Operator, arguments: tuple[str, ...]) -> None:
    outcome = operator(*arguments)
    assert outcome.exit_code == 2
    assert outcome.stderr
    assert "Traceback" not in outcome.output


@pytest.mark.parametrize("text", ["models: [", "models: 5", ""])
def test_a_broken_registry_ends_with_2(operator: Operator, text: str) -> None:
    operator.registry.write_text(text)
    assert operator.json("list", code=2)["error"]["code"] == "config"


def test_a_broken_lock_file_ends_with_2(operator: Operator) -> None:
    operator.registry.with_suffix(".lock.json").write_text("{")
    assert "lock file cannot be read" in operator.json("list", code=2)["error"]["message"]


# The command itself


def run(operator: Operator, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*IMAGEN, *operator.arguments(*arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_exit_codes_and_streams_of_the_real_command(operator: Operator) -> None:
    done = run(operator, "pull", "first", "--json")
    assert done.returncode == 0
    assert status(json.loads(done.stdout)) == {"first": "pulled"}
    assert done.stderr.startswith("first: pulled")
    assert run(operator, "verify", "second").returncode == 3
    assert run(operator, "pull", "third").returncode == 8
    assert run(operator, "pull", "first", "--all").returncode == 2


def test_an_interrupted_pull_ends_at_once_and_the_next_completes_it(operator: Operator) -> None:
    slow = (
        "import sys\n"
        "from cli.main import app\n"
        "from cli.models import session\n"
        "plain = session.store_settings\n"
        "limits = {'max_bytes_per_s': 10_000}\n"
        "session.store_settings = lambda *a, **more: plain(*a, **more).model_copy(update=limits)\n"
        "app(sys.argv[1:])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *operator.arguments("pull", "first", "second")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs these tests in the background has them ignore Ctrl-C.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )
    deadline_s = time.monotonic() + 30
    while not any(path.is_file() for folder in staged(operator.root) for path in folder.rglob("*")):
        assert time.monotonic() < deadline_s, "no file is begun"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped." in said
    assert operator.store.models() == []
    assert set(status(operator.json("pull", "first", "second")).values()) == {"pulled"}
    assert staged(operator.root) == []


def test_an_edited_registry_is_noticed(operator: Operator, tmp_path: Path) -> None:
    operator("pull", "second")
    operator.entries[1]["origins"][0]["files"].remove("empty.txt")
    operator.write()
    values = operator.json("pull", "second", code=2)
    assert "imagen models resolve second" in values["models"][0]["error"]["remedy"]
    values = operator.json("publish", "second", f"file://{tmp_path / 'mirror'}", code=2)
    assert "imagen models resolve second" in values["error"]["remedy"]
