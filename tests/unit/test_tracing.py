"""Which spans a batch of requests leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments import tracing
from deployments.engine.grouping import Pass
from deployments.engine.row import Progress, Row, RowInput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.trace import ReadableSpan

_EXPORTER = InMemorySpanExporter()
_TRACER = trace.get_tracer("test")


@pytest.fixture(scope="module", autouse=True)
def provider() -> None:
    """A process has one provider for good."""
    made = TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(_EXPORTER))
    trace.set_tracer_provider(made)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    _EXPORTER.clear()
    yield
    _EXPORTER.clear()


def a_row(steps: int, *, traced: bool = True) -> Row:
    context = None
    if traced:
        with _TRACER.start_as_current_span("request"):
            context = tracing.current()
    given = RowInput(None, np.zeros((1, 1, 3), np.uint8), 0, 0, context)
    return Row(given, progress=Progress(steps_left=steps))


def span_id(row: Row) -> int:
    assert row.input.trace
    return row.input.trace.span_id


def trace_id(row: Row) -> int:
    assert row.input.trace
    return row.input.trace.trace_id


def passes(spans: tracing.BatchSpans, *rows: Row) -> None:
    for row in rows:
        row.progress.steps_left -= 1
    spans.add(Pass(rows, "all", 0.1))


def batches() -> list[ReadableSpan]:
    return [span for span in _EXPORTER.get_finished_spans() if span.name == "batch"]


def linked(span: ReadableSpan) -> set[int]:
    return {link.context.span_id for link in span.links}


def test_one_span_for_as_long_as_the_same_rows_step_linked_to_each_request() -> None:
    spans, first, second = tracing.BatchSpans("comic"), a_row(3), a_row(3)
    for _ in range(3):
        passes(spans, first, second)
    (batch,) = batches()
    assert linked(batch) == {span_id(first), span_id(second)}
    assert batch.attributes == {"model": "comic", "rows": 2, "closed": "all", "passes": 3}
    assert batch.context
    assert batch.context.trace_id == trace_id(first), "else it would be sampled by itself"


def test_a_row_that_joins_ends_the_span_and_begins_another() -> None:
    spans, first, second = tracing.BatchSpans("comic"), a_row(3), a_row(2)
    passes(spans, first)
    passes(spans, second, first)
    passes(spans, first, second)
    assert [linked(batch) for batch in batches()] == [
        {span_id(first)},
        {span_id(first), span_id(second)},
    ]
    assert [batch.attributes["passes"] for batch in batches() if batch.attributes] == [1, 2]


def test_groups_that_take_turns_keep_their_spans() -> None:
    spans, first, second = tracing.BatchSpans("comic"), a_row(2), a_row(2)
    for row in (first, second, first, second):
        passes(spans, row)
    assert len(batches()) == 2


def test_a_row_that_is_given_up_ends_its_span_at_the_next_pass() -> None:
    spans, first, second = tracing.BatchSpans("comic"), a_row(5), a_row(5)
    passes(spans, first)
    first.future.cancel()
    passes(spans, second)
    assert [linked(batch) for batch in batches()] == [{span_id(first)}]


def test_rows_of_requests_that_are_not_traced_leave_nothing() -> None:
    spans = tracing.BatchSpans("comic")
    passes(spans, a_row(1, traced=False))
    assert not batches()


def test_a_stage_is_a_span_within_its_request() -> None:
    with _TRACER.start_as_current_span("request") as request:
        tracing.record("decode", 1.0, 1.5, {"decode_s": 0.5})
    (stage,) = [span for span in _EXPORTER.get_finished_spans() if span.name == "decode"]
    assert stage.parent
    assert stage.parent.span_id == request.get_span_context().span_id
    assert stage.end_time
    assert stage.start_time
    assert stage.end_time - stage.start_time == pytest.approx(5e8, abs=1e3)


def test_a_stage_of_a_request_that_is_not_traced_leaves_nothing() -> None:
    tracing.record("decode", 1.0, 1.5, {})
    assert not _EXPORTER.get_finished_spans()
