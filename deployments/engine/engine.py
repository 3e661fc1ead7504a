"""The engine: steps rows together, and sees each row to its end."""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from concurrent.futures import InvalidStateError
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from deployments.engine.device import (
    free_cached_memory,
    is_fatal,
    lower_priority,
    record_event,
)
from deployments.engine.grouping import GroupLimits, Pace, Pass, choose
from deployments.engine.staging import Job, Staging
from deployments.errors import ImagenError, ModelFailed, NotReady, TooLarge, too_late

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from deployments.engine.grouping import Closed
    from deployments.engine.pipeline import AnyPipeline
    from deployments.engine.row import Row

_IDLE_POLL_S = 0.01
_FORGET_PASSES = 1000
"""Passes after which a limit that was learned by running out of memory is dropped."""
logger = logging.getLogger("ray.serve.imagen.engine")


class Engine:
    """Steps rows of equal key together, whatever their parameters and time of arrival.

    One thread steps. Another (`Staging`) begins and finishes rows, piece by piece, so that rows go
    on stepping while a picture is encoded or decoded.

    Guarantees:
        - a row that fails, is cancelled or passes its deadline never fails another, and is dropped
          within one step;
        - a row's future is resolved exactly once, also when the engine closes or dies;
        - no pass holds more than `limits`; a row that is too large even alone gets TooLarge,
          before anything is allocated for it;
        - after an error that is no row's fault, `fatal` is set and every row gets NotReady.

    Args:
        pipeline: `begin` and `finish` run on the staging thread, `step` on the engine's.
        limits: of a pass; may be changed at any time.
        pace: decides which group sizes pay, and knows how long passes take.
        clock: seconds, monotonic; the clock of `RowInput.deadline_s`.
        on_pass: called after each pass, on the engine's thread; must not raise.
    """

    def __init__(
        self,
        pipeline: AnyPipeline,
        limits: GroupLimits | None = None,
        *,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_pass: Callable[[Pass], None] | None = None,
    ) -> None:
        self.limits = limits or GroupLimits()
        self.fatal: BaseException | None = None
        self._pipeline = pipeline
        self.pace = pace or Pace()
        self._clock = clock
        self._on_pass = on_pass
        self._affordable_px: int | None = None
        self._affordable_passes = 0
        self._lock = threading.Lock()
        self._unresolved: set[Row] = set()
        self._begun: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._rows: list[Row] = []
        self._events: list[Any] = []
        self._closing = False
        self._ended = False
        self._staging = Staging(
            is_live=self._is_live,
            on_failed=self._fail_with,
            on_died=self._die,
            is_fatal=is_fatal,
        )
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def put(self, rows: Iterable[Row]) -> None:
        """Take rows in; each one's future will be resolved. Thread-safe; returns at once."""
        for row in rows:
            row.progress.arrived_s = self._clock()
            with self._lock:
                self._unresolved.add(row)
            self._staging.put(Job(row, partial(self._begin, row), partial(self._join, row)))
        # The engine's thread sets this before it drains for the last time, so that a row that
        # arrives at that moment is drained either there or here.
        if self._ended:
            self._drain()

    def close(self, timeout_s: float = 30) -> None:
        """Finish the rows at hand, then end the threads."""
        self._closing = True
        self._begun.put(None)
        self._thread.join(timeout_s)

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no row is inside, not even a cancelled one in the middle of a pass."""
        end_s = time.monotonic() + timeout_s
        while self._unresolved and time.monotonic() < end_s:
            time.sleep(_IDLE_POLL_S)
        return not self._unresolved

    @property
    def alive(self) -> bool:
        """Whether the engine can serve rows."""
        threads = (self._thread, self._staging.thread)
        return self.fatal is None and all(thread.is_alive() for thread in threads)

    # --- on the staging thread ---

    def _begin(self, row: Row) -> Any:
        """Refuse a row that can never fit; else prepare it."""
        progress, budget_px = row.progress, self.limits.budget_px
        progress.cost_px = self._pipeline.cost_px(row.input)
        if budget_px is not None and progress.cost_px > budget_px:
            raise TooLarge(
                "One pass of this request is more than the model's share of the device holds.",
                value=f"{progress.cost_px} px, with {budget_px} px to spare",
                remedy="Send a smaller picture, or guidance_scale=1, which halves the work.",
            )
        row.state = yield from self._pipeline.begin(row.input)
        progress.steps = progress.steps_left = self._pipeline.steps(row.state)
        if progress.steps < 1:
            raise ValueError("The pipeline gave the row no step.")

    def _join(self, row: Row, _: None) -> None:
        self._begun.put(row)

    def _resolve(self, row: Row, pixels: Any) -> None:
        with suppress(InvalidStateError):
            row.future.set_result(pixels)
        self._settle(row)

    # --- on the engine's thread ---

    def _run(self) -> None:
        try:
            lower_priority()
            while self._receive():
                self._rows = [row for row in self._rows if self._is_live(row)]
                if self._rows:
                    self._turn()
        # Whatever ends this thread must end every row's wait too, and reach check_health.
        except BaseException as error:
            self._die(error)
        self._rows = []
        self._staging.close()
        self._ended = True
        self._drain()

    def _receive(self) -> bool:
        """Take in rows that have begun, and wait only if there is nothing to do; False to end."""
        if not self._rows and not self._is_over:
            self._take(self._begun.get())
        with suppress(queue.Empty):
            while True:
                self._take(self._begun.get_nowait())
        return not self._is_over

    @property
    def _is_over(self) -> bool:
        return self.fatal is not None or (self._closing and not self._unresolved)

    def _take(self, row: Row | None) -> None:
        if row is not None:
            self._rows.append(row)

    def _turn(self) -> None:
        """One step of the rows whose turn it is; those that are done go to be finished."""
        group = choose(self._rows, self._key, self._current_limits, self.pace, self._clock())
        self._step(group.rows, group.closed)
        for row in group.rows:
            if not row.progress.steps_left and not row.future.done():
                self._rows.remove(row)
                finish = partial(self._pipeline.finish, row.state)
                resolve = partial(self._resolve, row)
                self._staging.put(Job(row, finish, resolve, after=record_event()))

    def _key(self, row: Row) -> Any:
        return self._pipeline.key(row.state)

    @property
    def _current_limits(self) -> GroupLimits:
        """The limits, and what running out of memory has taught."""
        limits, affordable_px = self.limits, self._affordable_px
        if affordable_px is None or (limits.budget_px or affordable_px) < affordable_px:
            return limits
        return GroupLimits(limits.max_batch_size, affordable_px, limits.exact)

    def _step(self, rows: Sequence[Row], closed: Closed, *, again: bool = False) -> None:
        """Step a group; if that fails, its halves, so that only the row at fault fails.

        A row alone that runs out of memory is tried a second time, with cached memory given back.
        """
        start_s = self._clock()
        try:
            self._pipeline.step([row.state for row in rows])
            self._keep_up()
        except Exception as error:
            if is_fatal(error):
                raise
            if len(rows) == 1:
                if again or not isinstance(error, torch.OutOfMemoryError):
                    self._fail_with(rows[0], error)
                    return
            else:
                self._learn_from(error, rows)
        else:
            self._account(rows, start_s)
            if self._on_pass:
                self._on_pass(Pass(rows, closed, self._clock() - start_s))
            return
        # Outside the handler: the error's traceback holds the memory that the halves need.
        free_cached_memory()
        if len(rows) == 1:
            self._step(rows, "memory", again=True)
            return
        middle = len(rows) // 2
        for half in (rows[:middle], rows[middle:]):
            if waiting := [row for row in half if not row.future.done()]:
                self._step(waiting, "memory")

    def _learn_from(self, error: Exception, rows: Sequence[Row]) -> None:
        # As text, see `_row_error`.
        logger.warning("A step of %d rows failed; trying its halves: %s", len(rows), repr(error))
        if isinstance(error, torch.OutOfMemoryError):
            # A row alone is always tried, because nothing tells beforehand what it needs.
            half_px = sum(row.progress.cost_px for row in rows) // 2
            self._affordable_px = min(half_px, self._affordable_px or half_px)
            self._affordable_passes = _FORGET_PASSES
            logger.warning(
                "Out of memory: the next %d passes hold at most %d network pixels",
                _FORGET_PASSES,
                self._affordable_px,
            )

    def _keep_up(self) -> None:
        """Let the host run at most one step ahead of the device, so that rows join and leave in
        time.
        """
        if event := record_event():
            self._events.append(event)
            if len(self._events) > 1:
                self._events.pop(0).synchronize()

    def _account(self, rows: Sequence[Row], start_s: float) -> None:
        seconds = self._clock() - start_s
        self._affordable_passes -= 1
        if self._affordable_passes <= 0:
            self._affordable_px = None
        self.pace.record(rows, seconds)
        cost_px = sum(row.progress.cost_px for row in rows)
        for row in rows:
            progress = row.progress
            progress.steps_left -= 1
            progress.pass_rows += len(rows)
            progress.stepping_s += seconds
            progress.compute_s += seconds * progress.cost_px / cost_px

    # --- on either thread ---

    def _is_live(self, row: Row) -> bool:
        """Whether someone still waits for the row; fails a row whose deadline has passed."""
        if row.input.deadline_s <= self._clock():
            self._fail(row, too_late())
        elif row.future.done():
            self._settle(row)
        return not row.future.done()

    def _fail_with(self, row: Row, error: Exception) -> None:
        self._fail(row, _row_error(error))

    def _fail(self, row: Row, error: ImagenError) -> None:
        # The caller may cancel between our look and our answer.
        with suppress(InvalidStateError):
            row.future.set_exception(error)
        self._settle(row)

    def _settle(self, row: Row) -> None:
        with self._lock:
            self._unresolved.discard(row)
        if self._closing:
            self._begun.put(None)

    def _die(self, error: BaseException) -> None:
        logger.error("The engine stopped", exc_info=error)
        self.fatal = self.fatal or error
        self._begun.put(None)
        self._drain()

    def _drain(self) -> None:
        """Fail every row that can no longer be served."""
        with self._lock:
            rows, self._unresolved = self._unresolved, set()
        for row in rows:
            self._fail(
                row,
                NotReady(
                    "The model is being replaced.",
                    value="being replaced",
                    remedy="Try again shortly.",
                ),
            )


def _row_error(error: Exception) -> ImagenError:
    """What the row's caller gets."""
    if isinstance(error, ImagenError):
        # A traceback would keep alive whatever was on the device at that moment.
        return error.with_traceback(None)
    # Logged as text: a log handler that keeps the error would keep its tensors alive.
    logger.error("A row failed:\n%s", "".join(traceback.format_exception(error)))
    return ModelFailed(
        "The model failed on this picture.",
        value="failed",
        remedy="Try again; if it keeps failing, report the request id.",
    )
