"""How many requests a replica works on, by how large their pictures are."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from deployments.seats import Seats

LARGEST_PX = 50_000_000


async def places_left(seats: Seats) -> int:
    """How many small pictures still get in."""
    async with AsyncExitStack() as stack:
        for count in range(100):
            try:
                async with asyncio.timeout(0.01):
                    await stack.enter_async_context(seats.taken(1))
            except TimeoutError:
                return count
    raise AssertionError("no end of places")


async def test_large_pictures_take_several_places() -> None:
    seats = Seats(16, LARGEST_PX // 4)
    assert await places_left(seats) == 16
    async with seats.taken(LARGEST_PX // 4):
        assert await places_left(seats) == 15
        async with seats.taken(LARGEST_PX // 4 + 1):
            assert await places_left(seats) == 13
    async with AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(seats.taken(LARGEST_PX))
        assert await places_left(seats) == 0
    assert await places_left(seats) == 16


async def test_several_results_take_the_places_of_as_many_pictures() -> None:
    seats = Seats(16, LARGEST_PX // 4)
    async with seats.taken(1, results=8):
        assert await places_left(seats) == 8
    async with seats.taken(LARGEST_PX, results=8):
        assert await places_left(seats) == 0
    assert await places_left(seats) == 16


async def test_a_replica_of_few_places_takes_the_largest_picture() -> None:
    async with Seats(1, LARGEST_PX // 4).taken(10 * LARGEST_PX):
        pass


async def test_who_leaves_the_queue_leaves_no_place_taken() -> None:
    seats = Seats(16, LARGEST_PX // 4)

    async def work() -> None:
        async with seats.taken(LARGEST_PX):
            await asyncio.sleep(60)

    working = [asyncio.create_task(work()) for _ in range(6)]
    await asyncio.sleep(0)
    for task in reversed(working):  # those that still wait leave first
        task.cancel()
    await asyncio.gather(*working, return_exceptions=True)
    assert await places_left(seats) == 16
