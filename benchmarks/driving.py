"""Runs rows through a pipeline without the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from deployments.engine.pipeline import AnyPipeline
    from deployments.engine.row import Pixels, RowInput


def drive(pipeline: AnyPipeline, rows: Sequence[RowInput[Any]]) -> list[Pixels]:
    """Run rows of one key together on this thread, from their first step to their last."""
    states = [_exhaust(pipeline.begin(row)) for row in rows]
    steps = [pipeline.steps(state) for state in states]
    for done in range(max(steps)):
        pipeline.step([state for state, n in zip(states, steps, strict=True) if n > done])
    return [_exhaust(pipeline.finish(state)) for state in states]


def _exhaust(pieces: Generator[None, None, Any]) -> Any:
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value
