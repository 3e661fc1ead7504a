"""The engine: decides which rows share a pipeline's next step, and sees each to its end."""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
import traceback
from concurrent.futures import InvalidStateError
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from deployments.engine.grouping import GroupLimits, Pace, Pass, choose
from deployments.engine.staging import Job, Staging, free_memory, give_way, mark
from deployments.errors import ImagenError, ModelFailed, NotReady, TooLarge, too_late

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from deployments.engine.grouping import Closed
    from deployments.engine.pipeline import Pipeline
    from deployments.engine.row import Row

_DEVICE_ERROR = re.compile(r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS|cuDNN error")
_IDLE_POLL_S = 0.01
_FORGET_PASSES = 1000
"""After so many passes, a limit that was learned by running out of memory is tried anew."""
logger = logging.getLogger("ray.serve.imagen.engine")


class Engine:
    """Steps rows of equal key together, whatever else they want and whenever they came.

    One thread steps. Another (`Staging`) begins and finishes rows, piece by piece, so that rows go
    on stepping while a picture is encoded or decoded.

    Guarantees:
        - a row that fails, is cancelled or passes its deadline never fails another, and is dropped
          within one step;
        - a row's future is resolved exactly once, also when the engine closes or dies;
        - no pass holds more than `limits`; a row that alone is more gets TooLarge, before anything
          is allocated for it;
        - after an error no row can be blamed for, `fatal` is set and every row gets NotReady.

    Args:
        pipeline: `begin` and `finish` are used on the staging thread, `step` on the engine's.
        limits: of a pass; may be changed at any time.
        pace: decides which group sizes are worth while, and knows what passes take.
        clock: seconds, monotonic.
        heard: told of each pass, on the engine's thread; must not raise.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        limits: GroupLimits | None = None,
        *,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
        heard: Callable[[Pass], None] | None = None,
    ) -> None:
        self.limits = limits or GroupLimits()
        self.fatal: BaseException | None = None
        self._pipeline = pipeline
        self.pace = pace or Pace()
        self._clock = clock
        self._heard = heard
        self._afforded_px: int | None = None
        self._afforded_passes = 0
        self._lock = threading.Lock()
        self._unresolved: set[Row] = set()
        self._begun: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._rows: list[Row] = []
        self._marks: list[Any] = []
        self._closing = False
        self._ended = False
        self._staging = Staging(
            wanted=self._wanted, failed=self._failed, died=self._die, is_fatal=is_fatal
        )
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def put(self, rows: Iterable[Row]) -> None:
        """Hand rows over; each one's future will be resolved. Thread-safe, returns at once."""
        for row in rows:
            row.arrived_s = self._clock()
            with self._lock:
                self._unresolved.add(row)
            self._staging.put(Job(row, partial(self._begin, row), partial(self._join, row)))
        # Set before the thread's own last drain, so that a row that comes beside it is not left.
        if self._ended:
            self._drain()

    def close(self, timeout_s: float = 30) -> None:
        """Finish the rows at hand, then end the threads."""
        self._closing = True
        self._begun.put(None)
        self._thread.join(timeout_s)

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no row is inside, also none that was given up in the middle of a pass."""
        end_s = time.monotonic() + timeout_s
        while self._unresolved and time.monotonic() < end_s:
            time.sleep(_IDLE_POLL_S)
        return not self._unresolved

    @property
    def alive(self) -> bool:
        threads = (self._thread, self._staging.thread)
        return self.fatal is None and all(thread.is_alive() for thread in threads)

    # --- on the staging thread ---

    def _begin(self, row: Row) -> Any:
        """Refuse what can never fit; else prepare the row."""
        budget_px = self.limits.budget_px
        row.cost_px = self._pipeline.cost_px(row)
        if budget_px is not None and row.cost_px > budget_px:
            raise TooLarge(
                "One pass of this request is more than the model's share of the device holds.",
                value=f"{row.cost_px} px, with {budget_px} px to spare",
                remedy="Send a smaller picture, or guidance_scale=1, which halves the work.",
            )
        yield from self._pipeline.begin(row)
        if row.steps_left < 1:
            raise ValueError("begin left the row no step")
        row.steps = row.steps_left

    def _join(self, row: Row, _: None) -> None:
        self._begun.put(row)

    def _resolve(self, row: Row, pixels: Any) -> None:
        row.queue_s = self._clock() - row.arrived_s - row.run_s - row.vae_s
        with suppress(InvalidStateError):
            row.future.set_result(pixels)
        self._settle(row)

    def _failed(self, row: Row, error: Exception) -> None:
        self._fail(row, _row_error(error))

    # --- on the engine's thread ---

    def _run(self) -> None:
        try:
            give_way()
            while self._receive():
                self._rows = [row for row in self._rows if self._wanted(row)]
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
        """Take in rows that have begun, waiting only when there is nothing to do; False to end."""
        if not self._rows and not self._over:
            self._take(self._begun.get())
        with suppress(queue.Empty):
            while True:
                self._take(self._begun.get_nowait())
        return not self._over

    @property
    def _over(self) -> bool:
        return self.fatal is not None or (self._closing and not self._unresolved)

    def _take(self, row: Row | None) -> None:
        if row is not None:
            self._rows.append(row)

    def _turn(self) -> None:
        group = choose(self._rows, self._pipeline.key, self._fitting, self.pace, self._clock())
        self._step(*group)
        for row in group.rows:
            if not row.steps_left and not row.future.done():
                self._rows.remove(row)
                work, then = partial(self._pipeline.finish, row), partial(self._resolve, row)
                self._staging.put(Job(row, work, then, after=mark()))

    @property
    def _fitting(self) -> GroupLimits:
        """The limits, and what running out of memory has taught."""
        limits, afforded_px = self.limits, self._afforded_px
        if afforded_px is None or (limits.budget_px or afforded_px) < afforded_px:
            return limits
        return GroupLimits(limits.max_batch_size, afforded_px, limits.exact)

    def _step(self, rows: Sequence[Row], closed: Closed, *, again: bool = False) -> None:
        """Step a group; on failure, its halves, so that only the row at fault fails.

        A row alone that runs out of memory is tried a second time, with what was cached given back.
        """
        start_s = self._clock()
        try:
            self._pipeline.step(rows)
            self._keep_up()
        except Exception as error:
            if is_fatal(error):
                raise
            if len(rows) == 1:
                if again or not isinstance(error, torch.OutOfMemoryError):
                    self._fail(rows[0], _row_error(error))
                    return
            else:
                self._learn(rows, error)
        else:
            self._account(rows, start_s)
            if self._heard:
                self._heard(Pass(rows, closed, self._clock() - start_s))
            return
        # Outside the handler: the error's traceback holds the memory the halves need.
        free_memory()
        if len(rows) == 1:
            self._step(rows, "memory", again=True)
            return
        middle = len(rows) // 2
        for half in (rows[:middle], rows[middle:]):
            if waiting := [row for row in half if not row.future.done()]:
                self._step(waiting, "memory")

    def _learn(self, rows: Sequence[Row], error: Exception) -> None:
        logger.warning("A step of %d rows failed; trying halves: %s", len(rows), repr(error))
        if isinstance(error, torch.OutOfMemoryError):
            # A row alone is always tried: what it needs is not known before.
            half_px = sum(row.cost_px for row in rows) // 2
            self._afforded_px = min(half_px, self._afforded_px or half_px)
            self._afforded_passes = _FORGET_PASSES
            logger.warning("For a while a pass holds %d network pixels at most", self._afforded_px)

    def _keep_up(self) -> None:
        """Let the host run one step ahead of the device, not more: rows join and leave in time."""
        if event := mark():
            self._marks.append(event)
            if len(self._marks) > 1:
                self._marks.pop(0).synchronize()

    def _account(self, rows: Sequence[Row], start_s: float) -> None:
        seconds = self._clock() - start_s
        self._afforded_passes -= 1
        if self._afforded_passes <= 0:
            self._afforded_px = None
        self.pace.record(rows, seconds)
        cost_px = sum(row.cost_px for row in rows)
        for row in rows:
            row.steps_left -= 1
            row.company += len(rows)
            row.run_s += seconds
            row.compute_s += seconds * row.cost_px / cost_px

    # --- on either ---

    def _wanted(self, row: Row) -> bool:
        """Whether somebody waits for the row; ends one whose time is over."""
        if row.deadline_s <= self._clock():
            self._fail(row, too_late())
        elif row.future.done():
            self._settle(row)
        return not row.future.done()

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


def is_fatal(error: BaseException) -> bool:
    """Whether the device is unusable afterwards: any CUDA error but running out of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    # cuBLAS and cuDNN report by plain RuntimeErrors.
    named = isinstance(error, RuntimeError) and _DEVICE_ERROR.search(str(error)) is not None
    return isinstance(error, torch.AcceleratorError) or named


def _row_error(error: Exception) -> ImagenError:
    if isinstance(error, ImagenError):
        # Whoever holds the row would hold, by the traceback, what was on the device then.
        return error.with_traceback(None)
    # As text: a log handler that keeps the error would keep its tensors alive.
    logger.error("A row failed:\n%s", "".join(traceback.format_exception(error)))
    return ModelFailed(
        "The model failed on this picture.",
        value="failed",
        remedy="Try again; if it keeps failing, report the request id.",
    )
