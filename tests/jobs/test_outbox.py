"""Every event arrives, in the order of its job, whoever dies meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import subprocess
import sys
import uuid
from collections import defaultdict
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from deployments.errors import JobsUnavailable
from deployments.settings import ROOT, WebhookSettings
from serve_app.jobs.connection import connect
from serve_app.jobs.outbox import (
    DEAD,
    PER_HOST,
    PER_OWNER,
    RETRY_S,
    Claim,
    Outbox,
    deliver_forever,
)
from serve_app.jobs.queue import JobQueue
from serve_app.jobs.webhooks import Sender
from tests.jobs.receiver import Received, Receiver, hang, in_turn, status, until
from tests.jobs.redis_server import RedisServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from redis.asyncio import Redis

SETTINGS = WebhookSettings(allow_http=True, allow_private=True, timeout_s=20)
HASTY = SETTINGS.model_copy(update={"timeout_s": 0.5})
AT_ONCE = (0.02,)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@asynccontextmanager
async def connected(server: RedisServer, timeout_s: float = 1) -> AsyncIterator[Redis]:
    client = connect(server.url, timeout_s=timeout_s)
    try:
        yield client
    finally:
        await client.connection_pool.disconnect()


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[Redis]:
    async with connected(server) as client:
        yield client


class Box:
    """The outbox of a namespace of its own, and the events that a test put into it."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.namespace = f"test-{uuid.uuid4().hex}"
        self.contents: dict[str, str] = {}

    def of(
        self,
        settings: WebhookSettings = SETTINGS,
        retry_s: tuple[float, ...] = AT_ONCE,
        lease_s: float = 0,
    ) -> Outbox:
        return Outbox(lambda: self.redis, self.namespace, settings, lease_s, retry_s=retry_s)

    async def put(self, job_id: str, url: str, *, owner: str = "anna", **data: Any) -> str:
        """What the transition of a job does; the id of its event."""
        event = {
            "id": f"msg_{uuid.uuid4().hex}",
            "url": url,
            "owner": owner,
            "type": "job.completed",
            "created": 1732633445.5,
            "data": {"job_id": job_id, **data},
        }
        await self.put_text(job_id, json.dumps(event))
        return str(event["id"])

    async def put_text(self, job_id: str, text: str) -> None:
        seconds, microseconds = await self.redis.time()
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.rpush(f"{self.namespace}:hooks:{job_id}", text)
            due = {job_id: seconds + microseconds / 1e6}
            pipe.zadd(f"{self.namespace}:outbox", due, nx=True)
            await pipe.execute()

    async def keys(self) -> set[str]:
        names = await self.redis.keys(f"{self.namespace}:*")
        return {name.removeprefix(f"{self.namespace}:") for name in names}

    async def is_empty(self) -> bool:
        return not await self.keys()

    async def dead(self) -> list[dict[str, Any]]:
        return [
            json.loads(text)
            for text in await self.redis.lrange(f"{self.namespace}:hooks-dead", 0, -1)
        ]

    async def due_in_s(self, job_id: str) -> float:
        due = await self.redis.zscore(f"{self.namespace}:outbox", job_id)
        seconds, microseconds = await self.redis.time()
        assert due is not None
        return float(due) - seconds - microseconds / 1e6

    async def make_due(self, job_id: str) -> None:
        await self.redis.zadd(f"{self.namespace}:outbox", {job_id: 1})


@pytest.fixture
def box(redis: Redis) -> Box:
    return Box(redis)


@asynccontextmanager
async def delivering(
    outbox: Outbox, settings: WebhookSettings = SETTINGS
) -> AsyncIterator[asyncio.Task[None]]:
    """`deliver_forever` runs inside; every host name is this machine."""
    sender = Sender(settings, b"master", resolve=lambda host, port: ["127.0.0.1"])
    task = asyncio.create_task(deliver_forever(outbox, sender))
    try:
        yield task
        assert not task.done()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        sender.close()


async def claimed(outbox: Outbox) -> Claim:
    claim = await outbox.claim()
    assert claim
    return claim


# Claims


async def test_a_job_is_claimed_by_one_deliverer_and_leaves_nothing_behind(box: Box) -> None:
    first = await box.put("a", "http://x.example/")
    second = await box.put("a", "http://x.example/")
    outbox = box.of()
    claim = await claimed(outbox)
    assert (claim.job_id, claim.attempt, json.loads(claim.text)["id"]) == ("a", 1, first)
    assert await box.of().claim() is None
    assert await outbox.delivered(claim) == "ended"
    claim = await claimed(outbox)
    assert (claim.attempt, json.loads(claim.text)["id"]) == (1, second)
    assert await outbox.delivered(claim) == "ended"
    assert await outbox.claim() is None
    assert await box.is_empty()


async def test_who_lost_a_claim_changes_nothing(box: Box) -> None:
    event = await box.put("a", "http://x.example/")
    outbox = box.of()
    lost = await claimed(outbox)
    await box.make_due("a")  # as the end of the lease does
    claim = await claimed(outbox)
    assert (claim.text, claim.attempt) == (lost.text, 2)
    assert await outbox.delivered(lost) == "lost"
    assert await outbox.failed(lost, "late") == "lost"
    assert await outbox.failed(lost, "late", again=False) == "lost"
    assert await outbox.delivered(claim) == "ended"
    await box.put("a", "http://x.example/")
    assert json.loads((await claimed(outbox)).text)["id"] != event
    assert await outbox.delivered(claim) == "lost"


async def test_a_lease_outlasts_an_attempt(box: Box) -> None:
    await box.put("a", "http://x.example/")
    await claimed(box.of(SETTINGS, lease_s=1))
    assert await box.due_in_s("a") > SETTINGS.timeout_s


async def test_a_job_without_events_is_forgotten(box: Box) -> None:
    await box.put("a", "http://x.example/")
    await box.redis.delete(f"{box.namespace}:hooks:a")
    assert await box.of().claim() is None
    assert await box.is_empty()


async def test_an_event_that_cannot_be_read_holds_up_no_other_job(box: Box) -> None:
    for job_id, text in (("a", "not JSON"), ("b", '{"url": null}'), ("c", "7")):
        await box.put_text(job_id, text)
    async with Receiver() as receiver, delivering(box.of(HASTY)):
        await box.put("d", receiver.url)
        await until(lambda: len(receiver.received) == 1)


@pytest.mark.parametrize("place", ["host", "owner"])
async def test_deliveries_to_a_host_and_of_an_owner_are_bounded(box: Box, place: str) -> None:
    limit = PER_HOST if place == "host" else PER_OWNER
    for number in range(limit + 200):
        host = "same" if place == "host" else f"host-{number}"
        owner = "same" if place == "owner" else f"owner-{number}"
        await box.put(f"job-{number}", f"http://{host}.example/", owner=owner)
    outbox = box.of()
    claims = [await claimed(outbox) for _ in range(limit)]
    assert await outbox.claim() is None
    await box.put("other", "http://other.example/", owner="other")
    assert (await claimed(outbox)).job_id == "other"
    await outbox.delivered(claims[0])
    await box.make_due("job-200")
    assert (await claimed(outbox)).job_id == "job-200"


# Attempts


@pytest.mark.parametrize("failures", range(1, len(RETRY_S)))
async def test_pauses_grow_as_standard_webhooks_suggests(box: Box, failures: int) -> None:
    patient = SETTINGS.model_copy(update={"give_up_s": 1e6})
    outbox = box.of(patient, RETRY_S)
    await box.put("a", "http://x.example/")
    for _ in range(failures):
        await box.make_due("a")
        assert await outbox.failed(await claimed(outbox), "status 500") == "waits"
    assert await box.due_in_s("a") == pytest.approx(RETRY_S[failures - 1], rel=0.25)


async def test_the_last_attempt_is_at_the_end_of_the_time_and_then_the_next_event_goes_on(
    box: Box,
) -> None:
    outbox = box.of(SETTINGS.model_copy(update={"give_up_s": 100}), RETRY_S)
    event = await box.put("a", "http://x.example/")
    await box.put("a", "http://x.example/")
    for _ in range(2):
        await box.make_due("a")
        assert await outbox.failed(await claimed(outbox), "status 500") == "waits"
    assert await box.due_in_s("a") == pytest.approx(100, abs=30)
    await box.redis.hset(f"{box.namespace}:hooks-try:a", "first", "1000")  # long ago
    await box.make_due("a")
    claim = await claimed(outbox)
    assert await outbox.failed(claim, "status 503") == "ended"
    assert await box.due_in_s("a") <= 0
    following = await claimed(outbox)
    assert following.attempt == 1
    assert await outbox.delivered(following) == "ended"
    (dead,) = await box.dead()
    assert (dead["job_id"], dead["reason"], dead["attempts"]) == ("a", "status 503", 3)
    assert json.loads(dead["event"])["id"] == event
    assert await box.keys() == {"hooks-dead"}


async def test_no_more_than_the_last_thousand_dead_events_are_kept(box: Box) -> None:
    outbox = box.of()
    for number in range(DEAD + 5):
        await box.put(f"job-{number}", "http://x.example/")
        await outbox.failed(await claimed(outbox), "status 410", again=False)
    dead = await box.dead()
    assert len(dead) == DEAD
    assert dead[0]["job_id"] == f"job-{DEAD + 4}"


async def test_the_backlog_counts_jobs_and_tells_how_long_the_oldest_has_been_due(box: Box) -> None:
    outbox = box.of()
    queue = JobQueue(lambda: box.redis, box.namespace, keep_s=1, lease_s=1)
    assert await queue.backlog() == (0, 0, 0)
    await box.put("a", "http://x.example/")
    await box.put("a", "http://x.example/")
    await box.put("b", "http://x.example/")
    seconds, _ = await box.redis.time()
    await box.redis.zadd(f"{box.namespace}:outbox", {"a": seconds - 100})
    backlog = await queue.backlog()
    assert backlog.webhooks == 2
    assert 99 < backlog.late_s < 200
    await claimed(outbox)
    await claimed(outbox)
    assert await queue.backlog() == (0, 2, 0)


# Deliveries


async def test_the_events_of_a_job_arrive_in_order_with_failures_in_between(box: Box) -> None:
    arrived: dict[str, list[str]] = defaultdict(list)
    tries: dict[str, int] = defaultdict(int)

    async def answer(received: Received, writer: asyncio.StreamWriter) -> None:
        tries[received.id] += 1
        good = tries[received.id] > len(received.id) % 2 + int(received.id[-1], 16) % 3
        if good:
            arrived[json.loads(received.body)["data"]["job_id"]].append(received.id)
        await status(204 if good else 500)(received, writer)

    async with Receiver(answer) as receiver:
        put: dict[str, list[str]] = defaultdict(list)
        for _ in range(4):
            for job_id in "abcdef":
                put[job_id].append(await box.put(job_id, receiver.url))
        async with delivering(box.of()), delivering(box.of()):
            await until(box.is_empty)
    assert arrived == put
    assert max(tries.values()) > 1


async def test_an_event_that_is_written_during_delivery_follows_at_once(box: Box) -> None:
    going_on = asyncio.Event()

    async def slow(received: Received, writer: asyncio.StreamWriter) -> None:
        await going_on.wait()
        await status(204)(received, writer)

    async with Receiver(in_turn(slow, status(204))) as receiver, delivering(box.of()):
        first = await box.put("a", receiver.url)
        await until(lambda: receiver.open == 1)
        second = await box.put("a", receiver.url)
        going_on.set()
        await until(box.is_empty)
    assert receiver.ids == [first, second]


async def test_410_ends_an_event_and_the_next_goes_on(box: Box) -> None:
    async with Receiver(in_turn(status(410), status(204))) as receiver, delivering(box.of()):
        ids = [await box.put("a", receiver.url) for _ in range(2)]
        await until(lambda: len(receiver.received) == 2)
        assert receiver.ids == ids
    (dead,) = await box.dead()
    assert dead["reason"] == "status 410"


async def test_a_receiver_that_never_succeeds_is_given_up(box: Box) -> None:
    brief = SETTINGS.model_copy(update={"give_up_s": 0.2})
    async with Receiver(status(500)) as bad, Receiver() as good, delivering(box.of(brief), brief):
        lost = await box.put("a", bad.url)
        following = await box.put("a", good.url)
        await until(lambda: good.ids == [following])
    assert set(bad.ids) == {lost}
    assert len(bad.ids) > 1
    assert [entry["reason"] for entry in await box.dead()] == ["status 500"]


async def test_a_receiver_that_hangs_holds_up_only_itself(box: Box) -> None:
    async with Receiver(hang) as bad, Receiver() as good, delivering(box.of()):
        for number in range(100):
            await box.put(f"bad-{number}", f"http://bad.example:{bad.port}/")
        await until(lambda: bad.open == PER_HOST)
        for number in range(20):
            await box.put(f"good-{number}", f"http://good.example:{good.port}/")
        await until(lambda: len(good.received) == 20)
        assert bad.open == PER_HOST
        assert bad.most_open == PER_HOST


# Ends


async def test_it_ends_whenever_it_is_cancelled(box: Box) -> None:
    sender = Sender(SETTINGS, b"master")
    async with Receiver() as receiver:
        for turns in range(150):
            await box.put(f"job-{turns}", receiver.url)
            task = asyncio.create_task(deliver_forever(box.of(), sender))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await until(task.done)
            assert task.cancelled()
    sender.close()


async def test_the_next_deliverer_repeats_what_a_killed_one_had_sent(
    box: Box, server: RedisServer
) -> None:
    async with Receiver(hang) as receiver:
        event = await box.put("a", receiver.url, note="the same content")
        command = [sys.executable, "-m", "tests.jobs.deliverer", server.url, box.namespace, "2"]
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            await until(lambda: len(receiver.received) == 1)
        finally:
            process.kill()
            process.wait()
        await until(lambda: receiver.open == 0)
        receiver.answer = status(204)
        async with delivering(box.of(HASTY), HASTY):
            await until(box.is_empty)
    first, second = receiver.received
    assert first.id == second.id == event
    assert first.body == second.body


async def test_a_redis_that_is_killed_in_the_middle_loses_no_event(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    holding = asyncio.Event()

    async def answer(received: Received, writer: asyncio.StreamWriter) -> None:
        await holding.wait()
        await status(204)(received, writer)

    with RedisServer(tmp_path) as server:
        async with connected(server) as redis:
            box = Box(redis)
            async with Receiver(answer) as receiver, delivering(box.of(HASTY), HASTY):
                put = [await box.put(f"job-{n % 12}", receiver.url) for n in range(36)]
                await until(lambda: receiver.open == PER_HOST)
                server.kill()
                holding.set()
                await until(lambda: "Redis does not answer" in caplog.text)
                server.start()
                await until(box.is_empty)
            assert set(receiver.ids) == set(put)
            content: dict[str, set[str]] = defaultdict(set)
            for received in receiver.received:
                content[received.id].add(received.body)
            assert all(len(bodies) == 1 for bodies in content.values())


async def test_a_redis_that_hangs_is_reported_once_and_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ray.serve.imagen.webhooks")
    with RedisServer(tmp_path) as server:
        async with connected(server, timeout_s=0.1) as redis:
            box = Box(redis)
            async with Receiver() as receiver, delivering(box.of(HASTY), HASTY):
                server.freeze()
                with pytest.raises(JobsUnavailable):
                    await box.of().claim()
                await until(lambda: "does not answer" in caplog.text)
                server.thaw()
                await until(lambda: "answers again" in caplog.text)
                event = await box.put("a", receiver.url)
                await until(lambda: receiver.ids == [event])
            assert caplog.text.count("does not answer") == 1
