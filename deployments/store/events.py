"""What the store tells while it works; progress bars, logs and metrics listen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

Kind = Literal[
    "hit",  # a model was there already
    "miss",  # a model must be fetched; amount: bytes in all
    "bytes",  # bytes that came over from the source
    "adopted",  # bytes taken over from an interrupted pull
    "seconds",  # time of a stage
    "verify_failure",
    "waited",  # seconds behind another process that pulled the same model
    "retry",
    "disk_free",  # bytes
    "done",  # a model is published in the store
]
Stage = Literal["", "fetch", "verify", "sync", "load"]


class Event(NamedTuple):
    """One thing that happened.

    Attributes:
        kind: see Kind.
        model: name in the registry.
        amount: bytes or seconds, as the kind says.
        stage: of `seconds`.
    """

    kind: Kind
    model: str
    amount: float = 0.0
    stage: Stage = ""


Listener = Callable[[Event], None]
"""Called from several threads; must be quick and must not raise."""


def ignore(_: Event) -> None:
    """The listener of those who do not care."""
