"""How many requests a replica works on, by how large their pictures are."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

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


@pytest.mark.parametrize(
    ("px", "results", "others", "at_a_time", "left"),
    [
        (1, 8, 0, 8, 8),
        (1, 3, 1, 3, 12),
        (1, 8, 1, 7, 8),
        (LARGEST_PX // 2, 8, 0, 4, 8),
        (LARGEST_PX, 8, 0, 2, 8),
        (LARGEST_PX, 8, 1, 1, 8),
        (LARGEST_PX, 1, 2, 1, 4),
        (LARGEST_PX, 8, 2, 1, 4),  # one result of them needs more than half
    ],
)
async def test_the_results_of_a_request_are_made_a_few_at_a_time(
    px: int, results: int, others: int, at_a_time: int, left: int
) -> None:
    seats = Seats(16, LARGEST_PX // 4)
    async with seats.taken(px, results, others) as given:
        assert given == at_a_time
        assert await places_left(seats) == left
    assert await places_left(seats) == 16


async def test_requests_of_several_results_leave_places_to_others() -> None:
    seats = Seats(16, LARGEST_PX // 4)

    async def work() -> None:
        async with seats.taken(LARGEST_PX, results=8):
            await asyncio.sleep(60)

    working = [asyncio.create_task(work()) for _ in range(3)]
    await asyncio.sleep(0)
    assert await places_left(seats) == 8
    for task in working:
        task.cancel()
    await asyncio.gather(*working, return_exceptions=True)
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
