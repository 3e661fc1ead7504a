"""The connection to Redis, and its errors in our own tree."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from deployments.errors import ConfigError, JobsUnavailable

if TYPE_CHECKING:
    from collections.abc import Generator

URL_VARIABLE = "REDIS_URL"
"""Names the Redis server, with its password: redis://… or, with TLS, rediss://…"""
TIMEOUT_S = 3.0
"""A Redis that does not answer within this is away."""
_CONNECTIONS = 64


def connect(url: str, *, timeout_s: float = TIMEOUT_S) -> Redis:
    """A pool of connections; connects on first use.

    Args:
        url: redis:// or rediss://, with the password.
        timeout_s: of connecting, of each command, and of waiting for a free connection.

    Raises:
        ConfigError: the URL is no Redis URL.
    """
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            decode_responses=True,
            max_connections=_CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            health_check_interval=30,
            # One more try, because a connection of a Redis that restarted is dead.
            retry=Retry(NoBackoff(), 1),
            retry_on_error=[RedisConnectionError],
        )
    except ValueError as error:
        raise ConfigError(
            f"${URL_VARIABLE} is no Redis URL.",
            value="not shown, because it may hold a password",
            remedy="Write redis://:password@host:6379/0, or rediss://… for TLS.",
        ) from error
    return Redis(connection_pool=pool)


@contextmanager
def redis_errors() -> Generator[None]:
    """Turn the errors of a Redis that is away, full or refuses into JobsUnavailable."""
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        raise JobsUnavailable(
            "The queue of jobs does not answer.",
            value=type(error).__name__,
            remedy="Try again after Retry-After seconds; requests without Prefer go on.",
            retry_after_s=5,
        ) from error
