"""What a replica accepts: nothing that cannot end in time, and everything that can."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deployments.admission import MAX_REQUESTS, Admission, Ticket
from deployments.contract import ComicRequest, EnhanceRequest, ImageJob
from deployments.engine.grouping import GroupLimits, Pace, choose
from deployments.engine.pipeline import Work
from deployments.engine.row import Row, RowInput
from deployments.errors import Full, TooLate, TooMuchWork
from deployments.estimate import Estimator, Forecast, Size
from deployments.model import ModelDeployment
from deployments.seats import Seats

if TYPE_CHECKING:
    from collections.abc import Iterable

    from deployments.contract import ImageRequest

TIMEOUT_S = 60.0


def do_nothing() -> None:
    pass


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Replica:
    """Accepts requests, and ends the one of the earliest deadline at each `finish`."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.admission = Admission(self.clock)
        self.inside: dict[Ticket, ExitStack] = {}
        self.given_up = 0

    def take(self, seconds: float | None, timeout_s: float = TIMEOUT_S) -> Ticket:
        stack = ExitStack()
        ticket = stack.enter_context(
            self.admission.admit(seconds, timeout_s, self._give_up, TIMEOUT_S)
        )
        self.inside[ticket] = stack
        return ticket

    def _give_up(self) -> None:
        self.given_up += 1

    def take_all(self, seconds: Iterable[float]) -> int:
        """How many were taken."""
        before = len(self.inside)
        for one_s in seconds:
            try:
                self.take(one_s)
            except Full:
                continue
        return len(self.inside) - before

    def leave(self, after_s: float) -> None:
        """A client asks for three seconds of work, and gives up before the first step is done."""
        ticket = self.take(3.0)
        ticket.rows = [row(steps_left=4)]
        self.clock.now_s += after_s
        self.inside.pop(ticket).close()

    def finish(self, slowdown: float = 1.0) -> Ticket:
        ticket = min(self.inside, key=lambda one: one.deadline_s)
        self.clock.now_s += ticket.seconds * slowdown
        ticket.rows = [row(steps_left=0)]
        self.inside.pop(ticket).close()
        return ticket


def row(steps_left: int, steps: int = 4, cost_px: int = 1, deadline_s: float = 1e9) -> Row:
    made = Row(RowInput(None, np.zeros((1, 1, 3), np.uint8), 0, deadline_s))
    made.progress.steps, made.progress.steps_left = steps, steps_left
    made.progress.cost_px = cost_px
    return made


def test_an_idle_replica_takes_whatever_can_be_done_in_time() -> None:
    assert Replica().take(59.0)
    with pytest.raises(TooLate):
        Replica().take(11.0, timeout_s=10.0)


def test_a_request_of_unknown_length_is_always_taken() -> None:
    replica = Replica()
    assert replica.take_all([1.0] * 200) < 200
    assert replica.take(None)


def test_a_queue_is_filled_until_time_is_up_and_then_refused() -> None:
    replica = Replica()
    taken = replica.take_all([2.0] * 100)
    assert 15 <= taken <= 30
    with pytest.raises(Full) as caught:
        replica.take(2.0)
    assert f"{taken} requests" in caught.value.value
    assert caught.value.remedy


@example([(24.31016388269027, 24.31016388269027), (1.0, 5.0)])
@given(st.lists(st.tuples(st.floats(0.1, 50), st.floats(5, 60)), min_size=1, max_size=100))
def test_what_is_taken_ends_in_time(requests: list[tuple[float, float]]) -> None:
    replica = Replica()
    for seconds, timeout_s in requests:
        try:
            replica.take(seconds, timeout_s)
        except (Full, TooLate):
            continue
    while replica.inside:
        assert replica.finish().deadline_s >= replica.clock.now_s - 1e-6


def test_a_request_in_a_hurry_does_not_make_an_accepted_one_late() -> None:
    replica = Replica()
    replica.take(20.0, timeout_s=35.0)
    with pytest.raises(Full):
        replica.take(10.0, timeout_s=30.0)
    assert replica.take(10.0, timeout_s=60.0)


def test_a_request_that_leaves_makes_room() -> None:
    replica = Replica()
    replica.take_all([2.0] * 100)
    with pytest.raises(Full):
        replica.take(2.0)
    replica.finish()
    assert replica.take(2.0)


def test_clients_that_leave_early_do_not_make_the_replica_look_slow() -> None:
    replica = Replica()
    for _ in range(200):
        replica.leave(after_s=0.3)
    assert replica.admission.slowdown == 1.0
    replica.take(1.0)
    replica.finish()
    assert replica.admission.slowdown == pytest.approx(1.0)
    assert replica.take_all([2.0] * 100) >= 15


def test_work_is_counted_once_however_many_clients_leave_meanwhile() -> None:
    replica = Replica()
    long = replica.take(40.0)
    for steps_left in (3, 2, 1):
        replica.clock.now_s += 9.8
        long.rows = [row(steps_left)]
        replica.leave(after_s=0.2)
    replica.clock.now_s += 10
    long.rows = [row(steps_left=0)]
    replica.inside.pop(long).close()
    assert replica.admission.slowdown == pytest.approx(1.0, rel=0.05)


def test_each_refused_client_gets_a_retry_after_of_its_own() -> None:
    replica = Replica()
    replica.take_all([2.0] * 30)
    waits_s: list[float] = []
    for _ in range(40):
        with pytest.raises(Full) as caught:
            replica.take(2.0)
        assert caught.value.retry_after_s is not None
        waits_s.append(caught.value.retry_after_s)
    assert waits_s == sorted(waits_s)
    assert 1 <= waits_s[0] < waits_s[10] < waits_s[-1] == TIMEOUT_S


def test_a_client_that_comes_back_after_retry_after_is_taken() -> None:
    replica = Replica()
    while replica.take_all([2.0]) == 1:
        pass
    replica.finish()
    assert replica.take(2.0)
    with pytest.raises(Full) as caught:
        replica.take(2.0)
    back_s = replica.clock.now_s + (caught.value.retry_after_s or 0)
    while replica.clock.now_s < back_s:
        replica.finish()
    assert replica.take(2.0)


def test_a_replica_that_got_slower_takes_fewer() -> None:
    quick, slow = Replica(), Replica()
    for replica, slowdown in ((quick, 1.0), (slow, 3.0)):
        for _ in range(20):
            replica.take(1.0)
            replica.finish(slowdown)
    assert slow.admission.slowdown == pytest.approx(3.0)
    assert slow.take_all([1.0] * 100) < quick.take_all([1.0] * 100) / 2


def test_requests_that_became_late_while_they_waited_are_given_up() -> None:
    replica = Replica()
    taken = replica.take_all([2.0] * 100)
    replica.finish(slowdown=4.0)
    late = [ticket for ticket in replica.inside if ticket.refusal]
    assert late
    assert replica.given_up == len(late)
    assert all(ticket.refusal and ticket.refusal.retry_after_s for ticket in late)
    for ticket in late:
        replica.inside.pop(ticket).close()
    assert len(replica.inside) > taken / 4
    while replica.inside:
        assert replica.finish(slowdown=4.0).deadline_s >= replica.clock.now_s


def test_a_crowd_of_refused_clients_does_not_keep_later_ones_away() -> None:
    replica = Replica()
    replica.take_all([2.0] * 1000)
    while replica.inside:
        replica.finish()
    replica.clock.now_s += TIMEOUT_S
    while replica.take_all([2.0]) == 1:
        pass
    replica.finish()
    assert replica.take(2.0)
    with pytest.raises(Full) as caught:
        replica.take(2.0)
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s < 10


def test_no_more_requests_are_held_than_fit_the_memory() -> None:
    replica = Replica()
    assert replica.take_all([0.001] * 500) == MAX_REQUESTS
    with pytest.raises(Full) as caught:
        replica.take(0.001)
    assert caught.value.retry_after_s == 1


def timed(pace: Pace, cost_px: int, seconds: float, times: int = 3) -> Pace:
    for _ in range(times):
        pace.record([row(1, cost_px=cost_px)], seconds)
    return pace


def test_a_forecast_is_made_of_what_was_measured() -> None:
    forecast = Forecast(timed(Pace(), 1000, 0.5))
    px = 2**20
    work = Work(steps=10, step_px=1000, stage_px=px)
    assert forecast.seconds(work, px) == pytest.approx(5.0)
    forecast.record(work, px, {"vae": 1.0, "decode": 0.15, "encode": 0.1, "queue": 9.0})
    assert forecast.seconds(work, px) == pytest.approx(6.25)
    assert forecast.seconds(work, 4 * px) == pytest.approx(7.0)


def test_small_pictures_tell_nothing_of_large_ones() -> None:
    """Most of a thumbnail's time is the same for any size: it must not refuse a photo."""
    forecast = Forecast(timed(Pace(), 1000, 0.5))
    small = Work(steps=10, step_px=1000, stage_px=64 * 64)
    forecast.record(small, 64 * 64, {"vae": 0.1, "decode": 0.01, "encode": 0.02})
    photo = Work(steps=10, step_px=1000, stage_px=12_000_000)
    assert forecast.seconds(photo, 12_000_000) == pytest.approx(5.0)


def test_a_forecast_waits_for_three_passes_of_a_row_alone() -> None:
    work = Work(steps=10, step_px=1000, stage_px=100)
    assert Forecast(Pace()).seconds(work, 100) is None
    assert Forecast(timed(Pace(), 1000, 0.5, times=2)).seconds(work, 100) is None


def test_a_size_that_was_not_timed_is_estimated_but_not_certain() -> None:
    forecast = Forecast(timed(Pace(), 1000, 0.5))
    other = Work(steps=1, step_px=8000, stage_px=100)
    assert forecast.seconds(other, 100) == pytest.approx(4.0)
    assert not forecast.is_certain(other)
    assert forecast.is_certain(Work(steps=1, step_px=1000, stage_px=100))


class FakePipeline:
    """As many pixels of work as the picture has, or 1,000 without one, at each step."""

    def work(self, width_px: int, height_px: int, request: Any) -> Work:
        return Work(request.steps, width_px * height_px or 1000, 1)


def estimator() -> Estimator:
    pipeline: Any = FakePipeline()
    return Estimator(pipeline, Forecast(timed(Pace(), 1000, 0.5)), scale=1)


def test_a_request_that_no_replica_could_finish_is_refused_with_the_largest_that_fits() -> None:
    size, request = Size(50, 20), ComicRequest(steps=10, strength=1.0)
    assert estimator().seconds(request, size, 6.0) == pytest.approx(5.0)
    with pytest.raises(TooMuchWork) as caught:
        estimator().seconds(request, size, 5.9)
    assert caught.value.remedy == "Send steps=9 at most, which takes about 4 s."
    with pytest.raises(TooMuchWork) as caught:
        estimator().seconds(request.model_copy(update={"steps": 1}), size, 0.3)
    assert caught.value.remedy == "Send a picture of at most 35 x 14 px."


def test_full_detail_that_takes_too_long_is_refused_with_what_takes_less() -> None:
    class Tiled(FakePipeline):
        def work(self, width_px: int, height_px: int, request: Any) -> Work:
            return Work(10 if request.detail == "full" else 1, 1000, 1)

    pipeline: Any = Tiled()
    estimator = Estimator(pipeline, Forecast(timed(Pace(), 1000, 0.5)), scale=1)
    size, request = Size(50, 20), EnhanceRequest(detail="full")
    with pytest.raises(TooMuchWork) as caught:
        estimator.seconds(request, size, 2)
    assert caught.value.remedy == (
        "Send detail=working, which takes about 0 s, or make a job of it (Prefer: respond-async)."
    )
    assert estimator.seconds(request, size, 600, is_job=True) == pytest.approx(5.0)
    with pytest.raises(TooMuchWork) as caught:
        estimator.seconds(request, size, 5, is_job=True)
    assert caught.value.remedy == "Send detail=working, which takes about 0 s."


def test_a_request_without_a_picture_is_estimated_and_refused_likewise() -> None:
    size, request = Size(0, 0), ComicRequest(steps=10, strength=1.0)
    assert estimator().seconds(request, size, 6.0) == pytest.approx(5.0)
    estimator().record(request, size, {"vae": 1.0, "decode": 0.0, "encode": 0.1})
    with pytest.raises(TooMuchWork) as caught:
        estimator().seconds(request, size, 0.1)
    assert caught.value.remedy == "Use another model, or a faster machine."


def test_a_pass_that_shared_the_machine_does_not_raise_the_forecast() -> None:
    pace = timed(Pace(), 1000, 0.5)
    timed(pace, 1000, 5.0, times=5)
    assert pace.alone_s(1000) == pytest.approx(0.5)


def test_a_long_request_ends_in_time_however_many_short_ones_are_accepted() -> None:
    """The order prefers short work, but turns to deadlines before one is missed."""
    clock, px_s = Clock(), 0.1
    admission = Admission(clock)
    pace = timed(Pace(), 1, px_s)
    rows: dict[Row, ExitStack] = {}

    def take(steps: int) -> Row | None:
        stack = ExitStack()
        try:
            ticket = stack.enter_context(
                admission.admit(steps * px_s, TIMEOUT_S, do_nothing, TIMEOUT_S)
            )
        except Full:
            return None
        taken = row(steps, steps, deadline_s=ticket.deadline_s)
        taken.progress.arrived_s = clock()
        ticket.rows, rows[taken] = [taken], stack
        return taken

    long = take(350)
    assert long
    while long in rows:
        while take(7):  # as many short ones as are let in
            pass
        (first,) = choose(list(rows), lambda one: one, GroupLimits(1), pace, clock()).rows
        clock.now_s += px_s
        first.progress.steps_left -= 1
        if not first.progress.steps_left:
            assert clock() <= first.input.deadline_s
            rows.pop(first).close()


async def test_requests_whose_time_is_up_at_one_moment_all_end_as_late() -> None:
    class Waiting(ModelDeployment):
        """Its only seat is taken, and every request takes a millisecond."""

        def __init__(self) -> None:
            self._admission = Admission()
            self._seats = Seats(1, 1)
            self._spec: Any = SimpleNamespace(scale=1, buckets=())

        def _estimate_s(self, job: ImageJob, request: ImageRequest) -> float:
            return 0.001

    model, request = Waiting(), ComicRequest()
    job = ImageJob(request, b"", "png", timeout_s=0.05)
    async with model._seats.taken(1):
        calls = [model._admitted(job, request, []) for _ in range(6)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(answer) for answer in answers} <= {TooLate, Full}


def test_full_detail_that_would_be_refused_behind_accepted_work_becomes_the_working_size() -> None:
    class Busy(ModelDeployment):
        """Full detail takes 30 s, the working size 1 s."""

        def __init__(self) -> None:
            self._admission = Admission()
            self._spec: Any = SimpleNamespace(scale=1, buckets=((512, 512),), max_tiles=99)

        def _estimate_s(self, job: ImageJob, request: ImageRequest) -> float:
            assert isinstance(request, EnhanceRequest)
            return 30.0 if request.detail == "full" else 1.0

    def chosen() -> str:
        request, _ = model._settled(job, EnhanceRequest())
        assert isinstance(request, EnhanceRequest)
        return str(request.detail)

    model = Busy()
    job = ImageJob(EnhanceRequest(), b"", "png", timeout_s=TIMEOUT_S, width_px=2000, height_px=1500)
    assert chosen() == "full"
    with model._admission.admit(15.0, TIMEOUT_S, do_nothing, TIMEOUT_S):
        assert chosen() == "working"
        with pytest.raises(Full), model._admission.admit(30.0, TIMEOUT_S, do_nothing, TIMEOUT_S):
            pass
        with model._admission.admit(1.0, TIMEOUT_S, do_nothing, TIMEOUT_S):
            pass


@given(st.lists(st.floats(0.1, 70), max_size=20))
def test_asking_first_gives_the_answer_of_admission(seconds: list[float]) -> None:
    replica = Replica()
    for one_s in seconds:
        takes = replica.admission.takes(one_s, TIMEOUT_S)
        try:
            replica.take(one_s)
        except (Full, TooLate):
            assert not takes
        else:
            assert takes


def test_waiting_for_a_replica_takes_from_the_time_that_is_left() -> None:
    job = ImageJob(ComicRequest(), b"", "png", timeout_s=60, sent_unix_s=1000.0)
    assert job.left_s(1025.0) == 35
    assert job.left_s(5000.0) == job.left_s(900.0) == 60  # a clock that is wrong
