"""A client and each storage over real HTTP: upload, job, links that anyone can open for a while."""

from __future__ import annotations

import asyncio
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import httpx
import pytest

from benchmarks.servers.s3 import S3Server
from deployments.tasks import Task
from imagen_client import AsyncImagen, Unavailable
from tests.jobs.application import Application, application, picture
from tests.jobs.redis_server import RedisServer
from tests.store import common
from tests.store.conftest import close_clients

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator
    from pathlib import Path

LINK_S = 2


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Generator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(params=["file", "gs", "s3"])
async def app(
    request: pytest.FixtureRequest,
    redis: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncGenerator[Application]:
    close_clients()
    servers = {
        "file": nullcontext,
        "gs": lambda: common.google_without_key(monkeypatch),
        "s3": lambda: common.served(S3Server(), monkeypatch),
    }
    storage = None if request.param == "file" else f"{request.param}://models/jobs"
    namespace = f"{request.param}{time.monotonic_ns()}"
    with servers[request.param]():
        async with application(
            redis.url, tmp_path, namespace=namespace, storage=storage, link_s=LINK_S
        ) as running:
            yield running
            running.jobs.files.close()
        close_clients()


async def link_of(app: Application, url: str) -> str:
    answer = await app.client.get(url)
    assert answer.status_code == 307
    link = answer.headers["location"]
    return f"{app.url}{link}" if link.startswith("/") else link


async def test_upload_job_result_and_a_link_that_expires(app: Application) -> None:
    async with AsyncImagen(app.url) as imagen:
        job = await imagen.submit("style/comic", picture(0), seed=4, n=2, steps=2)
        job = await job.wait(timeout_s=30)
        assert [(await job.result(k)).data for k in range(2)] == [picture(4), picture(5)]
    url = f"/api/v1/jobs/{job.id}/results/1"
    link = await link_of(app, url)
    async with httpx.AsyncClient(trust_env=False) as stranger:  # without credentials
        assert (await stranger.get(link)).content == picture(5)
        changed = [
            link.replace("result-1", "result-0"),
            link[:-1] + ("1" if link[-1] != "1" else "2"),
        ]
        assert [(await stranger.get(one)).status_code for one in changed] == [403, 403]
        await asyncio.sleep(LINK_S + 1.5)
        assert (await stranger.get(link)).status_code == 403
        again = await link_of(app, url)  # the address in the job does not go stale
        assert (await stranger.get(again)).content == picture(5)


@pytest.mark.parametrize("app", ["file"], indirect=True)
async def test_a_storage_that_refuses_is_503_and_sync_calls_go_on(
    app: Application, tmp_path: Path
) -> None:
    # Root may write anywhere, so that a file stands where the folder should be.
    (tmp_path / "files" / "inputs").write_text("")
    async with AsyncImagen(app.url, retries=0) as imagen:
        with pytest.raises(Unavailable) as refused:
            await imagen.submit("style/comic", picture(0))
        assert refused.value.problem is not None
        assert refused.value.problem.code == "jobs_unavailable"
        assert str(tmp_path) not in str(refused.value.problem)
        assert (await imagen.run("style/comic", picture(0), seed=3, steps=2)).data == picture(3)
    assert (await app.client.get("/api/v1/jobs")).json()["jobs"] == []
    assert (await app.queue.depth())[Task.COMIC][0] == 0
