"""The application's own Redis: private, durable, one for each application, gone with its parent."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from deployments.errors import JobsUnavailable
from deployments.settings import ROOT
from serve_app.jobs.connection import connect
from serve_app.jobs.redis_process import RedisProcess

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path


@contextmanager
def running(folder: Path) -> Generator[RedisProcess]:
    process = RedisProcess(folder)
    process.ensure()
    try:
        yield process
    finally:
        process.close()


async def ask(url: str, *command: str) -> Any:
    redis = connect(url)
    try:
        return await redis.execute_command(*command)
    finally:
        await redis.aclose()


def server_of(process: RedisProcess) -> psutil.Process:
    assert process._process
    return psutil.Process(process._process.pid)


def test_what_was_written_is_there_for_the_next_run_at_the_same_address(tmp_path: Path) -> None:
    with running(tmp_path) as first:
        asyncio.run(ask(first.url, "SET", "job", "1"))
    with running(tmp_path) as second:
        assert second.url == first.url
        assert asyncio.run(ask(second.url, "GET", "job")) == "1"


def test_what_was_answered_survives_kill_9_and_the_server_is_started_again(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        asyncio.run(ask(process.url, "SET", "job", "1"))
        server = server_of(process)
        server.kill()
        server.wait(10)
        assert process.ensure() == process.url
        assert asyncio.run(ask(process.url, "GET", "job")) == "1"


def test_it_listens_on_loopback_and_asks_for_a_password_that_nobody_else_can_read(
    tmp_path: Path,
) -> None:
    with running(tmp_path) as process:
        listening = {
            c.laddr.ip for c in server_of(process).net_connections() if c.status == "LISTEN"
        }
        assert listening == {"127.0.0.1"}
        host = process.url.rpartition("@")[2]
        with pytest.raises(Exception, match=r"(?i)auth"):
            asyncio.run(ask(f"redis://{host}", "GET", "job"))
        password = process.url.partition(":")[2].partition("@")[0].rpartition(":")[2]
        assert password not in " ".join(server_of(process).cmdline())
        [address] = tmp_path.glob("redis/*/server.json")
        assert password in address.read_text()
        assert stat.S_IMODE(address.stat().st_mode) == 0o600
        assert (
            asyncio.run(ask(process.url, "CONFIG", "GET", "appendfsync"))["appendfsync"] == "always"
        )


def test_two_applications_have_two(tmp_path: Path) -> None:
    with running(tmp_path) as first, running(tmp_path) as second:
        asyncio.run(ask(first.url, "SET", "job", "1"))
        assert asyncio.run(ask(second.url, "GET", "job")) is None
    with running(tmp_path) as again:
        assert again.url == first.url


def test_it_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time; from serve_app.jobs.redis_process import RedisProcess\n"
        f"p = RedisProcess(pathlib.Path({str(tmp_path)!r})); p.ensure()\n"
        "print(p._process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout
        server = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
        server.wait(20)
    with running(tmp_path) as next_one:
        assert next_one.url


def test_after_its_end_it_is_not_started_again(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        pass
    with pytest.raises(JobsUnavailable):
        process.ensure()


def test_without_a_server_the_remedy_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("serve_app.jobs.redis_process.find_spec", lambda name: None)
    with pytest.raises(JobsUnavailable, match="REDIS_URL") as refused:
        RedisProcess(tmp_path)
    assert "redis-server" in refused.value.remedy


def test_a_folder_that_cannot_be_written_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JobsUnavailable, match="folder"):
        RedisProcess(tmp_path / "file")
