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
    Requests of several results have half of the places among them, because they may hold theirs
    for minutes.

    Args:
        count: of places. A picture for which they are too few takes all of them.
        seat_px: width x height of a picture that takes one.
    """

    def __init__(self, count: int, seat_px: int) -> None:
        self._count = count
        self._half = max(count // 2, 1)
        self._any = _Places(count)
        self._for_several = _Places(self._half)
        self._seat_px = seat_px

    @asynccontextmanager
    async def taken(self, px: int, results: int = 1, others: int = 0) -> AsyncGenerator[int]:
        """Hold places for a request; first come, first served.

        Gives the results that may be made at a time: at least one, and no more than fit half of
        the places.

        Args:
            px: width x height of the largest picture of the request.
            results: of the request.
            others: pictures that it holds beside its results.
        """
        each = max(-(-px // self._seat_px), 1)
        at_a_time = min(max(self._half // each - others, 1), results)
        places = min((at_a_time + others) * each, self._count)
        async with AsyncExitStack() as stack:
            if results > 1:
                await self._for_several.take(min(places, self._half), stack)
            await self._any.take(places, stack)
            yield at_a_time


class _Places:
    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._first_in_line = asyncio.Lock()

    async def take(self, places: int, stack: AsyncExitStack) -> None:
        """Take them until the end of a context."""
        # One request takes all its places at once: two that had half each would wait for ever.
        async with self._first_in_line:
            for _ in range(places):
                await stack.enter_async_context(self._free)
