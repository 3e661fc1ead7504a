"""An error as problem+json (RFC 9457), or as the clients of other protocols read it."""

from __future__ import annotations

import json
import math
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field
from starlette.responses import Response

from deployments.contract import WHOLE
from deployments.errors import SlowUpload, Unauthorized
from serve_app.doors import JSON, below_root, door_at

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import Scope

    from deployments.errors import ImagenError

MEDIA_TYPE = "application/problem+json"


class Problem(BaseModel):
    """The body of every answer that is not a picture or a document."""

    type: str = Field(description="urn:imagen:problem: and the code")
    title: str = Field(description="the phrase of the HTTP status")
    status: int
    code: str = Field(description="a stable name of the error")
    detail: str = Field(description="fact, value and remedy in one text")
    fact: str = Field(description="what is wrong")
    value: str = Field(description="what was found")
    remedy: str = Field(description="what to do")
    request_id: str
    errors: list[dict[str, Any]] | None = Field(
        default=None, description="the single findings, where there are several"
    )


def error_response(
    error: ImagenError, scope: Scope, headers: Mapping[str, str] | None = None
) -> Response:
    """An error as a response.

    429 and 503 say when to try again, 401 how to authenticate; 408 closes the connection.

    Args:
        error: what happened.
        scope: of the request. Its state holds the request id, and gets the error's code.
        headers: to add.
    """
    scope["state"]["reason"] = error.code
    own = dict(headers or {})
    if isinstance(error, SlowUpload):
        own["Connection"] = "close"  # else the server in front would wait for the rest
    if isinstance(error, Unauthorized):
        own["WWW-Authenticate"] = "Bearer"
    if error.retry_after_s is not None:
        own["Retry-After"] = str(math.ceil(error.retry_after_s))
    request_id = scope["state"]["request_id"]
    door = door_at(below_root(scope))
    if door in ("openai", "kserve"):
        write = openai_document if door == "openai" else kserve_document
        status = HTTPStatus.BAD_REQUEST if error.status == 422 else error.status
        body = json.dumps(write(error, request_id))
        return Response(body, status, own, media_type=JSON)
    body = json.dumps(error.details(request_id))
    return Response(body, error.status, own, media_type=MEDIA_TYPE)


def openai_document(error: ImagenError, request_id: str) -> dict[str, Any]:
    """An error as clients of OpenAI's API read it."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    names = [one["parameter"] for one in error.problems if one["parameter"] != WHOLE]
    return {
        "error": {
            "message": str(error),
            "type": "rate_limit_error" if error.status == 429 else kind,
            "param": names[0] if names else None,
            "code": error.code,
            "request_id": request_id,
        }
    }


def kserve_document(error: ImagenError, request_id: str) -> dict[str, Any]:
    """An error as clients of the KServe V2 protocol read it, who want `error` alone."""
    return {"error": str(error), "code": error.code, "request_id": request_id}
