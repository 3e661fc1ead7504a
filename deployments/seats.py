"""How many requests a replica works on at a time."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


class Seats:
    """A replica's places for requests in work. A large picture takes several of them.

    Otherwise hostile uploads could fill the memory with as many pictures of the largest size.

    Args:
        count: of places. A picture for which they are too few takes all of them.
        seat_px: width x height of a picture that takes one.
    """

    def __init__(self, count: int, seat_px: int) -> None:
        self._count = count
        self._free = asyncio.Semaphore(count)
        self._first_in_line = asyncio.Lock()
        self._seat_px = seat_px

    @asynccontextmanager
    async def taken(self, px: int, results: int = 1) -> AsyncGenerator[None]:
        """Hold the places of results of so many pixels each; first come, first served."""
        async with AsyncExitStack() as stack:
            # One picture takes all its places at once: two that had half each would wait for ever.
            async with self._first_in_line:
                for _ in range(min(results * self._of(px), self._count)):
                    await stack.enter_async_context(self._free)
            yield

    def _of(self, px: int) -> int:
        return max(-(-px // self._seat_px), 1)
