"""The engine's guarantees, on pipelines that do as they are told."""

from __future__ import annotations

import gc
import logging
import random
import threading
import time
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from deployments.engine import Engine, is_fatal
from deployments.errors import ImagenError, InvalidParameter, ModelFailed, NotReady, TooLate
from deployments.pipelines import diffusion
from deployments.pipelines.base import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from deployments.pipelines.base import Pixels


def do_nothing() -> None:
    pass


@dataclass(frozen=True)
class FakeRequest:
    """What the fake pipeline does with a row."""

    key: str = "a"
    steps: int = 1
    begin: Callable[[], None] = do_nothing
    step: Callable[[], None] = do_nothing
    finish: Callable[[], None] = do_nothing
    result: int = 0


class FakePipeline:
    """Does what each row's request says, and remembers every group it stepped.

    A step waits for the gate, which is open unless a test closes it.
    """

    def __init__(self) -> None:
        self.groups: list[list[Row]] = []
        self.counts: dict[Row, int] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.at_gate = threading.Event()

    def key(self, row: Row) -> str:
        return row.request.key

    def begin(self, row: Row) -> None:
        row.request.begin()

    def step(self, rows: Sequence[Row]) -> None:
        self.at_gate.set()
        assert self.gate.wait(20)
        self.groups.append(list(rows))
        for row in rows:
            row.request.step()
        for row in rows:
            self.counts[row] = self.counts.get(row, 0) + 1
            row.done = self.counts[row] == row.request.steps

    def finish(self, row: Row) -> Pixels:
        row.request.finish()
        return np.full((1, 1, 3), row.request.result, np.uint8)


class FakeMemoryPipeline(FakePipeline):
    """Runs out of memory on more than `room` rows, counting what failed steps still hold."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.held: weakref.WeakSet[Any] = weakref.WeakSet()
        self.held_at_start: list[int] = []

    def step(self, rows: Sequence[Row]) -> None:
        if self.gate.is_set():
            self.held_at_start.append(len(self.held))
        activations = torch.zeros(1)
        self.held.add(activations)
        if len(rows) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 GiB.")
        super().step(rows)


class LastInstantEngine(Engine):
    """An engine whose thread, done with its last row, takes a while to be gone."""

    def __init__(self, pipeline: Any) -> None:
        self.drained, self.may_end = threading.Event(), threading.Event()
        super().__init__(pipeline, max_batch_size=4)

    def _drain(self) -> None:
        super()._drain()
        if threading.current_thread().name == "engine":
            self.drained.set()
            assert self.may_end.wait(20)


@dataclass
class Harness:
    """An engine that is held at a first, blocking row until the test lets it go."""

    pipeline: FakePipeline = field(default_factory=FakePipeline)
    engines: list[Engine] = field(default_factory=list)

    def start(self, pipeline: FakePipeline | None = None, max_batch_size: int = 4) -> Engine:
        self.pipeline = pipeline or self.pipeline
        self.engines.append(Engine(self.pipeline, max_batch_size=max_batch_size))
        return self.engines[-1]

    def together(self, *rows: Row) -> None:
        """Have the rows arrive at one moment, and wait until all are resolved."""
        self.hold()
        self.engines[-1].put(rows)
        self.pipeline.gate.set()
        wait_for(*rows)

    def hold(self) -> None:
        """Stop the engine in the step of a row of its own key."""
        self.pipeline.gate.clear()
        self.pipeline.at_gate.clear()
        self.engines[-1].put([row(key="held")])
        assert self.pipeline.at_gate.wait(20)

    @property
    def groups(self) -> list[list[Row]]:
        return [group for group in self.pipeline.groups if group[0].request.key != "held"]


@pytest.fixture
def harness() -> Iterator[Harness]:
    made = Harness()
    yield made
    made.pipeline.gate.set()
    for engine in made.engines:
        engine.close(20)


@pytest.fixture
def _quiet_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep pytest's own log capture from holding on to rows by their tracebacks."""
    monkeypatch.setattr(logging.getLogger("deployments.engine"), "disabled", True)


def row(deadline_s: float | None = None, **script: Any) -> Row:
    pixels = np.zeros((1, 1, 3), np.uint8)
    deadline_s = time.monotonic() + 60 if deadline_s is None else deadline_s
    return Row(FakeRequest(**script), pixels, 0, deadline_s)


def wait_for(*rows: Row) -> None:
    # Not `concurrent.futures.wait`, which never returns for a future that was cancelled.
    until_s = time.monotonic() + 20
    while left := [one for one in rows if not one.future.done()]:
        assert time.monotonic() < until_s, f"{len(left)} of {len(rows)} rows were never resolved"
        time.sleep(0.001)


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def device_lost() -> torch.AcceleratorError:
    return torch.AcceleratorError("CUDA error: device-side assert triggered")


# --- who shares a step ---


def test_rows_of_one_key_share_a_step_up_to_max_batch_size(harness: Harness) -> None:
    harness.start(max_batch_size=4)
    rows = [row() for _ in range(10)]
    harness.together(*rows)
    assert harness.groups == [rows[:4], rows[4:8], rows[8:]]
    assert [one.batch_size for one in rows] == [4] * 8 + [2] * 2


def test_max_batch_size_may_change_at_any_time(harness: Harness) -> None:
    engine = harness.start(max_batch_size=4)
    engine.max_batch_size = 1
    rows = [row() for _ in range(3)]
    harness.together(*rows)
    assert harness.groups == [[one] for one in rows]


def test_rows_of_different_keys_never_share_a_step(harness: Harness) -> None:
    harness.start(max_batch_size=16)
    rng = random.Random(0)
    rows = [row(key=rng.choice("abcd"), steps=rng.randint(1, 4)) for _ in range(40)]
    harness.together(*rows)
    for group in harness.groups:
        assert len({one.request.key for one in group}) == 1
        assert len(set(group)) == len(group) <= 16
    assert all(harness.pipeline.counts[one] == one.request.steps for one in rows)


def test_a_late_row_joins_a_group_under_way(harness: Harness) -> None:
    engine = harness.start()
    late = row(steps=1)
    early = row(steps=3, step=lambda: None if late.arrived_s else engine.put([late]))
    engine.put([early])
    wait_for(early, late)
    assert harness.groups == [[early], [early, late], [early]]


def test_two_keys_take_turns(harness: Harness) -> None:
    harness.start(max_batch_size=2)
    rows = [row(key=key, steps=3) for key in "aabb"]
    harness.together(*rows)
    assert [group[0].request.key for group in harness.groups] == list("ababab")


def test_a_crowd_of_one_key_does_not_starve_another(harness: Harness) -> None:
    """However many come later, and keep coming."""
    engine = harness.start(max_batch_size=2)
    lonely = row(key="lonely", steps=5)
    sent = 0

    def another() -> None:
        nonlocal sent
        if not lonely.future.done():
            sent += 1
            engine.put([row(key="crowd", step=another)])

    harness.hold()
    engine.put([row(key="crowd", step=another) for _ in range(6)])
    engine.put([lonely])
    harness.pipeline.gate.set()
    wait_for(lonely)
    turns = [group[0].request.key for group in harness.groups]
    last = len(turns) - 1 - turns[::-1].index("lonely")
    assert last <= 5 * 8


def test_times_and_shares_add_up(harness: Harness) -> None:
    harness.start()
    rows = [row(steps=2, step=lambda: time.sleep(0.005)) for _ in range(4)]
    harness.together(*rows)
    for one in rows:
        assert one.run_s >= 2 * 4 * 0.005
        assert one.queue_s >= 0
    assert sum(one.compute_s for one in rows) == pytest.approx(rows[0].run_s)


# --- one bad row among four ---


@pytest.mark.parametrize("stage", ["begin", "step", "finish"])
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


@pytest.mark.parametrize("stage", ["begin", "step", "finish"])
def test_an_error_of_our_own_reaches_the_row_as_it_is(harness: Harness, stage: str) -> None:
    harness.start()
    error = InvalidParameter("That will not do.")
    rows = [row(**{stage: raising(error)}), row()]
    harness.together(*rows)
    assert rows[0].future.exception() is error
    assert rows[1].future.exception() is None


def test_nan_fails_its_row_alone(harness: Harness) -> None:
    class FakeNanPipeline(FakePipeline):
        def finish(self, row: Row) -> Pixels:
            value = np.nan if row.request.result == 2 else 0.5
            return diffusion.to_pixels(np.array([[[0.5, value, 0.5]]], np.float32))

    harness.start(FakeNanPipeline())
    rows = [row(result=i) for i in range(4)]
    harness.together(*rows)
    errors = [one.future.exception() for one in rows]
    assert [type(error) for error in errors] == [type(None), type(None), ModelFailed, type(None)]


@pytest.mark.parametrize("room", [1, 2, 3])
@pytest.mark.usefixtures("_quiet_log")
def test_out_of_memory_halves_the_group_until_it_fits(harness: Harness, room: int) -> None:
    pipeline = FakeMemoryPipeline(room)
    engine = harness.start(pipeline, max_batch_size=8)
    rows = [row(result=i) for i in range(8)]
    harness.together(*rows)
    assert all((one.future.result() == i).all() for i, one in enumerate(rows))
    assert [one.batch_size for one in rows] == [min(room, 2)] * 8
    assert engine.alive


@pytest.mark.usefixtures("_quiet_log")
def test_the_halves_find_the_memory_of_the_failed_step_free(harness: Harness) -> None:
    pipeline = FakeMemoryPipeline(room=1)
    harness.start(pipeline, max_batch_size=8)
    gc.disable()  # The device's memory cannot wait for it.
    try:
        harness.together(*[row() for _ in range(8)])
    finally:
        gc.enable()
    assert len(pipeline.held_at_start) == 15
    assert pipeline.held_at_start == [0] * 15


def test_out_of_memory_on_a_single_row_fails_that_row(harness: Harness) -> None:
    engine = harness.start(FakeMemoryPipeline(room=1))
    bad = row(step=raising(torch.OutOfMemoryError("CUDA out of memory.")))
    good = row()
    harness.together(bad, good)
    assert isinstance(bad.future.exception(), ModelFailed)
    assert good.future.exception() is None
    assert engine.alive


# --- who gives up ---


def test_a_cancelled_row_is_dropped_before_its_next_step(harness: Harness) -> None:
    harness.start()
    other = row(steps=6, result=7)
    leaver = row(steps=6, step=lambda: pipeline.counts.get(leaver, 0) == 2 and leaver.cancel())
    pipeline = harness.pipeline
    harness.together(leaver, other)
    assert leaver.cancelled
    assert pipeline.counts[leaver] == 3
    assert pipeline.counts[other] == 6
    assert (other.future.result() == 7).all()


def test_a_row_cancelled_while_it_waits_is_never_stepped(harness: Harness) -> None:
    engine = harness.start()
    begun: list[int] = []
    leaver, other = row(begin=lambda: begun.append(1)), row()
    harness.hold()
    engine.put([leaver, other])
    leaver.cancel()
    harness.pipeline.gate.set()
    wait_for(other)
    assert not begun
    assert harness.groups == [[other]]


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


def test_a_deadline_passes_between_steps() -> None:
    """On a clock of the test's own."""
    now = 0.0
    pipeline = FakePipeline()

    def tick() -> None:
        nonlocal now
        now += 1

    engine = Engine(pipeline, max_batch_size=4, clock=lambda: now)
    slow = row(steps=9, step=tick, deadline_s=2.5)
    engine.put([slow])
    wait_for(slow)
    engine.close()
    assert isinstance(slow.future.exception(), TooLate)
    assert pipeline.counts[slow] == 3


# --- how it ends ---


@pytest.mark.parametrize("stage", ["begin", "step", "finish"])
def test_a_lost_device_ends_the_engine_and_every_rows_wait(harness: Harness, stage: str) -> None:
    engine = harness.start()
    error = device_lost()
    bad = row(**{stage: raising(error)})
    others = [row(key="b", steps=3), row(key="c"), row()]
    harness.together(others[0], bad, *others[1:])
    for one in (bad, others[0]):
        assert isinstance(one.future.exception(), NotReady)
    for one in others[1:]:
        assert one.future.exception() is None or isinstance(one.future.exception(), NotReady)
    assert engine.fatal is error
    assert not engine.alive
    later = [row() for _ in range(3)]
    engine.put(later)
    wait_for(*later)
    assert all(isinstance(one.future.exception(), NotReady) for one in later)


def test_only_accelerator_errors_are_fatal() -> None:
    assert is_fatal(device_lost())
    assert not is_fatal(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_fatal(RuntimeError("The size of tensor a must match"))


def test_what_is_no_exception_ends_the_engine_too(harness: Harness) -> None:
    engine = harness.start()
    rows = [row(step=raising(SystemExit(3))), row()]
    harness.together(*rows)
    assert all(isinstance(one.future.exception(), NotReady) for one in rows)
    assert isinstance(engine.fatal, SystemExit)
    assert not engine.alive


def test_close_finishes_the_rows_at_hand(harness: Harness) -> None:
    engine = harness.start(max_batch_size=2)
    rows = [row(steps=3, result=i) for i in range(6)]
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


def test_a_row_that_comes_as_the_thread_ends_is_resolved() -> None:
    engine = LastInstantEngine(FakePipeline())
    engine.close(timeout_s=0)
    assert engine.drained.wait(20)
    late = row()
    engine.put([late])
    assert isinstance(late.future.exception(5), NotReady)
    engine.may_end.set()
    engine.close()


def test_rows_of_many_threads_resolve_once_each_with_its_own_result() -> None:
    pipeline = FakePipeline()
    engine = Engine(pipeline, max_batch_size=4)
    rng = random.Random(1)
    fates = rng.choices(["good", "bad", "gone"], [8, 1, 1], k=200)
    rows = [
        row(
            key=rng.choice("abc"),
            steps=rng.randint(1, 3),
            result=i,
            step=raising(ValueError("no")) if fate == "bad" else do_nothing,
        )
        for i, fate in enumerate(fates)
    ]
    answers: Counter[int] = Counter()
    for i, one in enumerate(rows):
        one.future.add_done_callback(lambda _, i=i: answers.update([i]))

    def send(start: int) -> None:
        for i in range(start, 200, 8):
            engine.put([rows[i]])
            if fates[i] == "gone":
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
        assert fate == "gone"
    elif fate == "bad":
        assert isinstance(one.future.exception(), ImagenError)
    else:
        assert (one.future.result() == result).all()


@pytest.mark.usefixtures("_quiet_log")
def test_a_finished_row_is_held_by_nobody() -> None:
    class FakeForgetfulPipeline(FakePipeline):
        def step(self, rows: Sequence[Row]) -> None:
            for row in rows:
                row.request.step()
                row.done = True

    class WeakRow(Row):
        """A row that can be watched."""

        __slots__ = ("__weakref__",)

    engine = Engine(FakeForgetfulPipeline(), max_batch_size=4)

    def run(**script: Any) -> weakref.ref[Row]:
        one = row(**script)
        watched = WeakRow(one.request, one.pixels, one.seed, one.deadline_s)
        engine.put([watched])
        wait_for(watched)
        return weakref.ref(watched)

    def run_cancelled() -> weakref.ref[Row]:
        one = row()
        watched = WeakRow(one.request, one.pixels, one.seed, one.deadline_s)
        watched.cancel()
        engine.put([watched])
        return weakref.ref(watched)

    gone = [run(), run(step=raising(ValueError("no"))), run(deadline_s=0.0), run_cancelled()]
    until_s = time.monotonic() + 10
    while any(ref() for ref in gone) and time.monotonic() < until_s:
        gc.collect()
        time.sleep(0.01)
    assert [ref() for ref in gone] == [None] * 4
    assert engine.alive
    engine.close()
