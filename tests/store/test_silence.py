"""A server that says nothing: every command that asks one gives up, and says what to do."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from deployments.settings import ROOT
from tests.servers.files import FileServer
from tests.servers.gcs import GcsServer
from tests.servers.hub import HubServer
from tests.store.common import NAME, REPO, random_files, write_files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers.listener import Loopback

# The command as users start it, but for its patience.
IMPATIENT = """
import random
from deployments.store import web
web.TIMEOUT_S = (0.3, 0.3)
from deployments.store import gcs
gcs._CHUNK_TIMEOUT_S = 0.3
random.uniform = lambda least, most: least
from cli.main import app
app()
"""
WAY_TOO_LONG_S = 60
FILES = random_files()


class Bench:
    """A registry of one entry, the command, and the server that holds the entry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = folder / "registry.yaml"
        self.environment: dict[str, str] = {"HF_HUB_OFFLINE": "0"}

    def entry(self, source: str) -> None:
        values: dict[str, Any] = {
            "name": NAME,
            "summary": "random",
            "licence": "MIT",
            "commercial": True,
            "origins": [{"source": source, "files": sorted(FILES)}],
        }
        self.registry.write_text(yaml.safe_dump({"models": [], "artefacts": [values]}))

    def __call__(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        options = ["--registry", str(self.registry), "--store", str(self.folder / "models")]
        return subprocess.run(
            [sys.executable, "-c", IMPATIENT, "models", command, NAME, *arguments, *options],
            env=os.environ | self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=WAY_TOO_LONG_S,
            check=False,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@contextmanager
def hub(bench: Bench) -> Iterator[Loopback]:
    with HubServer(bench.folder / "hub") as server:
        revision = server.add_repo(REPO, FILES)
        bench.environment["HF_ENDPOINT"] = server.url
        bench.entry(f"hf://{REPO}@{revision}")
        yield server


@contextmanager
def bucket(bench: Bench) -> Iterator[Loopback]:
    with GcsServer() as server:
        for path, data in FILES.items():
            server.put(f"m/{path}", data)
        bench.environment |= server.env
        bench.entry("gs://models/m")
        yield server


@contextmanager
def web(bench: Bench) -> Iterator[Loopback]:
    with FileServer(write_files(bench.folder / "web", FILES)) as server:
        bench.entry(server.url)
        yield server


def gave_up(done: subprocess.CompletedProcess[str]) -> bool:
    assert done.returncode == 7, done.stderr
    assert "Traceback" not in done.stderr
    assert "times in a row" in done.stderr, done.stderr
    assert "Try again" in done.stderr
    return True


@pytest.mark.parametrize("source", [hub, bucket])
@pytest.mark.parametrize("command", ["resolve", "pull"])
def test_a_source_that_is_silent_while_it_lists(bench: Bench, source: Any, command: str) -> None:
    with source(bench) as server:
        if command == "pull":
            assert bench("resolve").returncode == 0
        server.faults.add("silent", times=math.inf, seconds=3600)
        assert gave_up(bench(command))


def test_a_hub_that_is_silent_when_asked_for_its_main_branch(bench: Bench) -> None:
    with hub(bench) as server:
        bench.entry(f"hf://{REPO}@unresolved")
        server.faults.add("silent", times=math.inf, seconds=3600)
        assert gave_up(bench("resolve"))


def test_a_web_server_that_is_silent(bench: Bench) -> None:
    with web(bench) as server:
        server.faults.add("silent", times=math.inf, seconds=3600)
        assert gave_up(bench("resolve"))


@pytest.mark.parametrize("source", [hub, bucket])
def test_a_source_that_is_silent_while_it_sends(bench: Bench, source: Any) -> None:
    with source(bench) as server:
        assert bench("resolve").returncode == 0
        server.faults.add("stall", times=math.inf, seconds=3600)
        assert gave_up(bench("pull"))


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_bucket_that_is_silent_while_it_is_published_to(bench: Bench, method: str) -> None:
    with bucket(bench) as server:
        assert bench("resolve").returncode == 0
        assert bench("pull").returncode == 0
        server.faults.add("silent", times=math.inf, seconds=3600, method=method)
        assert gave_up(bench("publish", "gs://models/mirror"))
