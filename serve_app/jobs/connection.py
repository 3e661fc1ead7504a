"""The connection to Redis, and its errors in our own tree."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from deployments.errors import ConfigError, JobsUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator

URL_VARIABLE = "REDIS_URL"
"""Names the Redis server, with its password: redis://… or, with TLS, rediss://…"""
TIMEOUT_S = 3.0
"""A Redis that does not answer within this is away."""
_CONNECTIONS = 64


def connect(url: str, *, timeout_s: float = TIMEOUT_S) -> Redis:
    """A pool of connections; connects on first use.

    Args:
        url: redis:// or rediss://, with the password.
        timeout_s: of connecting, and of waiting for a free connection.

    Raises:
        ConfigError: the URL is no Redis URL.
    """
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            decode_responses=True,
            max_connections=_CONNECTIONS,
            timeout=timeout_s,
            # Not socket_timeout: redis-py uses asyncio.wait_for for it, which can swallow a cancel
            # before Python 3.12. `answered` limits the time instead.
            socket_timeout=None,
            socket_connect_timeout=timeout_s,
            health_check_interval=30,
            # One more try, because a connection of a Redis that restarted is dead. None after a
            # timeout: a Redis that hangs would hold up its callers several times as long.
            retry=Retry(NoBackoff(), 1, (RedisConnectionError,)),
        )
    except ValueError as error:
        raise ConfigError(
            f"${URL_VARIABLE} is no Redis URL.",
            value="not shown, because it may hold a password",
            remedy="Write redis://:password@host:6379/0, or rediss://… for TLS.",
        ) from error
    return Redis.from_pool(pool)


class RedisLink:
    """The Redis of this application, wherever it is at present.

    Args:
        url: tells where; may raise JobsUnavailable.

    Attributes:
        current: connected; None until the first `refresh`.
    """

    def __init__(self, url: Callable[[], Awaitable[str]]) -> None:
        self._url = url
        self._last = ""
        self.current: Redis | None = None

    def __call__(self) -> Redis:
        """The connection.

        Raises:
            JobsUnavailable: there is none yet.
        """
        if self.current is None:
            raise away("starting")
        return self.current

    async def refresh(self) -> None:
        """Ask where Redis is, and connect to it if that has changed.

        Raises:
            JobsUnavailable: nobody knows.
        """
        url = await self._url()
        if url != self._last:
            former, self.current = self.current, connect(url)
            self._last = url
            if former is not None:
                await former.aclose()


def url_of_environment() -> str | None:
    """The Redis that REDIS_URL names; None if it names none."""
    return os.environ.get(URL_VARIABLE) or None


def open_link(own_url: Callable[[], Awaitable[str]] | None) -> RedisLink:
    """The link to the Redis that REDIS_URL names, else to the application's own one.

    Args:
        own_url: asks for the application's own one; None if it has none.
    """
    named = url_of_environment()

    async def url() -> str:
        if named is not None:
            return named
        if own_url is None:
            raise away("no REDIS_URL")
        return await own_url()

    return RedisLink(url)


def away(value: str) -> JobsUnavailable:
    """The error while Redis does not answer."""
    return JobsUnavailable(
        "The queue of jobs does not answer.",
        value=value,
        remedy="Try again after Retry-After seconds; requests without Prefer go on.",
        retry_after_s=5,
    )


@contextmanager
def redis_errors() -> Generator[None]:
    """Turn the errors of a Redis that is away, full or refuses into JobsUnavailable."""
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        raise away(type(error).__name__) from error


@asynccontextmanager
async def answered(timeout_s: float = TIMEOUT_S) -> AsyncGenerator[None]:
    """A call of Redis, which must answer in time.

    Raises:
        JobsUnavailable: it does not, or not as it should.
    """
    with redis_errors():
        async with asyncio.timeout(timeout_s):
            yield
