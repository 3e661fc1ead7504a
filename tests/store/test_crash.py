"""kill -9 at random instants, and many processes at once.

`IMAGEN_SOAK_KILLS=100` kills a hundred times and prints where the kills landed.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deployments.errors import ModelNotCached
from tests.servers.files import FileServer
from tests.store import common
from tests.store.common import KIB, NAME

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.store.cache import Store

PROJECT = Path(__file__).parents[2]
KILLS = int(os.environ.get("IMAGEN_SOAK_KILLS", "8"))
FILES = common.random_files()
MANIFEST = common.manifest_of(FILES)
RATE = 200 * KIB
LONGEST_S = 1.6
"""A little more than a pull takes at that rate."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    with FileServer(common.write_files(tmp_path / "source", FILES)) as server:
        yield server


def start(root: Path, server: FileServer, rate: float | None = None) -> subprocess.Popen[str]:
    manifest = root.with_name("manifest.json")
    manifest.write_bytes(MANIFEST.encode())
    rates = [str(rate)] if rate else []
    stage = str(root.with_name("stage"))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.store.crash", str(root), server.url, manifest, stage, *rates],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def end(process: subprocess.Popen[str]) -> int:
    with process:
        pass
    return process.returncode


def killed(root: Path, server: FileServer, delay_s: float) -> str:
    """The stage at which a pull was killed; empty if it was faster."""
    process = start(root, server, RATE)
    go(process)
    time.sleep(delay_s)
    process.kill()
    done = end(process) == 0
    return "" if done else root.with_name("stage").read_text()


def is_whole(store: Store) -> bool:
    """Whether the model is there; anything between is an error."""
    try:
        store.check(NAME, MANIFEST.digest, "full")
    except ModelNotCached:
        assert not store.folder(NAME, MANIFEST.digest).exists()
        return False
    return True


def test_a_killed_pull_leaves_all_or_nothing(tmp_path: Path, server: FileServer) -> None:
    draw = random.Random(KILLS)
    root = tmp_path / "root"
    store = common.store_of(root)
    stages: Counter[str] = Counter()
    whole = 0
    while stages.total() < KILLS:
        stage = killed(root, server, draw.uniform(0, LONGEST_S))
        there = is_whole(store)
        if stage:
            stages[stage] += 1
            whole += there
        if there:
            shutil.rmtree(root)
    print(f"\n{KILLS} kills at {dict(stages)}; {whole} stores whole, the others without the model")
    if KILLS >= 100:
        assert len(stages) >= 3
    process = start(root, server)
    go(process)
    assert end(process) == 0
    assert is_whole(store)
    assert common.staged(root) == []


def test_eight_processes_fetch_once(tmp_path: Path, server: FileServer) -> None:
    root = tmp_path / "root"
    processes = [start(root, server) for _ in range(8)]
    for process in processes:
        go(process)
    assert [end(process) for process in processes] == [0] * 8
    assert is_whole(common.store_of(root))
    assert server.faults.bytes_sent.total() == MANIFEST.total_bytes
    assert common.staged(root) == []
