"""Events of the store, for progress bars, logs and metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

Kind = Literal[
    "hit",  # a model was already in the store
    "miss",  # a model must be fetched; amount: total bytes
    "bytes",  # amount: bytes received from the source
    "adopted",  # amount: bytes taken over from an interrupted pull
    "seconds",  # amount: duration of a stage
    "verify_failure",
    "waited",  # amount: seconds spent waiting for another process that pulled the same model
    "retry",
    "disk_free",  # amount: bytes
    "done",  # a model is complete in the store
    "compiled",  # a compiled artefact was wanted
]
Outcome = Literal["loaded", "missing", "foreign", "damaged"]
"""Of a compiled artefact: in use, nowhere, made for something else, other bytes than locked."""
Stage = Literal["", "fetch", "verify", "sync", "load"] | Outcome


class Event(NamedTuple):
    """One event.

    Attributes:
        kind: see Kind.
        model: name in the registry.
        amount: bytes or seconds, as the kind says.
        stage: of `seconds`; of `compiled`, the outcome.
    """

    kind: Kind
    model: str
    amount: float = 0.0
    stage: Stage = ""


Listener = Callable[[Event], None]
"""Called from several threads; must be quick and must not raise."""


def ignore(_: Event) -> None:
    """A listener that does nothing."""
