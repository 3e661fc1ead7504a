"""The Redis of the tests keeps what it acknowledged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tests.jobs.redis_server import RedisServer

if TYPE_CHECKING:
    from pathlib import Path


def test_a_killed_server_comes_back_with_its_data_at_the_same_address(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server, Redis.from_url(server.url) as client:
        url = server.url
        client.set("acknowledged", "yes")
        server.kill()
        with pytest.raises(RedisConnectionError):
            client.ping()
        server.start()
        assert server.url == url
        assert client.get("acknowledged") == b"yes"


def test_a_frozen_server_does_not_answer_until_it_is_thawed(tmp_path: Path) -> None:
    with (
        RedisServer(tmp_path) as server,
        Redis.from_url(server.url, socket_timeout=0.2, retry=None) as client,
    ):
        client.ping()
        server.freeze()
        with pytest.raises(RedisTimeoutError):
            client.ping()
        server.thaw()
        assert client.ping()
