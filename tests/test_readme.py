"""Every command block of the README runs, as a newcomer would run it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from deployments.settings import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCKS = re.findall(
    r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
)
APART = {"make setup\n", "make test\n", "make run\n"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`make run`, ready; what it has printed so far."""
    log = tmp_path_factory.mktemp("run") / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            ["make", "run"], cwd=ROOT, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield wait_for("Imagen is ready", log, server)
    finally:
        os.killpg(server.pid, signal.SIGINT)
        server.wait(90)


def wait_for(words: str, log: Path, server: subprocess.Popen[bytes]) -> str:
    while words not in (text := log.read_text()):
        assert server.poll() is None, text
        try:
            server.wait(1)
        except subprocess.TimeoutExpired:
            continue
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with everything of the project in it, where pictures may be left."""
    folder = tmp_path_factory.mktemp("readme")
    for entry in ROOT.iterdir():
        (folder / entry.name).symlink_to(entry)
    return folder


def test_the_first_commands_are_setup_run_and_one_curl() -> None:
    assert BLOCKS[:2] == ["make setup\n", "make run\n"]
    assert BLOCKS[2].startswith("curl -F image=@")
    assert set(BLOCKS) >= APART


def test_run_says_where_to_go(running: str) -> None:
    assert "http://127.0.0.1:8000" in running
    assert "http://127.0.0.1:8265" in running


@pytest.mark.parametrize("block", [b for b in BLOCKS if b not in APART])
def test_block(running: str, folder: Path, block: str) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.replace("curl ", "curl -sS ")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in re.findall(r"-o (\S+)", block):
        with Image.open(folder / name) as picture:
            picture.load()
            assert picture.size == ((1804, 1200) if name == "upscaled.png" else (451, 300))
    if "strength=0.1" in block:
        assert '"status": 422' in done.stdout
    if "imagen metadata" in block:
        assert "comic-starter@" in done.stdout
