"""The engine's guarantees, on scripted pipelines."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from fakes import (
    FakeMemoryPipeline,
    FakePipeline,
    Harness,
    device_lost,
    do_nothing,
    out_of_memory,
    raising,
    row,
    wait_for,
)
from gathering import Together, until

from deployments.engine.device import is_fatal
from deployments.engine.engine import Engine
from deployments.engine.grouping import GroupLimits
from deployments.engine.row import Progress, Row, RowInput
from deployments.errors import (
    ImagenError,
    InvalidParameter,
    ModelFailed,
    NotReady,
    TooLarge,
    TooLate,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from deployments.engine.row import Pixels

STAGES = ["begin", "step", "finish"]


class LastInstantEngine(Engine):
    """An engine whose thread, done with its last row, takes a while to be gone."""

    def __init__(self, pipeline: Any) -> None:
        self.drained, self.may_end = threading.Event(), threading.Event()
        super().__init__(pipeline)

    def _drain(self) -> None:
        super()._drain()
        if threading.current_thread().name == "engine":
            self.drained.set()
            assert self.may_end.wait(20)


@pytest.fixture
def harness() -> Iterator[Harness]:
    made = Harness()
    yield made
    made.close()


# --- who shares a step ---


def test_rows_of_one_key_share_a_step_up_to_max_batch_size(harness: Harness) -> None:
    harness.start(max_batch_size=4)
    rows = [row() for _ in range(10)]
    harness.together(*rows)
    assert harness.groups == [rows[:4], rows[4:8], rows[8:]]
    assert [one.progress.batch_size for one in rows] == [4] * 8 + [2] * 2


def test_the_limits_may_change_at_any_time(harness: Harness) -> None:
    engine = harness.start(max_batch_size=4)
    engine.limits = GroupLimits(1)
    rows = [row() for _ in range(3)]
    harness.together(*rows)
    assert harness.groups == [[one] for one in rows]

    def narrow() -> None:
        engine.limits = GroupLimits(4, budget_px=2)

    engine.limits = GroupLimits(4)
    rows = [row(steps=2, step=narrow) for _ in range(4)]
    harness.together(*rows)
    assert [len(group) for group in harness.groups[3:]] == [4, 2, 2]


def test_exact_rows_step_alone(harness: Harness) -> None:
    harness.start(max_batch_size=4, exact=True)
    rows = [row(steps=3) for _ in range(5)]
    harness.together(*rows)
    assert [len(group) for group in harness.groups] == [1] * 15
    assert [one.progress.batch_size for one in rows] == [1] * 5


def test_rows_of_different_keys_never_share_a_step(harness: Harness) -> None:
    harness.start(max_batch_size=16)
    rng = random.Random(0)
    rows = [row(key=rng.choice("abcd"), steps=rng.randint(1, 4)) for _ in range(40)]
    harness.together(*rows)
    for group in harness.groups:
        assert len({one.input.request.key for one in group}) == 1
        assert len(set(group)) == len(group) <= 16
    assert all(harness.pipeline.counts[one] == one.input.request.steps for one in rows)


def test_a_late_row_joins_the_next_step(harness: Harness) -> None:
    harness.start()
    late = row(steps=1)
    early = row(steps=3, step=lambda: None if late.progress.arrived_s else harness.let_in(late))
    harness.engines[0].put([early])
    wait_for(early, late)
    assert [set(group) for group in harness.groups] == [{early}, {early, late}, {early}]


def test_what_is_nearly_done_is_done_first_and_the_other_key_waits_its_turn(
    harness: Harness,
) -> None:
    harness.start(max_batch_size=2)
    rows = [row(key=key, steps=3) for key in "aabb"]
    harness.together(*rows)
    assert [group[0].input.request.key for group in harness.groups] == list("aaabbb")


def test_a_crowd_of_one_key_does_not_starve_another(harness: Harness) -> None:
    """However many come later, and keep coming."""
    harness.start(max_batch_size=2)
    lonely = row(key="lonely", steps=5)

    def another() -> None:
        if not lonely.future.done():
            harness.engines[0].put([row(key="crowd", step=another)])

    harness.hold()
    harness.let_in(*[row(key="crowd", step=another) for _ in range(6)], lonely)
    harness.pipeline.gate.set()
    wait_for(lonely)
    assert lonely.future.exception() is None


def test_times_and_shares_add_up(harness: Harness) -> None:
    harness.start()
    nap = partial(time.sleep, 0.005)
    rows = [row(steps=2, step=nap, begin=nap, finish=[nap, nap], cost_px=i + 1) for i in range(4)]
    harness.together(*rows)
    for one in rows:
        assert one.progress.steps == 2
        assert one.progress.steps_left == 0
        assert one.progress.stepping_s >= 2 * 4 * 0.005
        assert one.progress.staging_s >= 3 * 0.005
    shares = [one.progress.compute_s - one.progress.staging_s for one in rows]
    assert sum(shares) == pytest.approx(rows[0].progress.stepping_s)
    assert [share / shares[0] for share in shares] == pytest.approx([1, 2, 3, 4])


# --- what a pass may hold ---


def test_no_group_exceeds_the_budget(harness: Harness) -> None:
    harness.start(max_batch_size=8, budget_px=100)
    rng = random.Random(2)
    rows = [
        row(key=rng.choice("ab"), steps=rng.randint(1, 4), cost_px=rng.choice([1, 7, 30, 60, 100]))
        for _ in range(40)
    ]
    harness.together(*rows)
    costs = [sum(one.input.request.cost_px for one in group) for group in harness.groups]
    assert max(costs) <= 100
    assert max(len(group) for group in harness.groups) > 2
    assert all(one.future.exception() is None for one in rows)
    assert all(harness.pipeline.counts[one] == one.input.request.steps for one in rows)


def test_a_row_that_can_never_fit_is_too_large_before_anything_is_allocated(
    harness: Harness,
) -> None:
    engine = harness.start(budget_px=100)
    large, fine = row(cost_px=101), row(cost_px=100)
    harness.together(large, fine)
    error = large.future.exception()
    assert isinstance(error, TooLarge)
    assert "101" in str(error.value)
    assert "100" in str(error.value)
    assert error.remedy
    assert fine.future.exception() is None
    assert ("begin", large) not in harness.pipeline.pieces
    assert engine.alive
    engine.limits = GroupLimits(4, budget_px=101)
    again = row(cost_px=101)
    engine.put([again])
    wait_for(again)
    assert again.future.exception() is None


@pytest.mark.parametrize("room_px", [1, 2, 3])
def test_out_of_memory_halves_the_group_until_it_fits(harness: Harness, room_px: int) -> None:
    engine = harness.start(FakeMemoryPipeline(room_px), max_batch_size=8)
    rows = [row(result=i) for i in range(8)]
    harness.together(*rows)
    assert all((one.future.result() == i).all() for i, one in enumerate(rows))
    assert [one.progress.batch_size for one in rows] == [min(room_px, 2)] * 8
    assert engine.alive


def test_what_ran_out_of_memory_once_is_not_tried_again(harness: Harness) -> None:
    pipeline = FakeMemoryPipeline(room_px=20)
    engine = harness.start(pipeline, max_batch_size=8, budget_px=1000)
    rows = [row(cost_px=10, steps=5, result=i) for i in range(8)]
    harness.together(*rows)
    assert [one.progress.batch_size for one in rows] == [2] * 8
    assert sum(tried > 20 for tried in pipeline.tried) == 3  # 8 rows, and 4 twice
    assert all((one.future.result() == i).all() for i, one in enumerate(rows))
    # A row alone is tried whatever was learned, and later groups keep to it.
    pipeline.room_px = 30
    large, small = row(cost_px=30), [row(cost_px=5, steps=2) for _ in range(8)]
    harness.together(large, *small)
    assert large.future.exception() is None
    assert max(len(group) for group in harness.groups if group[0] in small) == 4
    # What a person allows still counts where it is less.
    engine.limits = GroupLimits(8, budget_px=10)
    few = [row(cost_px=5) for _ in range(4)]
    harness.together(*few)
    assert [one.progress.batch_size for one in few] == [2] * 4


def test_the_halves_find_the_memory_of_the_failed_step_free(harness: Harness) -> None:
    pipeline = FakeMemoryPipeline(room_px=1)
    harness.start(pipeline, max_batch_size=8)
    gc.disable()  # The device's memory cannot wait for it.
    try:
        harness.together(*[row() for _ in range(8)])
    finally:
        gc.enable()
    assert len(pipeline.held_at_start) == 15
    assert pipeline.held_at_start == [0] * 15


def test_out_of_memory_on_a_single_row_fails_that_row(harness: Harness) -> None:
    engine = harness.start(FakeMemoryPipeline(room_px=1))
    bad = row(step=raising(out_of_memory()))
    good = row()
    harness.together(bad, good)
    assert isinstance(bad.future.exception(), ModelFailed)
    assert good.future.exception() is None
    assert engine.alive


@pytest.mark.parametrize("stage", ["begin", "finish"])
@pytest.mark.parametrize("piece", [0, 1, 2])
def test_out_of_memory_before_or_after_the_steps_is_tried_once_more(
    harness: Harness, stage: str, piece: int
) -> None:
    engine = harness.start()

    def acts(*errors: BaseException | None) -> list[Any]:
        return [raising(*errors) if i == piece else do_nothing for i in range(3)]

    lucky = row(result=1, **{stage: acts(out_of_memory(), None)})
    unlucky = row(**{stage: acts(out_of_memory())})
    wrong = row(**{stage: acts(ValueError("no"), None)})
    other = row(result=3)
    harness.together(lucky, unlucky, wrong, other)
    assert (lucky.future.result() == 1).all()
    assert (other.future.result() == 3).all()
    for one, begun in ((unlucky, 2), (wrong, 1)):
        assert isinstance(one.future.exception(), ModelFailed)
        assert harness.pipeline.left.count((stage, one)) == begun
    tried = harness.pipeline.pieces.count((stage, lucky))
    assert tried == piece + 1 + 3, "the second try is from the beginning"
    assert harness.pipeline.counts[lucky] == 1
    assert engine.alive


@pytest.mark.parametrize("stage", ["begin", "finish"])
def test_the_second_try_finds_the_memory_of_the_first_free(harness: Harness, stage: str) -> None:
    held: weakref.WeakSet[Any] = weakref.WeakSet()
    held_at_start: list[int] = []

    def allocate() -> None:
        held_at_start.append(len(held))
        activations = torch.zeros(1)
        held.add(activations)
        raise out_of_memory()

    harness.start()
    gc.disable()
    try:
        harness.together(row(**{stage: allocate}))
    finally:
        gc.enable()
    assert held_at_start == [0, 0]


# --- one bad row among four ---


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("place", range(4))
def test_a_raising_row_fails_alone(harness: Harness, stage: str, place: int) -> None:
    harness.start()
    rows = [
        row(result=i, **({stage: raising(ValueError("no"))} if i == place else {}))
        for i in range(4)
    ]
    harness.together(*rows)
    for i, one in enumerate(rows):
        if i == place:
            with pytest.raises(ModelFailed) as caught:
                one.future.result()
            assert "no" not in caught.value.remedy.split()
            assert caught.value.remedy
        else:
            assert (one.future.result() == i).all()


@pytest.mark.parametrize("stage", ["cost_px", "begin", "finish"])
def test_a_pipeline_that_raises_at_once_fails_that_row_alone(harness: Harness, stage: str) -> None:
    """Before its generator, if there is one, is made."""
    pipeline = FakePipeline()
    whole = getattr(pipeline, stage)

    def broken(one: Any) -> Any:
        given = one.input if isinstance(one, Row) else one
        if given.request.result == 1:
            raise ValueError("no")
        return whole(one)

    setattr(pipeline, stage, broken)
    engine = harness.start(pipeline)
    rows = [row(result=i) for i in range(3)]
    harness.together(*rows)
    errors = [type(one.future.exception()) for one in rows]
    assert errors == [type(None), ModelFailed, type(None)]
    assert engine.alive


@pytest.mark.parametrize("stage", STAGES)
def test_an_error_of_our_own_reaches_the_row_as_it_is(harness: Harness, stage: str) -> None:
    harness.start()
    error = InvalidParameter("That will not do.")
    rows = [row(**{stage: raising(error)}), row()]
    harness.together(*rows)
    assert rows[0].future.exception() is error
    assert rows[1].future.exception() is None


@pytest.mark.parametrize("stage", STAGES)
def test_an_error_of_our_own_holds_no_memory(harness: Harness, stage: str) -> None:
    """The NaN that a decode finds: its traceback must not keep the picture on the device."""
    held: weakref.WeakSet[Any] = weakref.WeakSet()

    def fail() -> None:
        picture = torch.zeros(1)
        held.add(picture)
        raise ModelFailed("NaN")

    harness.start()
    bad = row(**{stage: fail})
    gc.disable()
    try:
        harness.together(bad)
        assert isinstance(bad.future.exception(), ModelFailed)
        until(lambda: not held, 5)
    finally:
        gc.enable()


def test_rows_that_fail_at_every_stage_do_so_beside_others_that_do_not(harness: Harness) -> None:
    harness.start()
    rng = random.Random(3)
    rows = []
    for i in range(60):
        script: dict[str, Any] = {"result": i, "key": rng.choice("ab"), "steps": rng.randint(1, 3)}
        if i % 3 == 0:
            stage = rng.choice(STAGES)
            script[stage] = raising(rng.choice([ValueError("no"), out_of_memory()]))
        rows.append(row(**script))
    harness.together(*rows)
    for i, one in enumerate(rows):
        if i % 3 == 0:
            assert isinstance(one.future.exception(), ModelFailed)
        else:
            assert (one.future.result() == i).all()
            assert harness.pipeline.counts[one] == one.input.request.steps


# --- who gives up ---


def test_a_cancelled_row_is_dropped_before_its_next_step(harness: Harness) -> None:
    harness.start()
    other = row(steps=6, result=7)
    leaver = row(steps=6, step=lambda: pipeline.counts[leaver] == 2 and leaver.cancel())
    pipeline = harness.pipeline
    harness.together(leaver, other)
    assert leaver.cancelled
    assert pipeline.counts[leaver] == 3
    assert pipeline.counts[other] == 6
    assert (other.future.result() == 7).all()
    assert ("finish", leaver) not in pipeline.pieces


def test_a_row_cancelled_in_its_last_step_is_not_finished(harness: Harness) -> None:
    harness.start()
    leaver = row(step=lambda: leaver.cancel())
    harness.together(leaver, row())
    assert ("finish", leaver) not in harness.pipeline.pieces


def test_a_row_cancelled_while_it_waits_is_never_begun(harness: Harness) -> None:
    engine = harness.start()
    busy = harness.turnstile()
    first, leaver, other = row(begin=busy), row(), row()
    engine.put([first, leaver, other])
    busy.reached()
    leaver.cancel()
    busy.let_go()
    wait_for(first, other)
    assert ("begin", leaver) not in harness.pipeline.pieces
    assert leaver not in harness.pipeline.counts


@pytest.mark.parametrize("why", ["cancelled", "too late"])
@pytest.mark.parametrize("stage", ["begin", "finish"])
def test_a_row_given_up_is_dropped_at_the_next_piece(
    harness: Harness, stage: str, why: str
) -> None:
    """And its generator closed there and then, with all it holds."""
    engine = harness.start()
    pieces = harness.turnstile()
    leaver = row(**{stage: [pieces] * 5})
    engine.put([leaver])
    for _ in range(2):
        pieces.reached()
        pieces.let_go()
    pieces.reached()
    gc.disable()
    try:
        if why == "cancelled":
            leaver.cancel()
        else:
            harness.ahead_s = 1000.0
        pieces.let_go()
        until(lambda: (stage, leaver) in harness.pipeline.left)
    finally:
        gc.enable()
    wait_for(leaver)
    assert harness.pipeline.pieces.count((stage, leaver)) == 3
    if why == "too late":
        assert isinstance(leaver.future.exception(), TooLate)
    harness.ahead_s = 0.0
    after = row(result=5)
    engine.put([after])
    wait_for(after)
    assert (after.future.result() == 5).all()


def test_a_row_cancelled_in_a_failing_group_is_not_stepped_again(harness: Harness) -> None:
    harness.start()
    leaver = row(step=lambda: leaver.cancel())
    bad, good = row(step=raising(ValueError("no"))), row()
    harness.together(leaver, bad, good)
    assert [leaver in group for group in harness.groups] == [True] + [False] * (
        len(harness.groups) - 1
    )
    assert good.future.exception() is None
    assert isinstance(bad.future.exception(), ModelFailed)


def test_a_row_past_its_deadline_is_too_late(harness: Harness) -> None:
    harness.start()
    late, fine = row(deadline_s=time.monotonic() - 1), row()
    harness.together(late, fine)
    assert isinstance(late.future.exception(), TooLate)
    assert fine.future.exception() is None
    assert late not in harness.pipeline.counts
    assert ("begin", late) not in harness.pipeline.pieces


def test_a_deadline_passes_between_steps() -> None:
    """On a clock of the test's own."""
    now = 0.0
    pipeline = FakePipeline()

    def tick() -> None:
        nonlocal now
        now += 1

    engine = Engine(pipeline, clock=lambda: now)
    slow = row(steps=9, step=tick, deadline_s=2.5)
    engine.put([slow])
    wait_for(slow)
    engine.close()
    assert isinstance(slow.future.exception(), TooLate)
    assert pipeline.counts[slow] == 3


# --- what goes on beside what ---


def test_rows_step_on_while_a_slow_autoencoder_decodes(harness: Harness) -> None:
    """Each piece of the decode lasts until the other row has stepped: else all would stand."""
    engine = harness.start()
    stepped = threading.Semaphore(0)

    def piece() -> None:
        for _ in range(3):
            assert stepped.acquire(timeout=20), "no step beside a piece of the decode"

    large = row(key="large", finish=[piece] * 10, result=1)
    small = row(key="small", steps=30, step=stepped.release, result=2)
    begun = threading.Event()
    held = row(key="held", step=lambda: begun.wait(20))
    engine.put([held, large])
    until(lambda: ("begin", large) in harness.pipeline.pieces)
    harness.let_in(small)
    begun.set()
    wait_for(large, small)
    assert (large.future.result() == 1).all()
    assert (small.future.result() == 2).all()


@pytest.mark.parametrize("stage", ["begin", "finish"])
def test_a_large_picture_holds_up_a_small_ones_begin_by_a_piece(
    harness: Harness, stage: str
) -> None:
    """At most one more piece starts once the small one is there."""
    engine = harness.start()
    pieces = harness.turnstile()
    large = row(key="large", **{stage: [pieces] * 8})
    engine.put([large])
    pieces.reached()
    small = row(key="small", begin=[do_nothing] * 2)
    engine.put([small])
    before = harness.pipeline.pieces.count((stage, large))
    pieces.let_go(8)
    wait_for(small, large)
    order = harness.pipeline.pieces
    assert order[: order.index(("begin", small))].count((stage, large)) <= before + 1


def test_pieces_of_several_rows_take_turns(harness: Harness) -> None:
    engine = harness.start()
    entrance = harness.turnstile()
    rows = [row(begin=[do_nothing] * 4) for _ in range(3)]
    engine.put([row(begin=entrance)])
    entrance.reached()
    engine.put(rows)
    entrance.let_go()
    wait_for(*rows)
    begun = [one for stage, one in harness.pipeline.pieces if stage == "begin"][1:]
    assert begun == rows * 4


# --- how it ends ---


@pytest.mark.parametrize("stage", STAGES)
def test_a_lost_device_ends_the_engine_and_every_rows_wait(harness: Harness, stage: str) -> None:
    engine = harness.start()
    error = device_lost()
    bad = row(**{stage: raising(error)})
    others = [row(key="b", steps=3), row(key="c"), row()]
    harness.together(others[0], bad, *others[1:])
    assert isinstance(bad.future.exception(), NotReady)
    for one in others:
        assert one.future.exception() is None or isinstance(one.future.exception(), NotReady)
    assert engine.fatal is error
    assert not engine.alive
    later = [row() for _ in range(3)]
    engine.put(later)
    wait_for(*later)
    assert all(isinstance(one.future.exception(), NotReady) for one in later)
    assert_over(engine)


@pytest.mark.parametrize("stage", ["begin", "finish"])
def test_a_device_lost_on_one_thread_ends_the_rows_on_the_other(
    harness: Harness, stage: str
) -> None:
    engine = harness.start()
    steps = harness.turnstile()
    stepping = row(key="stepping", steps=5, step=steps)
    engine.put([stepping])
    steps.reached()
    if stage == "finish":
        steps.let_go()
        steps.reached()
    lost = raising(device_lost())
    bad = row(key="bad", **{stage: lost})
    waiting = [row(key="waiting", begin=[do_nothing] * 3) for _ in range(3)]
    engine.put([bad, *waiting])
    if stage == "finish":
        steps.let_go(5)
    wait_for(bad, stepping, *waiting)
    assert isinstance(bad.future.exception(), NotReady)
    assert not engine.alive
    steps.let_go(5)
    assert_over(engine)
    assert harness.pipeline.counts[stepping] <= 5


def assert_over(engine: Engine) -> None:
    for thread in (engine._thread, engine._staging.thread):
        thread.join(20)
        assert not thread.is_alive()


def test_a_device_lost_in_a_step_ends_the_pieces_of_the_others(harness: Harness) -> None:
    engine = harness.start()
    pieces = harness.turnstile()
    slow = row(key="slow", begin=[pieces] * 50)
    engine.put([slow])
    pieces.reached()
    bad = row(step=raising(device_lost()))
    engine.put([bad])
    pieces.let_go(3)  # in turns with the other row's one
    wait_for(bad, slow)
    assert isinstance(slow.future.exception(), NotReady)
    pieces.let_go(100)
    assert_over(engine)
    assert harness.pipeline.pieces.count(("begin", slow)) <= 5
    assert ("begin", slow) in harness.pipeline.left


def test_only_accelerator_errors_are_fatal() -> None:
    assert is_fatal(device_lost())
    assert is_fatal(RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"))
    assert is_fatal(RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling"))
    assert not is_fatal(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_fatal(RuntimeError("The size of tensor a must match"))
    assert not is_fatal(ValueError("CUDA error: of another kind"))


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_no_exception_ends_the_engine_too(harness: Harness, stage: str) -> None:
    engine = harness.start()
    rows = [row(**{stage: raising(SystemExit(3))}), row()]
    harness.together(*rows)
    assert isinstance(rows[0].future.exception(), NotReady)
    assert isinstance(engine.fatal, SystemExit)
    assert not engine.alive
    assert_over(engine)


@pytest.mark.parametrize("thread", ["engine", "staging"])
def test_a_mistake_of_the_engines_own_ends_it_rather_than_its_rows_wait(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, thread: str
) -> None:
    engine = harness.start()
    target = "_account" if thread == "engine" else "_join"
    error = SystemError("a mistake")

    def broken(*_: object) -> None:
        raise BaseExceptionGroup("whatever", [error, KeyboardInterrupt()])

    monkeypatch.setattr(engine, target, broken)
    rows = [row(), row()]
    engine.put(rows)
    wait_for(*rows)
    assert all(isinstance(one.future.exception(), NotReady) for one in rows)
    assert engine.fatal
    assert not engine.alive
    assert_over(engine)


def test_close_finishes_the_rows_at_hand(harness: Harness) -> None:
    engine = harness.start(max_batch_size=2)
    rows = [
        row(steps=3, result=i, begin=[do_nothing] * 2, finish=[do_nothing] * 2) for i in range(6)
    ]
    harness.hold()
    engine.put(rows)
    closer = threading.Thread(target=engine.close)
    closer.start()
    harness.pipeline.gate.set()
    closer.join(20)
    assert all((one.future.result(0) == i).all() for i, one in enumerate(rows))
    assert not engine.alive
    assert engine.fatal is None
    late = row()
    engine.put([late])
    assert isinstance(late.future.exception(0), NotReady)
    assert_over(engine)


@pytest.mark.parametrize("fate", ["done", "cancelled", "failed", "too late", "never begun"])
def test_close_waits_for_the_last_row_however_it_ends(harness: Harness, fate: str) -> None:
    engine = harness.start()
    pieces = harness.turnstile()
    stage = "begin" if fate == "never begun" else "finish"
    acts: list[Any] = [pieces, raising(ValueError("no"))] if fate == "failed" else [pieces] * 2
    last = row(**{stage: acts})
    engine.put([last])
    pieces.reached()
    closer = threading.Thread(target=engine.close)
    closer.start()
    until(lambda: engine._closing)
    assert engine._thread.is_alive()
    if fate in ("cancelled", "never begun"):
        last.cancel()
    if fate == "too late":
        harness.ahead_s = 1000.0
    pieces.let_go(2)
    closer.join(20)
    assert last.future.done()
    assert engine.fatal is None
    assert_over(engine)


def test_a_row_that_comes_as_the_thread_ends_is_resolved() -> None:
    engine = LastInstantEngine(FakePipeline())
    engine.close(timeout_s=0)
    assert engine.drained.wait(20)
    late = row()
    engine.put([late])
    assert isinstance(late.future.exception(5), NotReady)
    engine.may_end.set()
    engine.close()
    assert_over(engine)


def test_rows_of_many_threads_resolve_once_each_with_its_own_result() -> None:
    pipeline = FakePipeline()
    engine = Engine(pipeline)
    rng = random.Random(1)
    fates = rng.choices(["good", "bad", "cancelled"], [8, 1, 1], k=200)
    rows = [
        row(
            key=rng.choice("abc"),
            steps=rng.randint(1, 3),
            result=i,
            **({rng.choice(STAGES): raising(ValueError("no"))} if fate == "bad" else {}),
        )
        for i, fate in enumerate(fates)
    ]
    answers: Counter[int] = Counter()
    for i, one in enumerate(rows):
        one.future.add_done_callback(lambda _, i=i: answers.update([i]))

    def send(start: int) -> None:
        for i in range(start, 200, 8):
            engine.put([rows[i]])
            if fates[i] == "cancelled":
                rows[i].cancel()

    threads = [threading.Thread(target=send, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for(*rows)
    engine.close()
    assert answers == Counter(range(200))
    for i, (one, fate) in enumerate(zip(rows, fates, strict=True)):
        assert_own_answer(one, fate, i)


def assert_own_answer(one: Row, fate: str, result: int) -> None:
    """A row that is to be cancelled may be finished first."""
    if one.cancelled:
        assert fate == "cancelled"
    elif fate == "bad":
        assert isinstance(one.future.exception(), ImagenError)
    else:
        assert (one.future.result() == result).all()


# --- what is left behind ---


class WeakRow(Row):
    """A row that can be watched."""

    __slots__ = ("__weakref__",)


@dataclass
class Kept:
    """What a forgetful pipeline keeps of a row: a tensor, and not the row."""

    request: Any
    tensor: torch.Tensor


class FakeForgetfulPipeline(FakePipeline):
    """Keeps no row."""

    def begin(self, given: RowInput[Any]) -> Generator[None, None, Kept]:
        kept = Kept(given.request, torch.zeros(3))
        given.request.begin()
        yield
        return kept

    def steps(self, kept: Kept) -> int:
        return kept.request.steps

    def key(self, kept: Kept) -> str:
        return kept.request.key

    def step(self, states: Sequence[Kept]) -> None:
        for kept in states:
            kept.request.step()

    def finish(self, kept: Kept) -> Generator[None, None, Pixels]:
        yield
        kept.request.finish()
        return np.zeros((1, 1, 3), np.uint8)


def wrong() -> None:
    raise ValueError("no")


def refused() -> None:
    raise ModelFailed("NaN")


def out_of_room() -> None:
    raise out_of_memory()


@pytest.mark.parametrize(
    "script",
    [
        {},
        {"steps": 3},
        {"deadline_s": 0.0},
        *({stage: fail} for stage in STAGES for fail in (wrong, refused, out_of_room)),
        {"cost_px": 10**9},
        {"cancel": True},
    ],
    ids=lambda script: " ".join(f"{k} {getattr(v, '__name__', v)}" for k, v in script.items()),
)
def test_nothing_holds_a_row_once_it_is_resolved(script: dict[str, Any]) -> None:
    """Without the garbage collector, for which a device's memory cannot wait."""
    engine = Engine(FakeForgetfulPipeline(), GroupLimits(4, budget_px=100), pace=Together())
    script, cancel = dict(script), script.get("cancel")
    script.pop("cancel", None)

    def run() -> weakref.ref[Row]:
        watched = WeakRow(row(**script).input)
        if cancel:
            watched.cancel()
        engine.put([watched])
        wait_for(watched)
        return weakref.ref(watched)

    gc.disable()
    try:
        watched = run()
        until(lambda: watched() is None, 5)
    finally:
        gc.enable()
    assert engine.alive
    engine.close()


@pytest.mark.parametrize(
    ("rows", "limits", "expected"),
    [
        ([{}], {}, [(1, "all")]),
        ([{}, {}], {}, [(2, "all")]),
        ([{}, {"key": "b"}], {}, [(1, "key"), (1, "all")]),
        ([{}, {}, {}], {"max_batch_size": 2}, [(2, "full"), (1, "all")]),
        ([{"cost_px": 5}, {"cost_px": 5}], {"budget_px": 9}, [(1, "budget"), (1, "all")]),
        ([{}, {}], {"exact": True}, [(1, "exact"), (1, "all")]),
    ],
)
def test_each_pass_reports_its_rows_and_why_there_were_no_more(
    harness: Harness, rows: list[dict[str, Any]], limits: dict[str, Any], expected: list[Any]
) -> None:
    harness.start(**limits)
    harness.together(*(row(**values) for values in rows))
    passes = [one for one in harness.passes if one.rows[0].input.request.key != "held"]
    assert [(len(one.rows), one.closed) for one in passes] == expected
    assert all(one.seconds >= 0 for one in passes)


def test_the_halves_of_a_group_that_ran_out_of_memory_are_reported_as_such(
    harness: Harness,
) -> None:
    harness.start(FakeMemoryPipeline(room_px=2))
    harness.together(*(row() for _ in range(4)))
    passes = [one for one in harness.passes if one.rows[0].input.request.key != "held"]
    assert [(len(one.rows), one.closed) for one in passes] == [(2, "memory"), (2, "memory")]


def test_a_row_alone_that_ran_out_of_memory_once_is_tried_again(harness: Harness) -> None:
    engine = harness.start()
    tries: list[int] = []

    def once() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    one = row(step=once, result=7)
    engine.put([one])
    assert (one.future.result(20) == 7).all()
    assert len(tries) == 2


def test_a_limit_learned_from_memory_is_dropped_after_a_while(harness: Harness) -> None:
    pipeline = FakeMemoryPipeline(room_px=2)
    engine = harness.start(pipeline, max_batch_size=4)
    harness.together(*(row() for _ in range(4)))
    pipeline.room_px = 100
    long = row(steps=1100)
    engine.put([long])
    wait_for(long)
    rows = [row() for _ in range(4)]
    harness.together(*rows)
    assert [one.progress.batch_size for one in rows] == [4] * 4


def test_idle_is_when_also_a_row_that_was_given_up_has_left_its_pass(harness: Harness) -> None:
    engine = harness.start()
    harness.hold()
    assert not engine.wait_idle(0.05)
    for held in list(engine._unresolved):
        held.cancel()
    assert not engine.wait_idle(0.05), "the pass goes on"
    harness.pipeline.gate.set()
    assert engine.wait_idle(20)


def test_the_batch_size_of_a_row_is_that_of_its_passes_on_the_mean() -> None:
    assert Progress(steps=28, steps_left=0, pass_rows=27 + 4).batch_size == 1
