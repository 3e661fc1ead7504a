"""What routes read by themselves, and how the reference describes it.

FastAPI would read it too, and refuse it in its own words rather than as a problem.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from serve_app.jobs.record import Status

if TYPE_CHECKING:
    from collections.abc import Mapping

_MOST_PAGE = 100


class PageQuery(BaseModel, extra="forbid"):
    """Which page of jobs."""

    status: Status | None = Field(default=None, description="of the jobs; any without it")
    limit: int = Field(default=20, ge=1, le=_MOST_PAGE, description="most jobs on the page")
    cursor: str = Field(
        default="",
        pattern=r"^([0-9a-f]{32})?$",
        description="`next_cursor` of the page before",
    )


class LinkQuery(BaseModel):
    """What makes a link valid."""

    expires: str = Field(default="", description="Unix time at which the link stops working")
    signature: str = Field(default="", description="of the path and that time")


def query_parameters(kind: type[BaseModel]) -> list[dict[str, Any]]:
    """The fields of a class as OpenAPI parameters behind the `?`."""
    fields: dict[str, dict[str, Any]] = kind.model_json_schema()["properties"]
    return [
        {"name": name, "in": "query", "description": field.pop("description"), "schema": field}
        for name, field in fields.items()
    ]


def header_parameters(texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """Request headers as OpenAPI parameters: what each is for, by name."""
    return [
        {"name": name, "in": "header", "description": text, "schema": {"type": "string"}}
        for name, text in texts.items()
    ]
