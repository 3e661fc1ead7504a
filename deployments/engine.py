"""The engine: one thread owns a pipeline and decides which rows share its next step."""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
import traceback
from concurrent.futures import InvalidStateError
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from deployments.errors import ImagenError, ModelFailed, NotReady, too_late

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from deployments.pipelines.base import Pipeline, Pixels, Row

_DEVICE_ERROR = re.compile(r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS|cuDNN error")
logger = logging.getLogger("ray.serve.imagen.engine")


class Engine:
    """Steps rows of equal key together; oldest row first.

    Guarantees:
        - a row that fails, is cancelled or passes its deadline never fails another;
        - a row's future is resolved exactly once, also when the engine closes or dies;
        - after an error no row can be blamed for, `fatal` is set and every row gets NotReady.

    Args:
        pipeline: used on the engine's thread only, but for `fit` and `restore`.
        max_batch_size: most rows in one step; may be changed at any time.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        max_batch_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_batch_size = max_batch_size
        self.fatal: BaseException | None = None
        self._pipeline = pipeline
        self._clock = clock
        self._arrivals: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._rows: list[Row] = []
        self._closed = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def put(self, rows: Iterable[Row]) -> None:
        """Hand rows over; each one's future will be resolved. Thread-safe, returns at once."""
        for row in rows:
            row.arrived_s = self._clock()
            self._arrivals.put(row)
        # Set before the thread's own last drain, so that a row that comes beside it is not left.
        if self._ended:
            self._drain()

    def close(self, timeout_s: float = 30) -> None:
        """Finish the rows at hand, then end the thread."""
        self._arrivals.put(None)
        self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.fatal is None

    def _run(self) -> None:
        try:
            while self._admit():
                self._drop_abandoned()
                if self._rows:
                    self._turn()
        # Whatever ends this thread must end every row's wait too, and reach check_health.
        except BaseException as error:
            logger.exception("The engine stopped")
            self.fatal = error
        self._ended = True
        self._drain()

    def _admit(self) -> bool:
        """Take in what has arrived, waiting only when there is nothing to do; False to end."""
        if not self._rows and not self._closed:
            self._take(self._arrivals.get())
        with suppress(queue.Empty):
            while True:
                self._take(self._arrivals.get_nowait())
        return bool(self._rows) or not self._closed

    def _take(self, row: Row | None) -> None:
        if row is None:
            self._closed = True
        elif not row.cancelled:
            self._rows.append(row)
            self._guarded(row, self._pipeline.begin)

    def _drop_abandoned(self) -> None:
        now = self._clock()
        for row in self._rows:
            if row.deadline_s <= now and not row.cancelled:
                _fail(row, too_late())
        self._rows = [row for row in self._rows if not row.future.done()]

    def _turn(self) -> None:
        # 1) Oldest row first; whoever agrees with its key comes along.
        key = self._pipeline.key(self._rows[0])
        alike = [row for row in self._rows if self._pipeline.key(row) == key]
        group = alike[: self.max_batch_size]
        # 2) One step, then let the finished ones go.
        self._step(group)
        for row in group:
            if row.done:
                self._guarded(row, self._finish)
        self._rows = [row for row in self._rows if not row.future.done()]
        # 3) Take turns: rows that still have steps to go wait behind the others.
        stepped = [row for row in group if row in self._rows]
        self._rows = [row for row in self._rows if row not in stepped] + stepped

    def _step(self, rows: Sequence[Row]) -> None:
        """Step a group; on failure, its halves, so that only the row at fault fails."""
        start_s = self._clock()
        try:
            self._pipeline.step(rows)
        except Exception as error:
            if is_fatal(error):
                raise
            if len(rows) == 1:
                _fail(rows[0], _row_error(error))
                return
            logger.warning("A step of %d rows failed; trying halves: %s", len(rows), repr(error))
        else:
            self._account(rows, start_s)
            return
        # Outside the handler: the error's traceback holds the memory the halves need.
        middle = len(rows) // 2
        for half in (rows[:middle], rows[middle:]):
            if waiting := [row for row in half if not row.future.done()]:
                self._step(waiting)

    def _account(self, rows: Sequence[Row], start_s: float) -> None:
        seconds = self._clock() - start_s
        for row in rows:
            if row.batch_size == 0:
                row.queue_s = start_s - row.arrived_s
            row.batch_size = max(row.batch_size, len(rows))
            row.run_s += seconds
            row.compute_s += seconds / len(rows)

    def _finish(self, row: Row) -> None:
        _resolve(row, self._pipeline.finish(row))

    def _guarded(self, row: Row, work: Callable[[Row], None]) -> None:
        """Do `work` on one row; whatever it raises is that row's error alone."""
        try:
            work(row)
        except Exception as error:
            if is_fatal(error):
                raise
            _fail(row, _row_error(error))

    def _drain(self) -> None:
        """Fail every row that can no longer be served."""
        rows, self._rows = self._rows, []
        with suppress(queue.Empty):
            while True:
                row = self._arrivals.get_nowait()
                if row is not None:
                    rows.append(row)
        for row in rows:
            _fail(row, NotReady("The model is being replaced.", remedy="Try again shortly."))


def is_fatal(error: BaseException) -> bool:
    """Whether the device is unusable afterwards: any CUDA error but running out of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    # cuBLAS and cuDNN report by plain RuntimeErrors.
    named = isinstance(error, RuntimeError) and _DEVICE_ERROR.search(str(error)) is not None
    return isinstance(error, torch.AcceleratorError) or named


def _row_error(error: Exception) -> ImagenError:
    if isinstance(error, ImagenError):
        return error
    # As text: a log handler that keeps the error would keep its tensors alive.
    logger.error("A row failed:\n%s", "".join(traceback.format_exception(error)))
    return ModelFailed(
        "The model failed on this picture.",
        remedy="Try again; if it keeps failing, report the request id.",
    )


def _fail(row: Row, error: ImagenError) -> None:
    # The caller may cancel between our look and our answer.
    with suppress(InvalidStateError):
        row.future.set_exception(error)


def _resolve(row: Row, pixels: Pixels) -> None:
    with suppress(InvalidStateError):
        row.future.set_result(pixels)
