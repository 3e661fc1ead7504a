"""One application on a Redis that tests kill, shared by every test of this folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.chaos.application import Application
from tests.chaos.clients import Client
from tests.chaos.ledger import ledger
from tests.jobs.redis_server import RedisServer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from serve_app.jobs.queue import JobQueue


@pytest.fixture(scope="package")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="package")
def application(redis: RedisServer) -> Iterator[Application]:
    with Application(redis.url) as running:
        yield running


@pytest.fixture
async def client(application: Application) -> AsyncGenerator[Client]:
    async with Client(application.url) as ours:
        yield ours


@pytest.fixture
async def queue(redis: RedisServer) -> AsyncGenerator[JobQueue]:
    async with ledger(redis.url) as ours:
        yield ours
