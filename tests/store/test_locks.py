"""Locks end with their holder; waiting ends when a living holder makes no progress."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deployments.errors import LockTimeout, StoreUnwritable
from deployments.store import locks

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from deployments.store import locks
locks._BEAT_S = 0.05
with locks.exclusive(Path(sys.argv[1]), "m", 5) as holder:
    print("held", flush=True)
    for turn in range(int(sys.argv[2])):
        holder.beat(turn)
        time.sleep(0.05)
    time.sleep(float(sys.argv[3]))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.lock"


@contextmanager
def another(path: Path, beats: int = 0, then_s: float = 60) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock, beats for a time, and then stands still."""
    command = [sys.executable, "-c", HOLD, str(path), str(beats), str(then_s)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_holder_that_stands_still_is_named(path: Path) -> None:
    with another(path) as process:
        start_s = time.monotonic()
        with pytest.raises(LockTimeout) as caught, locks.exclusive(path, "m@1", 0.5):
            pass
    assert 0.5 <= time.monotonic() - start_s < 10
    assert caught.value.exit_code == 6
    assert "m@1" in caught.value.message
    assert f"pid {process.pid} on {os.uname().nodename}" in caught.value.message
    assert caught.value.value == str(path)


def test_a_holder_that_works_is_waited_for(path: Path) -> None:
    with another(path, beats=30, then_s=0), locks.exclusive(path, "m", 0.5) as holder:
        assert holder.waited_s > 0.5


def test_a_dead_holder_frees_at_once(path: Path) -> None:
    with another(path) as process:
        threading.Timer(0.3, process.kill).start()
        with locks.exclusive(path, "m", 30) as holder:
            assert holder.waited_s < 10
    assert path.exists()


def test_a_holder_that_ends_frees_at_once(path: Path) -> None:
    for _ in range(2):
        with locks.exclusive(path, "m", 0) as holder:
            assert holder.waited_s < 1


def test_an_unreadable_body_is_named_unknown(path: Path) -> None:
    with another(path):
        path.write_bytes(b"?" * 256)
        with pytest.raises(LockTimeout, match="holder unknown"), locks.exclusive(path, "m", 0.1):
            pass


@pytest.mark.parametrize("place", ["none/a.lock", "folder"])
def test_a_lock_that_cannot_be_made(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreUnwritable) as caught, locks.exclusive(tmp_path / place, "m", 0):
        pass
    assert caught.value.exit_code == 5


def is_free(path: Path) -> bool:
    with locks.alone(path) as free:
        return free


def test_a_lease_blocks_and_leases_do_not_block_each_other(path: Path) -> None:
    assert is_free(path)
    with locks.shared(path):
        with locks.shared(path):
            assert not is_free(path)
        assert not is_free(path)
    assert is_free(path)


def test_no_lease_is_given_while_a_process_is_alone(path: Path) -> None:
    got = threading.Event()

    def lease() -> None:
        with locks.shared(path):
            got.set()

    thread = threading.Thread(target=lease)
    with locks.alone(path) as free:
        assert free
        thread.start()
        assert not got.wait(0.2)
    assert got.wait(5)
    thread.join()


def test_a_lease_on_a_read_only_store_is_nothing(tmp_path: Path) -> None:
    with locks.shared(tmp_path / "none/a.lock"):
        pass
    with pytest.raises(KeyError), locks.shared(tmp_path / "none/a.lock"):
        raise KeyError
