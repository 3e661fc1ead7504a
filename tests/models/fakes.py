"""A scripted pipeline, and an engine that stands still until a test lets it go."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gathering import Together, until

from deployments.engine.engine import Engine
from deployments.engine.grouping import GroupLimits, Pass
from deployments.engine.row import Row, RowInput

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from deployments.engine.row import Pixels

    Act = Callable[[], object]


def do_nothing() -> None:
    pass


@dataclass
class FakeRequest:
    """What the fake pipeline does with a row.

    `begin` and `finish` may be several acts, each a piece of work of its own. `row` is the row of
    the request, which is all that the fake pipeline keeps as its state.
    """

    key: str = "a"
    steps: int = 1
    cost_px: int = 1
    begin: Act | Sequence[Act] = do_nothing
    step: Act = do_nothing
    finish: Act | Sequence[Act] = do_nothing
    result: int = 0
    row: Row | None = None


class FakePipeline:
    """Does what each row's request says, and records every group it stepped.

    A step waits for the gate, which is open unless a test closes it.

    Attributes:
        pieces: stage and row of each piece of work, as it began.
        left: stage and row of each `begin` and `finish` that ended or was given up.
    """

    def __init__(self) -> None:
        self.groups: list[list[Row]] = []
        self.counts: Counter[Row] = Counter()
        self.pieces: list[tuple[str, Row]] = []
        self.left: list[tuple[str, Row]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.at_gate = threading.Event()

    def cost_px(self, given: RowInput[FakeRequest]) -> int:
        return given.request.cost_px

    def key(self, row: Row) -> str:
        return row.input.request.key

    def begin(self, given: RowInput[FakeRequest]) -> Generator[None, None, Row]:
        row = given.request.row
        yield from self._do("begin", row)
        return row

    def steps(self, row: Row) -> int:
        return row.input.request.steps

    def step(self, rows: Sequence[Row]) -> None:
        self.at_gate.set()
        assert self.gate.wait(20)
        self.groups.append(list(rows))
        for row in rows:
            row.input.request.step()
        self.counts.update(rows)

    def finish(self, row: Row) -> Generator[None, None, Pixels]:
        yield from self._do("finish", row)
        return np.full((1, 1, 3), row.input.request.result, np.uint8)

    def _do(self, stage: str, row: Row) -> Generator[None, None, None]:
        acts = getattr(row.input.request, stage)
        try:
            for act in [acts] if callable(acts) else acts:
                self.pieces.append((stage, row))
                act()
                yield
        finally:
            self.left.append((stage, row))


class FakeMemoryPipeline(FakePipeline):
    """Runs out of memory on more than `room_px`, counting what failed steps still hold."""

    def __init__(self, room_px: int) -> None:
        super().__init__()
        self.room_px = room_px
        self.held: weakref.WeakSet[Any] = weakref.WeakSet()
        self.held_at_start: list[int] = []
        self.tried: list[int] = []

    def step(self, rows: Sequence[Row]) -> None:
        if rows[0].input.request.key != "held":
            self.held_at_start.append(len(self.held))
            self.tried.append(sum(row.progress.cost_px for row in rows))
        activations = torch.zeros(1)
        self.held.add(activations)
        if sum(row.progress.cost_px for row in rows) > self.room_px:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 GiB.")
        super().step(rows)


class Turnstile:
    """An act that waits each time until the test lets it go once."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def __call__(self) -> None:
        self.entered.release()
        assert self.go.acquire(timeout=20)

    def reached(self) -> None:
        assert self.entered.acquire(timeout=20)

    def let_go(self, times: int = 1) -> None:
        self.go.release(times)


@dataclass
class Harness:
    """An engine that is held at a first, blocking row until the test lets it go.

    Attributes:
        ahead_s: how far the engine's clock is ahead of the real one.
    """

    pipeline: FakePipeline = field(default_factory=FakePipeline)
    engines: list[Engine] = field(default_factory=list)
    turnstiles: list[Turnstile] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)
    ahead_s: float = 0.0

    def start(
        self, pipeline: FakePipeline | None = None, max_batch_size: int = 4, **limits: Any
    ) -> Engine:
        self.pipeline = pipeline or self.pipeline
        limits_ = GroupLimits(max_batch_size, **limits)
        self.engines.append(
            Engine(
                self.pipeline,
                limits_,
                pace=Together(),
                clock=lambda: time.monotonic() + self.ahead_s,
                on_pass=self.passes.append,
            )
        )
        return self.engines[-1]

    def together(self, *rows: Row) -> None:
        """Have the rows arrive at one moment, and wait until all are resolved."""
        self.hold()
        self.let_in(*rows)
        self.pipeline.gate.set()
        wait_for(*rows)

    def hold(self) -> None:
        """Stop the engine in the step of a row of its own key."""
        self.pipeline.gate.clear()
        self.pipeline.at_gate.clear()
        self.engines[-1].put([row(key="held")])
        assert self.pipeline.at_gate.wait(20)

    def let_in(self, *rows: Row) -> None:
        """While the engine is in a step: have the rows ready for the next one, or failed."""
        begun = self.engines[-1]._begun
        awaited = begun.qsize() + len(rows)
        self.engines[-1].put(rows)
        until(lambda: begun.qsize() + sum(one.future.done() for one in rows) >= awaited)

    def turnstile(self) -> Turnstile:
        self.turnstiles.append(Turnstile())
        return self.turnstiles[-1]

    def close(self) -> None:
        self.pipeline.gate.set()
        for turnstile in self.turnstiles:
            turnstile.let_go(1000)
        for engine in self.engines:
            engine.close(20)
            engine._staging.thread.join(20)

    @property
    def groups(self) -> list[list[Row]]:
        return [group for group in self.pipeline.groups if group[0].input.request.key != "held"]


def row(deadline_s: float | None = None, **script: Any) -> Row:
    pixels = np.zeros((1, 1, 3), np.uint8)
    deadline_s = time.monotonic() + 60 if deadline_s is None else deadline_s
    request = FakeRequest(**script)
    request.row = Row(RowInput(request, pixels, 0, deadline_s))
    return request.row


def wait_for(*rows: Row) -> None:
    # Not `concurrent.futures.wait`, which never returns for a future that was cancelled.
    until(lambda: all(one.future.done() for one in rows), 20)


def raising(*errors: BaseException | None) -> Act:
    """An act that raises these in turn, then the last one for ever; None for no error."""
    left = list(errors)

    def act() -> None:
        error = left.pop(0) if len(left) > 1 else left[0]
        if error is not None:
            raise error

    return act


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 GiB.")


def device_lost() -> torch.AcceleratorError:
    return torch.AcceleratorError("CUDA error: device-side assert triggered")
