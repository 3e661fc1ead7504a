"""Words that processes pass each other through Redis: new work, events of jobs, ends of jobs.

A word can be lost, when Redis is away, so whoever waits for one looks by itself from time to time.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from deployments.errors import JobsUnavailable
from serve_app.jobs.connection import answered, redis_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from redis.asyncio import Redis

    from serve_app.jobs.connection import RedisLink

_AGAIN_S = 1.0
_POLL_S = 20.0


class Signals:
    """Listens on one connection for everybody in this process.

    Args:
        link: to Redis.
        namespace: begins every key.

    Attributes:
        on_word: called with each word, such as `wake`, `event <id>` or `ended <id>`.
    """

    def __init__(
        self,
        link: RedisLink,
        namespace: str,
        on_word: Callable[[str], object] | None = None,
    ) -> None:
        self._link = link
        self._channel = f"{namespace}:signal"
        self.on_word = on_word
        self._waiting: dict[str, set[asyncio.Event]] = defaultdict(set)

    @contextmanager
    def about(self, job_id: str) -> Generator[asyncio.Event]:
        """An event that is set whenever something happens to a job."""
        event = asyncio.Event()
        self._waiting[job_id].add(event)
        try:
            yield event
        finally:
            self._waiting[job_id].discard(event)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    async def listen(self) -> None:
        """Pass words on until cancelled; reconnects whenever Redis is back."""
        while True:
            with suppress(JobsUnavailable), redis_errors():
                await self._link.refresh()
                await self._listen(self._link())
            await asyncio.sleep(_AGAIN_S)
            self._wake_all()

    async def _listen(self, redis: Redis) -> None:
        async with redis.pubsub(ignore_subscribe_messages=True) as channel:
            async with answered():
                await channel.subscribe(self._channel)
            self._wake_all()  # what was said while nobody listened
            while True:
                message: Any = await channel.get_message(timeout=_POLL_S)
                if message:
                    self._tell(message["data"])

    def _tell(self, word: str) -> None:
        if self.on_word:
            self.on_word(word)
        _, _, job_id = word.partition(" ")
        for event in self._waiting.get(job_id, ()):
            event.set()

    def _wake_all(self) -> None:
        if self.on_word:
            self.on_word("wake")
        for events in self._waiting.values():
            for event in events:
                event.set()
