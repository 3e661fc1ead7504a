"""What all protocols ask of a request: models by name or task, no query, and a plain body."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.errors import InvalidParameter, NotFound, UnsupportedMedia
from deployments.notes import Code, Note, note
from deployments.tasks import Task

if TYPE_CHECKING:
    from starlette.requests import Request

    from deployments.catalogue import Registry
    from deployments.registry import ModelSpec

_OF_JOBS = ("Prefer", "Idempotency-Key")
"""Headers that native routes read."""


def named(name: str, served: Registry) -> ModelSpec:
    """A model by its name, or the default one of the task of that name.

    Raises:
        NotFound: there is none.
    """
    for spec in served.models:
        if name in names_of(spec, served):
            return spec
    if name in set(map(str, Task)):
        raise unserved(Task(name), name, known_models(served))
    raise NotFound("There is no such model.", value=name, remedy=known_models(served))


def unserved(task: Task, value: str, known: str) -> NotFound:
    """The error for a task that no model serves.

    Args:
        task: that was asked for.
        value: how the client named it.
        known: what there is.
    """
    return NotFound(
        f"No model serves the task {task} here.",
        value=value,
        remedy=f"{known} The operator can add a model for it with `imagen run"
        f" --serve {task}=NAME`; `imagen models list` has the names.",
    )


def names_of(spec: ModelSpec, served: Registry) -> tuple[str, ...]:
    """What a model may be called."""
    return (spec.name, str(spec.task)) if served.is_default(spec) else (spec.name,)


def known_models(served: Registry) -> str:
    """The models that there are, for errors."""
    return f"Models: {', '.join(f'{spec.name} ({spec.task})' for spec in served.models)}."


def check_plain(request: Request) -> None:
    """Refuse what no protocol reads: parameters in the address, and compressed bodies.

    Raises:
        InvalidParameter: there are parameters.
        UnsupportedMedia: the body is compressed.
    """
    packed = ", ".join(request.headers.getlist("content-encoding"))
    if packed.strip().lower() not in ("identity", ""):
        raise UnsupportedMedia(
            "Compressed bodies are not read.",
            value=f"Content-Encoding: {packed}",
            remedy="Send it without Content-Encoding; pictures are compressed already.",
        )
    if request.url.query:
        raise InvalidParameter(
            "Parameters go into the body, not behind the ? of the address.",
            value=request.url.query,
            remedy="Send them beside the picture, in the form or the JSON.",
        )


def unread_headers(request: Request) -> list[Note]:
    """A note for each header about jobs, for protocols that have none."""
    return [
        note(Code.PARAMETER_UNUSED, f"{name} was ignored: only routes below /api/v1/ make jobs.")
        for name in _OF_JOBS
        if name in request.headers
    ]
