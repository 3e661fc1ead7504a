"""What a client says of the job rather than of the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from deployments.settings import Strict
from serve_app.jobs.record import ENDED, STATUSES, Priority

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_N = 8
MOST_DEADLINE_S = 7 * 86_400
_DAY_S = 86_400
_HOOKED = (*STATUSES[1:],)


class JobOptions(Strict):
    """Form fields that belong to a job."""

    n: int = Field(
        default=1,
        ge=1,
        le=MAX_N,
        description="Results, of the seeds seed, seed + 1, and so on. Above 1 only as a job: see "
        "the header Prefer.",
    )
    priority: Priority = Field(
        default="interactive",
        description="Of a job: batch jobs wait while there are interactive ones, most of the time.",
    )
    deadline_s: float = Field(
        default=86_400,
        ge=1,
        le=MOST_DEADLINE_S,
        description="Of a job: seconds after which it fails if it has not ended.",
    )
    webhook: str = Field(
        default="",
        max_length=2000,
        description="Of a job: URL that gets a signed event when it ends.",
    )
    webhook_events: str = Field(
        default=",".join(status for status in _HOOKED if status in ENDED),
        description=f"Of a job: the events for the webhook, of {', '.join(_HOOKED)}.",
    )
    preview: bool = Field(
        default=False,
        description="Of a job: whether its event stream carries small pictures of the steps.",
    )

    @field_validator("webhook_events")
    @classmethod
    def _known(cls, text: str) -> str:
        names = [name.strip() for name in text.split(",")]
        if unknown := [name for name in names if name not in _HOOKED]:
            raise ValueError(f"unknown event {unknown[0]!r}; there are {', '.join(_HOOKED)}")
        return ",".join(names)

    @property
    def wishes(self) -> dict[str, Any]:
        """The fields that ask for something else than their defaults."""
        return {
            name: value
            for name, value in self.model_dump().items()
            if value != type(self).model_fields[name].default
        }


def life_s(keep_s: float) -> float:
    """How long a picture may be needed, from its making: until its job has ended and expired.

    A day is added, because a job ends after its deadline if Redis or all workers are away.

    Args:
        keep_s: how long jobs are kept after their end.
    """
    return MOST_DEADLINE_S + keep_s + _DAY_S


def split(fields: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Form fields of the picture, and those of the job."""
    ours = JobOptions.model_fields
    return (
        {name: text for name, text in fields.items() if name not in ours},
        {name: text for name, text in fields.items() if name in ours},
    )
