"""Silent servers: every command that asks one gives up and says what to do.

`make soak-store` also runs every command in a process of its own.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import yaml
from typer.testing import CliRunner

from benchmarks.servers.files import FileServer
from benchmarks.servers.gcs import GcsServer
from benchmarks.servers.hub import HubServer
from cli.main import app
from deployments.settings import ROOT
from deployments.store import gcs, web
from tests.store.common import NAME, REPO, random_files, write_files
from tests.store.conftest import close_clients

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from benchmarks.servers.listener import Loopback
from benchmarks.servers.s3 import S3Server

WAY_TOO_LONG_S = 60
FILES = random_files()
TIMEOUT_S = 0.3


class Outcome(NamedTuple):
    code: int
    said: str


def run_here(arguments: list[str]) -> Outcome:
    """The command in this process, in a thread that can be left behind if it hangs."""
    results: list[Outcome] = []

    def invoke() -> None:
        result = CliRunner().invoke(app, arguments)
        results.append(Outcome(result.exit_code, result.stderr))

    thread = threading.Thread(target=invoke, daemon=True)
    thread.start()
    thread.join(WAY_TOO_LONG_S)
    assert results, "the command hangs"
    close_clients()
    return results[0]


# The command as users start it, but for its patience.
IMPATIENT = f"""
import random
from deployments.store import gcs, web
web.TIMEOUT_S = ({TIMEOUT_S}, {TIMEOUT_S})
gcs._CHUNK_TIMEOUT_S = {TIMEOUT_S}
random.uniform = lambda least, most: least
from cli.main import app
app()
"""


def run_alone(arguments: list[str]) -> Outcome:
    """The command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAY_TOO_LONG_S,
        check=False,
    )
    return Outcome(done.returncode, done.stderr)


class Bench:
    """A registry of one entry, the command, and the server that holds the entry."""

    def __init__(
        self, folder: Path, run: Callable[[list[str]], Outcome], patch: pytest.MonkeyPatch
    ) -> None:
        self.folder = folder
        self.registry = folder / "registry.yaml"
        self._run = run
        self._patch = patch

    def entry(self, source: str) -> None:
        values: dict[str, Any] = {
            "name": NAME,
            "summary": "random",
            "licence": "MIT",
            "commercial": True,
            "origins": [{"source": source, "files": sorted(FILES)}],
        }
        self.registry.write_text(yaml.safe_dump({"models": [], "artefacts": [values]}))

    def set_environment(self, **variables: str) -> None:
        for name, value in variables.items():
            self._patch.setenv(name, value)

    def __call__(self, command: str, *arguments: str) -> Outcome:
        options = ["--registry", str(self.registry), "--store", str(self.folder / "models")]
        return self._run(["models", command, NAME, *arguments, *options])


@pytest.fixture(params=[run_here, run_alone] if "IMAGEN_SOAK_KILLS" in os.environ else [run_here])
def bench(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(web, "TIMEOUT_S", (TIMEOUT_S, TIMEOUT_S))
    monkeypatch.setattr(gcs, "_CHUNK_TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setattr(random, "uniform", lambda least, most: least)
    return Bench(tmp_path, request.param, monkeypatch)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, run_alone, monkeypatch)


@contextmanager
def at_hub(bench: Bench) -> Iterator[Loopback]:
    with HubServer(bench.folder / "hub") as server:
        revision = server.add_repo(REPO, FILES)
        bench.set_environment(HF_ENDPOINT=server.url)
        bench.entry(f"hf://{REPO}@{revision}")
        yield server


@contextmanager
def at_bucket(bench: Bench) -> Iterator[Loopback]:
    with GcsServer() as server:
        for path, data in FILES.items():
            server.put(f"m/{path}", data)
        bench.set_environment(**server.env)
        bench.entry("gs://models/m")
        yield server


@contextmanager
def at_s3(bench: Bench) -> Iterator[Loopback]:
    with S3Server() as server:
        for path, data in FILES.items():
            server.put(f"m/{path}", data)
        bench.set_environment(**server.env)
        bench.entry("s3://models/m")
        yield server


@contextmanager
def at_web(bench: Bench) -> Iterator[Loopback]:
    with FileServer(write_files(bench.folder / "web", FILES)) as server:
        bench.entry(server.url)
        yield server


def assert_gave_up(outcome: Outcome) -> None:
    assert outcome.code == 7, outcome.said
    assert "Traceback" not in outcome.said
    assert "times in a row" in outcome.said
    assert "Try again" in outcome.said


@pytest.mark.slow
@pytest.mark.parametrize("source", [at_hub, at_bucket, at_s3, at_web])
def test_no_thread_of_a_client_keeps_the_command_from_ending(alone: Bench, source: Any) -> None:
    with source(alone) as server:
        if source is at_web:
            server.faults.add("silent", times=math.inf, seconds=3600)
            assert_gave_up(alone("resolve"))
        else:
            assert alone("resolve").code == 0
            server.faults.add("stall", times=math.inf, seconds=3600)
            assert_gave_up(alone("pull"))


@pytest.mark.parametrize("source", [at_hub, at_bucket, at_s3])
@pytest.mark.parametrize("command", ["resolve", "pull"])
def test_a_source_that_is_silent_while_it_lists(bench: Bench, source: Any, command: str) -> None:
    with source(bench) as server:
        if command == "pull":
            assert bench("resolve").code == 0
        server.faults.add("silent", times=math.inf, seconds=3600)
        assert_gave_up(bench(command))


def test_a_hub_that_is_silent_when_asked_for_its_main_branch(bench: Bench) -> None:
    with at_hub(bench) as server:
        bench.entry(f"hf://{REPO}@unresolved")
        server.faults.add("silent", times=math.inf, seconds=3600)
        assert_gave_up(bench("resolve"))


def test_a_web_server_that_is_silent(bench: Bench) -> None:
    with at_web(bench) as server:
        server.faults.add("silent", times=math.inf, seconds=3600)
        assert_gave_up(bench("resolve"))


@pytest.mark.parametrize("source", [at_hub, at_bucket, at_s3])
def test_a_source_that_is_silent_while_it_sends(bench: Bench, source: Any) -> None:
    with source(bench) as server:
        assert bench("resolve").code == 0
        server.faults.add("stall", times=math.inf, seconds=3600)
        assert_gave_up(bench("pull"))


@pytest.mark.parametrize(
    ("target", "method"), [(at_bucket, "GET"), (at_bucket, "POST"), (at_s3, "GET"), (at_s3, "PUT")]
)
def test_a_bucket_that_is_silent_while_it_is_published_to(
    bench: Bench, target: Any, method: str
) -> None:
    with target(bench) as server:
        assert bench("resolve").code == 0
        assert bench("pull").code == 0
        server.faults.add("silent", times=math.inf, seconds=3600, method=method)
        scheme = "s3" if target is at_s3 else "gs"
        assert_gave_up(bench("publish", f"{scheme}://models/mirror"))
