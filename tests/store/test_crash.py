"""kill -9 at each stage and at random instants, and many processes at once.

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

from benchmarks.servers.files import FileServer
from deployments.errors import ModelNotCached
from deployments.store.web import WebReader
from tests.store import common
from tests.store.common import KIB, NAME
from tests.store.crash import STAGES

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
GIVE_UP_S = 60


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    with FileServer(common.write_files(tmp_path / "source", FILES)) as server:
        yield server


def start(root: Path, server: FileServer, *options: str) -> subprocess.Popen[str]:
    manifest = root.with_name("manifest.json")
    manifest.write_bytes(MANIFEST.encode())
    arguments = [str(root), server.url, str(manifest), str(stage_file(root)), *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.store.crash", *arguments],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def stage_file(root: Path) -> Path:
    return root.with_name("stage")


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def end(process: subprocess.Popen[str]) -> int:
    with process:
        pass
    return process.returncode


def is_whole(store: Store) -> bool:
    """Whether the model is there; anything between is an error."""
    try:
        store.check(NAME, MANIFEST.digest, "full")
    except ModelNotCached:
        assert not store.folder(NAME, MANIFEST.digest).exists()
        return False
    return True


def wait_for_stage(root: Path, stage: str) -> None:
    deadline_s = time.monotonic() + GIVE_UP_S
    while not (stage_file(root).exists() and stage_file(root).read_text() == stage):
        assert time.monotonic() < deadline_s, f"never came to {stage}"
        time.sleep(0.01)


@pytest.mark.parametrize("stage", STAGES)
def test_a_pull_killed_at_a_stage_leaves_all_or_nothing(
    tmp_path: Path, server: FileServer, stage: str
) -> None:
    root = tmp_path / "root"
    process = start(root, server, "--stop-at", stage)
    go(process)
    wait_for_stage(root, stage)
    process.kill()
    end(process)
    store = common.store_of(root)
    assert is_whole(store) == (stage in ("reap", "ref"))
    store.pull(MANIFEST, common.places_of(WebReader(server.url), FILES))
    assert is_whole(store)
    assert store.refs() == {NAME: MANIFEST.digest}
    assert common.staged(root) == []
    assert server.faults.bytes_sent.total() == MANIFEST.total_bytes, "nothing came twice"


def killed(root: Path, server: FileServer, delay_s: float) -> str:
    """The stage at which a pull was killed; empty if it was faster."""
    process = start(root, server, "--rate", str(RATE))
    go(process)
    time.sleep(delay_s)
    process.kill()
    done = end(process) == 0
    return "" if done else stage_file(root).read_text()


@pytest.mark.slow
def test_a_pull_killed_at_any_time_leaves_all_or_nothing(
    tmp_path: Path, server: FileServer
) -> None:
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


@pytest.mark.parametrize("count", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_of_many_processes_one_fetches(tmp_path: Path, server: FileServer, count: int) -> None:
    root = tmp_path / "root"
    processes = [start(root, server) for _ in range(count)]
    for process in processes:
        go(process)
    assert [end(process) for process in processes] == [0] * count
    assert is_whole(common.store_of(root))
    assert server.faults.bytes_sent.total() == MANIFEST.total_bytes
    assert common.staged(root) == []
