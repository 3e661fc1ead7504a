"""Every command block of the README runs, as a newcomer would run it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import httpx
import pytest
from PIL import Image

from deployments.settings import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCKS = re.findall(
    r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
)
SERVE_RUN = ".venv/bin/serve run configs/local.yaml\n"
APART = {"make setup\n", "make test\n", "make run\n", SERVE_RUN}
SIZES = {"upscaled.png": (1804, 1200), "sea.png": (256, 256), "field.png": (256, 256)}
"""Of results that are not as large as the photo."""
READY = "http://127.0.0.1:8000/readyz"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`make run`, ready; what it has printed so far."""
    place = tmp_path_factory.mktemp("run")
    log = place / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            ["make", "run"],
            cwd=ROOT,
            env=os.environ | {"IMAGEN_JOBS": str(place / "jobs")},
            stdout=file,
            stderr=file,
            start_new_session=True,
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


@pytest.mark.slow
def test_serve_run_serves(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            SERVE_RUN.split(),
            cwd=ROOT,
            stdout=file,
            stderr=file,
            # A shell's background jobs ignore Ctrl-C, and so does whatever they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            with suppress(httpx.TransportError):
                if httpx.get(READY, timeout=30).is_success:
                    return
            time.sleep(0.5)
        pytest.fail(log.read_text())
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(90)


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
    assert dashboard_of(running)


def dashboard_of(running: str) -> str:
    [address] = re.findall(r"^Dashboard +(http\S+)", running, re.MULTILINE)
    return address


@pytest.mark.parametrize("block", [b for b in BLOCKS if b not in APART])
def test_block(running: str, folder: Path, block: str) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.replace("curl ", "curl -sS ")],
        cwd=folder,
        env=os.environ
        | {
            "RAY_DASHBOARD_ADDRESS": dashboard_of(running),
            "IMAGEN_KEYS": str(folder / "keys.yaml"),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in re.findall(r"-o (\S+)", block):
        with Image.open(folder / name) as picture:
            picture.load()
            assert picture.size == SIZES.get(name, (451, 300))
    if "strength=0.1" in block:
        assert '"status": 422' in done.stdout
    if "serve status" in block:
        assert "status: RUNNING" in done.stdout
    if "imagen metadata" in block:
        assert "comic-starter@" in done.stdout
