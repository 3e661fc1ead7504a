"""The limits of API keys: what a request may take, and what it gives back at its end."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from typing import TYPE_CHECKING, TypeVar

from redis.exceptions import RedisError

from deployments.errors import RateLimited
from serve_app.access.counters import (
    LEASE_S,
    Bucket,
    Decision,
    MemoryCounters,
    Places,
    RedisCounters,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from redis.asyncio import Redis

    from serve_app.access.counters import Counters
    from serve_app.access.keys import Key

T = TypeVar("T")
logger = logging.getLogger("ray.serve.imagen")
PATIENCE_S = 1.0
"""A Redis that takes longer is away: no request waits longer for its limits.

Redis syncs its file before it answers. A busy disk takes 50 ms for that now and then, and a disk on
a network hundreds; whoever took that for a Redis that is away would let keys use their limits once
on each replica. A Redis that does hang costs one request in `AWAY_S` this second.
"""
AWAY_S = 5.0
"""A Redis that was away is not asked for so long."""
_MEGAPIXEL = 1_000_000
_MINUTE_S = 60.0


class Limits:
    """Counts what keys use, in Redis; while it is away or absent, in this process.

    Args:
        redis: gives the server, or None while there is none.
        namespace: begins every key in Redis.
        retry_after_s: for a key whose pictures are all in hand; nobody knows when one ends.
        clock_s: seconds, never backwards.
    """

    def __init__(
        self,
        redis: Callable[[], Redis | None],
        namespace: str,
        *,
        retry_after_s: float = 1,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.retry_after_s = retry_after_s
        self._redis = redis
        self._prefix = f"{namespace}:limits:"
        self._clock_s = clock_s
        self._memory = MemoryCounters(clock_s)
        self._shared: tuple[Redis, RedisCounters] | None = None
        self._ask_again_s: float | None = None  # None while Redis answers

    def visit(self, key: Key) -> Visit:
        """A request of a key, which has taken nothing yet."""
        return Visit(self, key)

    async def ask(self, work: Callable[[Counters], Awaitable[T]]) -> tuple[Counters, T]:
        """Do something with the counts of Redis, or else with those of this process.

        Returns:
            Where it was done, and the outcome.
        """
        shared = self._reachable()
        if shared is not None:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    outcome = await work(shared)
            except (RedisError, OSError, TimeoutError) as error:
                self._lost(error)
            else:
                self._ask_again_s = None
                return shared, outcome
        return self._memory, await work(self._memory)

    async def ask_again(self, where: Counters, work: Callable[[Counters], Awaitable[None]]) -> None:
        """Do something where something was done before; nothing if that Redis is away now."""
        if where is self._memory:
            await work(where)
        elif self._reachable() is where:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await work(where)
            except (RedisError, OSError, TimeoutError) as error:
                self._lost(error)
            else:
                self._ask_again_s = None

    def _reachable(self) -> RedisCounters | None:
        redis = self._redis()
        if redis is None:
            return None
        now_s = self._clock_s()
        if self._ask_again_s is not None:
            if now_s < self._ask_again_s:
                return None
            self._ask_again_s = now_s + AWAY_S  # one request tries; the others do not wait
        if self._shared is None or self._shared[0] is not redis:
            self._shared = redis, RedisCounters(redis, self._prefix)
        return self._shared[1]

    def _lost(self, error: Exception) -> None:
        if self._ask_again_s is None:
            reason = type(error).__name__  # its text may hold an address
            logger.warning("Limits are counted in this process; Redis: %s", reason)
        self._ask_again_s = self._clock_s() + AWAY_S


class Visit:
    """One request of a key: `enter` it, `charge` its picture, perhaps `refund` it, always `leave`.

    Attributes:
        key: whose.
        headers: RateLimit-* of its answer.
        pixels: that were charged, and not given back.
        refused: the name of the limit that refused it; None if none did.
    """

    def __init__(self, limits: Limits, key: Key) -> None:
        self.key = key
        self.headers: dict[str, str] = {}
        self.pixels = 0
        self.refused: str | None = None
        self._limits = limits
        self._held: tuple[Counters, Places] | None = None
        self._charged: tuple[Counters, Bucket] | None = None
        self._renewing: asyncio.Task[None] | None = None

    async def enter(self, *, picture: bool) -> None:
        """Count the request, and take a place if it brings a picture. One round trip to Redis.

        Raises:
            RateLimited: the key has reached its requests a second, or its pictures at a time.
        """
        rate, most = self.key.limits.requests_per_s, self.key.limits.pictures
        places = None
        if picture and most is not None:
            places = Places(f"{self.key.id}:pictures", most, uuid.uuid4().hex)
        if rate is None and places is None:
            return
        endless = 1e6, 1e6
        bucket = Bucket(
            f"{self.key.id}:requests", *(endless if rate is None else (max(rate, 1), rate))
        )
        where, decision = await self._limits.ask(lambda counters: counters.take(bucket, 1, places))
        if rate is not None:
            self.headers |= _headers(bucket, decision)
        if decision.wait_us:
            raise self._refusal("requests_per_s", rate, decision.wait_us / 1e6)
        if not decision.placed:
            raise self._refusal("pictures", most, self._limits.retry_after_s)
        if places is not None:
            self._held = where, places
            self._renewing = asyncio.create_task(self._renew(where, places))

    async def charge(self, pixels: int) -> None:
        """Count the pixels of the picture, once its header is read and before it is worked on.

        Args:
            pixels: width x height, times the number of results.

        Raises:
            RateLimited: the key has reached its megapixels a minute.
        """
        rate = self.key.limits.megapixels_per_minute
        if rate is not None and pixels > 0:
            burst = rate * _MEGAPIXEL
            bucket = Bucket(f"{self.key.id}:pixels", burst, burst / _MINUTE_S)
            where, decision = await self._limits.ask(lambda counters: counters.take(bucket, pixels))
            if decision.wait_us:
                raise self._refusal("megapixels_per_minute", rate, decision.wait_us / 1e6)
            self._charged = where, bucket
        self.pixels += pixels

    async def refund(self) -> None:
        """Give back what was charged. A second call does nothing."""
        charged, self._charged = self._charged, None
        pixels, self.pixels = self.pixels, 0
        if charged is not None:
            where, bucket = charged
            await self._limits.ask_again(where, lambda counters: counters.give(bucket, pixels))

    async def leave(self, *, refund: bool = False) -> None:
        """Give the place back, and with `refund` the pixels too. A second call does nothing."""
        if self._renewing is not None:
            self._renewing.cancel()
        held, self._held = self._held, None
        if held is not None:
            await self._limits.ask_again(held[0], lambda counters: counters.leave(held[1]))
        if refund:
            await self.refund()
        self._charged = None

    async def _renew(self, where: Counters, places: Places) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            await self._limits.ask_again(where, lambda counters: counters.renew(places))

    def _refusal(self, limit: str, most: float | None, wait_s: float) -> RateLimited:
        self.refused = limit
        return RateLimited(
            f"This API key has reached its limit {limit}.",
            value=f"{limit} = {most:g}",
            remedy="Try again after Retry-After seconds, or ask the operator for more.",
            retry_after_s=wait_s,
        )


def _headers(bucket: Bucket, decision: Decision) -> dict[str, str]:
    left = bucket.burst - decision.used_us / bucket.unit_us
    return {
        "RateLimit-Limit": str(math.floor(bucket.burst)),
        "RateLimit-Remaining": str(max(math.floor(left + 1e-6), 0)),
        "RateLimit-Reset": str(math.ceil(decision.used_us / 1e6)),
    }
