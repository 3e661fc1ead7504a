"""Bytes that several tasks share: whoever needs some waits until they fit."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable


class Budget:
    """So many bytes. Tasks get theirs in the order in which they ask, so that none waits for ever.

    Args:
        most_bytes: held at a time. More than that is given to one task alone.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held_bytes = 0
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def hold(self, some_bytes: int) -> AsyncGenerator[Callable[[int], None]]:
        """Wait for so many bytes, and hold them.

        What is given takes further bytes, without waiting: whoever has them already can only make
        the others wait.
        """
        own_bytes = 0

        def take(more_bytes: int) -> None:
            nonlocal own_bytes
            own_bytes += more_bytes
            self._held_bytes += more_bytes

        async with self._turn:
            while self._held_bytes and self._held_bytes + some_bytes > self._most_bytes:
                self._freed.clear()
                await self._freed.wait()
            take(some_bytes)
        try:
            yield take
        finally:
            take(-own_bytes)
            self._freed.set()
