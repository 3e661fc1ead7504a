"""Spans of our own, beside those that Serve makes if its `tracing_config` is enabled."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import Link, NonRecordingSpan, set_span_in_context

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.trace import Span, SpanContext

    from deployments.engine.grouping import Pass
    from deployments.engine.row import Row

_TRACER = trace.get_tracer("imagen")


def current() -> SpanContext | None:
    """The span context of the current request; None if it is not traced."""
    context = trace.get_current_span().get_span_context()
    return context if context.is_valid and context.trace_flags.sampled else None


def record(name: str, start_s: float, end_s: float, attributes: Mapping[str, float]) -> None:
    """Record a span of the current request that has ended, on the clock of `time.monotonic`."""
    if current() is None:
        return
    past_ns = time.time_ns() - time.monotonic_ns()
    span = _TRACER.start_span(name, start_time=past_ns + int(start_s * 1e9), attributes=attributes)
    span.end(past_ns + int(end_s * 1e9))


@dataclass(slots=True)
class _Batch:
    rows: frozenset[Row]
    span: Span
    passes: int = 0


class BatchSpans:
    """One span for as long as the same rows step together, linked to the request of each row.

    The span belongs to the trace of the first row, because a span without a trace would be sampled
    independently of its requests. For one thread.

    Args:
        model: its name, an attribute of the spans.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._open: list[_Batch] = []

    def add(self, done: Pass) -> None:
        """Rows have taken a step."""
        if batch := self._batch(done):
            batch.passes += 1
        for batch in [b for b in self._open if any(_is_over(row) for row in b.rows)]:
            self._end(batch)

    def _batch(self, done: Pass) -> _Batch | None:
        """The batch of exactly these rows; batches that share some of them end."""
        rows = frozenset(done.rows)
        for batch in list(self._open):
            if batch.rows == rows:
                return batch
            if batch.rows & rows:
                self._end(batch)
        contexts = [context for row in done.rows if (context := row.input.trace)]
        if not contexts:
            return None
        span = _TRACER.start_span(
            "batch",
            context=set_span_in_context(NonRecordingSpan(contexts[0])),
            links=[Link(context) for context in contexts],
            start_time=time.time_ns() - int(done.seconds * 1e9),
            attributes={"model": self._model, "rows": len(rows), "closed": done.closed},
        )
        self._open.append(_Batch(rows, span))
        return self._open[-1]

    def _end(self, batch: _Batch) -> None:
        self._open.remove(batch)
        batch.span.set_attribute("passes", batch.passes)
        batch.span.end()


def _is_over(row: Row) -> bool:
    return row.progress.steps_left < 1 or row.future.done()
