"""The queue in a real Redis: each job ends once, whoever dies, and owners take turns."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import pytest

from deployments.errors import JobsUnavailable
from deployments.tasks import Task
from serve_app.jobs.connection import connect
from serve_app.jobs.queue import Beat, JobQueue
from serve_app.jobs.record import JobSpec, new_job_id
from tests.jobs.redis_server import RedisServer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator
    from pathlib import Path

MOST = {"max_queued": 1000, "max_of_owner": 1000}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
async def queue(server: RedisServer) -> AsyncGenerator[JobQueue]:
    redis = connect(server.url)
    await redis.flushall()
    yield JobQueue(lambda: redis, "test", keep_s=60, lease_s=30)
    await redis.aclose()


def spec(owner: str = "a", task: Task = Task.COMIC, **changes: object) -> JobSpec:
    made = JobSpec(
        job_id=new_job_id(),
        owner=owner,
        task=task,
        request={"seed": 7},
        output_format="png",
        width_px=8,
        height_px=8,
        has_image=True,
        fingerprint="f",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


async def submit(queue: JobQueue, *specs: JobSpec) -> list[str]:
    for one in specs:
        assert await queue.submit(one, **MOST) == ("queued", one.job_id, "queued")
    return [one.job_id for one in specs]


async def claim(queue: JobQueue, count: int = 1, task: Task = Task.COMIC) -> list[str]:
    return [job.spec.job_id for job in await queue.claim({task: count})]


async def status(queue: JobQueue, job_id: str) -> str:
    job = await queue.get(job_id)
    assert job
    return job.status


async def test_a_job_goes_from_queued_through_processing_to_its_one_end(queue: JobQueue) -> None:
    [job_id] = await submit(queue, spec())
    assert await status(queue, job_id) == "queued"
    [job] = await queue.claim({Task.COMIC: 5})
    assert (job.spec.job_id, job.attempts, job.spec.request) == (job_id, 0, {"seed": 7})
    assert await status(queue, job_id) == "processing"
    ends = [
        await queue.finish(job_id, "completed", {"results": "[]"}, "{}", claim=job.claim),
        await queue.finish(job_id, "canceled", {}, "{}"),
        await queue.finish(job_id, "failed", {}, "{}", claim=job.claim),
    ]
    assert ends == [("completed", True), ("completed", False), ("completed", False)]
    assert [event.name for event in await queue.events(job_id)] == [
        "queued",
        "processing",
        "completed",
    ]
    assert await queue.reap(5) == []
    assert await claim(queue) == []


async def test_what_a_worker_says_after_it_lost_the_job_counts_for_nothing(
    queue: JobQueue, server: RedisServer
) -> None:
    impatient = JobQueue(queue._redis, "test", keep_s=60, lease_s=0)
    [job_id] = await submit(queue, spec())
    [lost] = await impatient.claim({Task.COMIC: 1})
    assert await queue.reap(5) == []
    [again] = await queue.claim({Task.COMIC: 1})
    assert (again.spec.job_id, again.claim) == (job_id, "2")
    assert await queue.heartbeat([Beat(job_id, lost.claim, {})]) == {job_id}
    ended = await queue.finish(job_id, "completed", {}, "{}", claim=lost.claim)
    assert ended == ("processing", False)
    ended = await queue.finish(job_id, "completed", {}, "{}", claim=again.claim)
    assert ended == ("completed", True)


async def test_a_renewed_claim_holds(queue: JobQueue) -> None:
    impatient = JobQueue(queue._redis, "test", keep_s=60, lease_s=0)
    [job_id] = await submit(queue, spec())
    [job] = await impatient.claim({Task.COMIC: 1})
    beat = Beat(job_id, job.claim, {"steps_done": "3", "steps": "9"}, "progress", '{"a": 1}')
    assert await queue.heartbeat([beat]) == set()
    await queue.reap(5)
    renewed = await queue.get(job_id)
    assert renewed
    assert (renewed.status, renewed.steps_done, renewed.steps) == ("processing", 3, 9)
    assert (await queue.events(job_id))[-1][1:] == ("progress", '{"a": 1}')


async def test_after_redis_was_away_workers_come_before_whoever_takes_their_claims_for_void(
    queue: JobQueue,
) -> None:
    impatient = JobQueue(queue._redis, "test", keep_s=60, lease_s=0)
    [job_id] = await submit(queue, spec())
    await impatient.claim({Task.COMIC: 1})
    seconds, _ = await queue._redis().time()
    long_ago = {"last": seconds - 1000, "from": 0}
    await queue._redis().hset("test:reaper", mapping=long_ago)  # type: ignore[misc]
    for _ in range(2):
        await queue.reap(5)
        assert await status(queue, job_id) == "processing"
    await queue._redis().hset("test:reaper", "from", seconds - 1)  # type: ignore[misc]
    await queue.reap(5)
    assert await status(queue, job_id) == "queued"


async def test_a_job_that_loses_its_worker_too_often_is_to_be_ended(queue: JobQueue) -> None:
    impatient = JobQueue(queue._redis, "test", keep_s=60, lease_s=0)
    [job_id] = await submit(queue, spec())
    for begun in range(1, 4):
        assert await queue.reap(3) == []
        [job] = await impatient.claim({Task.COMIC: 1})
        assert job.attempts == begun - 1
        await impatient.heartbeat([Beat(job_id, job.claim, {"attempts": str(begun)})])
    assert await queue.reap(3) == [(job_id, "lost")]
    await queue.finish(job_id, "failed", {}, "{}", dead=True)
    assert [job.spec.job_id for job in await queue.dead()] == [job_id]


async def test_claims_of_which_no_model_heard_cost_no_attempt_and_yet_have_an_end(
    queue: JobQueue,
) -> None:
    impatient = JobQueue(queue._redis, "test", keep_s=60, lease_s=0)
    [job_id] = await submit(queue, spec())
    for _ in range(12):
        assert await queue.reap(3) == []
        [job] = await impatient.claim({Task.COMIC: 1})
        assert job.attempts == 0
    assert await queue.reap(3) == [(job_id, "lost")]


async def test_a_job_past_its_deadline_is_to_be_ended_wherever_it_is(queue: JobQueue) -> None:
    waiting, running = await submit(queue, spec(deadline_s=0), spec(task=Task.AGED, deadline_s=0))
    await queue.claim({Task.AGED: 1})
    assert sorted(await queue.reap(5)) == sorted([(waiting, "late"), (running, "late")])


async def test_owners_take_turns(queue: JobQueue) -> None:
    await submit(queue, *(spec("a") for _ in range(50)))
    first = await claim(queue, 3)
    of_b = await submit(queue, *(spec("b") for _ in range(5)))
    ten = await claim(queue, 10)
    assert set(of_b) <= set(ten)
    assert len(first) == 3


async def test_interactive_jobs_go_first_and_batch_ones_of_others_still_move(
    queue: JobQueue,
) -> None:
    batch = await submit(queue, *(spec("a", priority="batch") for _ in range(5)))
    quick = await submit(queue, *(spec("b") for _ in range(30)))
    order = await claim(queue, 35)
    assert set(order[:9]) <= set(quick)
    assert set(batch) & set(order[:23])


async def test_an_owner_with_both_priorities_has_one_turn_and_its_interactive_jobs_first(
    queue: JobQueue,
) -> None:
    batch = await submit(queue, *(spec("a", priority="batch") for _ in range(10)))
    quick = await submit(queue, *(spec("a") for _ in range(10)))
    others = await submit(queue, *(spec("b") for _ in range(20)))
    order = await claim(queue, 40)
    assert len(set(others) & set(order[:20])) == 10
    mine = [job_id for job_id in order if job_id not in others]
    assert set(mine[:10]) == set(quick)
    assert set(mine[10:]) == set(batch)


async def test_a_batch_job_does_not_put_off_the_next_interactive_one_of_its_owner(
    queue: JobQueue,
) -> None:
    await submit(queue, *(spec("a", priority="batch") for _ in range(3)))
    assert len(await claim(queue, 1)) == 1
    await submit(queue, *(spec("b") for _ in range(20)))
    [mine] = await submit(queue, spec("a"))
    assert mine in await claim(queue, 2)


async def test_an_owner_that_waited_with_batch_jobs_has_saved_no_turns(queue: JobQueue) -> None:
    others = await submit(queue, *(spec("b") for _ in range(30)))
    await submit(queue, *(spec("a", priority="batch") for _ in range(3)))
    assert set(await claim(queue, 8)) <= set(others)
    mine = await submit(queue, *(spec("a") for _ in range(10)))
    order = await claim(queue, 10)
    assert len(set(mine) & set(order)) == 5
    assert order[0] in mine or order[1] in mine


async def test_canceled_jobs_leave_the_order_as_it_was(queue: JobQueue) -> None:
    [gone] = await submit(queue, spec("a"))
    batch = await submit(queue, *(spec("a", priority="batch") for _ in range(3)))
    quick = await submit(queue, *(spec("b") for _ in range(9)))
    await queue.finish(gone, "canceled", {}, "{}")
    order = await claim(queue, 20)
    assert set(order[:9]) == set(quick)
    assert set(order[9:]) == set(batch)


@pytest.mark.parametrize("seed", range(4))
async def test_the_position_is_how_many_claims_away_a_job_is(queue: JobQueue, seed: int) -> None:
    rng = random.Random(seed)
    made = [
        spec(rng.choice("abc"), priority=rng.choice(["interactive", "batch"])) for _ in range(20)
    ]
    await submit(queue, *made[:10])
    await claim(queue, 3)
    await submit(queue, *made[10:])
    waiting = [job for job in await queue.read([one.job_id for one in made]) if job.position]
    told = {job.spec.job_id: job.position for job in waiting}
    order = await claim(queue, 40)
    assert len(order) == len(told)
    # Owners that are even are served in either order.
    assert all(abs(told[job_id] - place) <= 3 for place, job_id in enumerate(order, 1))
    mine = [job_id for job_id in order if told[job_id] == 1]
    assert mine


async def test_a_canceled_job_is_never_run(queue: JobQueue) -> None:
    gone, kept = await submit(queue, spec(), spec())
    assert await queue.finish(gone, "canceled", {}, "{}") == ("canceled", True)
    assert await claim(queue, 5) == [kept]
    assert (await queue.depth())[Task.COMIC][:2] == (0, 1)


async def test_the_same_key_finds_the_first_job(queue: JobQueue) -> None:
    first = spec()
    assert (await queue.submit(first, idempotency_key="k", **MOST)).outcome == "queued"
    again = await queue.submit(spec(), idempotency_key="k", **MOST)
    assert again == ("same", first.job_id, "queued")
    other = await queue.submit(spec(fingerprint="g"), idempotency_key="k", **MOST)
    assert other == ("conflict", first.job_id, "queued")
    assert (await queue.submit(spec("b"), idempotency_key="k", **MOST)).outcome == "queued"
    checked = await queue.submit(spec(), idempotency_key="k", only_check=True, **MOST)
    assert checked == ("same", first.job_id, "queued")
    assert (await queue.submit(spec(), only_check=True, **MOST)).outcome == "queued"
    assert len(await claim(queue, 9)) == 2
    again = await queue.submit(spec(), idempotency_key="k", **MOST)
    assert again == ("same", first.job_id, "processing")


@pytest.mark.parametrize("key", ["", "k"])
async def test_a_submission_that_is_sent_again_after_a_broken_connection_changes_nothing(
    queue: JobQueue, key: str
) -> None:
    made = spec()
    sent = await queue.submit(made, idempotency_key=key, **MOST)
    assert sent == ("queued", made.job_id, "queued")
    assert await claim(queue) == [made.job_id]
    sent = await queue.submit(made, idempotency_key=key, **MOST)
    assert sent == ("queued", made.job_id, "processing")
    assert (await status(queue, made.job_id), await claim(queue)) == ("processing", [])


async def test_one_of_many_equal_submissions_wins(queue: JobQueue) -> None:
    made = [spec() for _ in range(20)]
    found = await asyncio.gather(*(queue.submit(one, idempotency_key="k", **MOST) for one in made))
    assert len({one.detail for one in found}) == 1
    assert len(await claim(queue, 30)) == 1


async def test_a_full_queue_and_a_full_share_refuse(queue: JobQueue) -> None:
    await submit(queue, spec("a"), spec("a"), spec("b"))
    few = {"max_queued": 3, "max_of_owner": 9}
    assert await queue.submit(spec("c"), **few) == ("full", "3", "")
    share = {"max_queued": 9, "max_of_owner": 2}
    assert await queue.submit(spec("a"), **share) == ("share", "2", "")
    assert (await queue.submit(spec("b"), **share)).outcome == "queued"


async def test_pages_go_through_all_jobs_of_an_owner_newest_first(queue: JobQueue) -> None:
    mine = await submit(queue, *(spec("a") for _ in range(7)))
    await submit(queue, spec("b"))
    await queue.finish(mine[2], "canceled", {}, "{}")
    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page, cursor = await queue.list("a", None, cursor, 3)
        seen += [job.spec.job_id for job in page]
    assert seen == sorted(mine, reverse=True)
    page, cursor = await queue.list("a", "canceled", "", 3)
    assert ([job.spec.job_id for job in page], cursor) == ([mine[2]], None)


async def test_after_the_sweep_nothing_of_a_job_is_left(queue: JobQueue) -> None:
    forgetful = JobQueue(queue._redis, "test", keep_s=0, lease_s=30)
    for end in ("completed", "failed", "canceled"):
        made = spec()
        await queue.submit(made, idempotency_key=end, **MOST)
        [job] = await queue.claim({Task.COMIC: 1})
        await forgetful.finish(made.job_id, end, {}, "{}", claim=job.claim, dead=True)
    assert len(await queue.sweep()) == 3
    left = {key async for key in queue._redis().scan_iter()}
    assert left <= {"test:turn:comic", "test:pace"}


async def test_of_the_ended_jobs_of_an_owner_only_so_many_are_kept(queue: JobQueue) -> None:
    tight = JobQueue(queue._redis, "test", keep_s=60, lease_s=30, max_kept=3)
    others = await submit(queue, *(spec("b") for _ in range(4)))
    mine = sorted(await submit(queue, *(spec("a") for _ in range(6))))
    ends = ["completed", "failed", "canceled", "completed", "failed"]
    for job_id, end in zip(mine, ends, strict=False):
        assert await tight.finish(job_id, end, {}, "{}", dead=True) == (end, True)  # type: ignore[arg-type]
    await tight.finish(others[0], "canceled", {}, "{}")
    kept, _ = await queue.list("a", None, "", 100)
    assert [job.spec.job_id for job in kept] == mine[:1:-1]
    assert sorted(await queue.sweep()) == mine[:2]
    assert await queue.get(mine[0]) is None
    assert await status(queue, mine[2]) == "canceled"
    assert await status(queue, mine[5]) == "queued"
    assert {job.spec.job_id for job in await queue.dead()} == set(mine[2:5])
    assert await status(queue, others[0]) == "canceled"


async def test_so_many_pictures_of_an_owner_are_kept_and_swept_when_they_end(
    queue: JobQueue,
) -> None:
    first, second = new_job_id(), new_job_id()
    assert await queue.keep(first, "a", 6, most=8, seconds=30) == 0
    assert await queue.keep(first, "a", 6, most=8, seconds=40) == 0, "the same, not more"
    assert await queue.keep(second, "a", 2, most=8, seconds=50, only_check=True) == 0
    assert await queue.keep(second, "a", 2, most=8, seconds=50) == 0
    for others, wait_s in ((1, 40), (6, 40), (7, 50), (8, 50)):
        told = await queue.keep(new_job_id(), "a", others, most=8, seconds=30)
        assert told == pytest.approx(wait_s, abs=5)
    assert await queue.keep(new_job_id(), "b", 8, most=8, seconds=30) == 0
    assert await queue.sweep() == []
    assert await queue.keep(first, "a", 6, most=8, seconds=0) == 0
    assert await queue.sweep() == [first]
    assert await queue.keep(new_job_id(), "a", 6, most=8, seconds=0) == 0


async def test_an_event_for_the_webhook_is_written_with_the_change(queue: JobQueue) -> None:
    told = spec(webhook="https://a.example", webhook_events=("processing", "completed"))
    await submit(queue, told)
    [job] = await queue.claim({Task.COMIC: 1})
    await queue.finish(told.job_id, "completed", {}, '{"x": 1}', claim=job.claim)
    hooks = await queue._redis().lrange(f"test:hooks:{told.job_id}", 0, -1)  # type: ignore[misc]
    assert [json.loads(hook)["type"] for hook in hooks] == ["job.processing", "job.completed"]
    assert '"data":{"x": 1}' in hooks[1]
    assert await queue._redis().zcard("test:outbox") == 1


async def test_a_redis_that_is_away_is_an_error_of_ours_and_its_data_are_back_with_it(
    tmp_path: Path,
) -> None:
    with RedisServer(tmp_path) as server:
        queue = JobQueue(cache(lambda: connect(server.url)), "test", keep_s=60, lease_s=30)
        [job_id] = await submit(queue, spec())
        server.kill()
        with pytest.raises(JobsUnavailable):
            await queue.get(job_id)
        server.start()
        assert await claim(queue) == [job_id]
        await queue._redis().aclose()
