"""`imagen jobs` against the Redis that an application of this machine runs."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from deployments.settings import JobSettings
from deployments.tasks import Task
from serve_app.jobs.connection import connect
from serve_app.jobs.files import open_job_files
from serve_app.jobs.queue import JobQueue
from serve_app.jobs.redis_process import RedisProcess
from tests.jobs.test_queue import spec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from serve_app.jobs.record import JobSpec


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisProcess]:
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setenv("IMAGEN_JOBS", str(tmp_path))
    (tmp_path / "redis" / "9").mkdir(parents=True)
    (tmp_path / "redis" / "9" / "server.json").write_text("{")  # of one that was killed
    process = RedisProcess(tmp_path)
    process.ensure()
    yield process
    process.close()


def run(*words: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["jobs", *words, "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


async def die(url: str, job: JobSpec) -> None:
    """A job that has failed again and again."""
    redis = connect(url)
    queue = JobQueue(lambda: redis, "imagen", keep_s=60, lease_s=60)
    files = open_job_files(JobSettings())
    await files.put_input(job.job_id, b"picture")
    files.close()
    await queue.submit(job, max_queued=9, max_of_owner=9)
    await queue.finish(job.job_id, "failed", {"error": '{"fact": "Lost."}'}, "{}", dead=True)
    await redis.aclose()


def test_a_dead_letter_is_listed_and_queued_anew(own: RedisProcess) -> None:
    dead = spec(task=Task.COMIC)
    asyncio.run(die(own.url, dead))
    assert run("depth")["comic"]["waiting"] == 0
    [listed] = run("dead", "list")["jobs"]
    assert (listed["job_id"], listed["error"]) == (dead.job_id, {"fact": "Lost."})
    again = run("dead", "requeue", dead.job_id)
    assert again["retry_of"] == dead.job_id
    assert run("depth")["comic"]["waiting"] == 1
    assert run("dead", "list")["jobs"] == []


def test_without_an_application_the_remedy_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setenv("IMAGEN_JOBS", str(tmp_path))
    assert "REDIS_URL" in run("depth", code=2)["error"]["remedy"]


def test_an_unknown_job_cannot_be_queued(own: RedisProcess) -> None:
    assert run("dead", "requeue", "0" * 32, code=2)["error"]["code"] == "no_such_job"
