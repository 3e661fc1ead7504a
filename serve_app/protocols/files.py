"""The route of signed links to pictures that lie in a folder rather than in a bucket."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request
from starlette.datastructures import Headers
from starlette.responses import FileResponse, Response

from serve_app.protocols.jobs import UNAVAILABLE, TheJobs, problems
from serve_app.protocols.parameters import LinkQuery, header_parameters, query_parameters

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from serve_app.jobs.files import LinkedFile
    from serve_app.jobs.places import Places

_RANGE = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-0*[1-9][0-9]{0,17})")
_REQUEST_HEADERS = {"Range": "one range of bytes; any other is ignored, as RFC 9110 allows"}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_PICTURES = {f"image/{name}": _BINARY for name in ("png", "webp", "jpeg")}
router = APIRouter(tags=["jobs"])


class Download(FileResponse):
    """A file in pieces, so that its size is no matter. It holds a place as long as it takes.

    Args:
        file: to send.
        places: of downloads.
    """

    def __init__(self, file: LinkedFile, places: Places) -> None:
        headers = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"}
        super().__init__(
            file.path, headers=headers, media_type=file.media_type, stat_result=file.status
        )
        self._size = file.status.st_size
        self._places = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Starlette answers a range that it cannot send in plain text.
        if not _is_within(Headers(scope=scope).getlist("range"), self._size):
            others = [(name, value) for name, value in scope["headers"] if name != b"range"]
            scope = {**scope, "headers": others}
        with self._places.take():
            await super().__call__(scope, receive, send)


def _is_within(ranges: list[str], size: int) -> bool:
    """Whether there is one range, and the file has its first byte."""
    found = _RANGE.fullmatch(ranges[0]) if len(ranges) == 1 else None
    if found is None or not found[1]:
        return found is not None and size > 0
    return int(found[1]) < size and int(found[1]) <= int(found[2] or size)


@router.get(
    "/files/{path:path}",
    summary="A result, by a signed link",
    responses={
        200: {"description": "The picture", "content": _PICTURES},
        206: {"description": "The part that Range asks for", "content": _PICTURES},
        **problems(
            s403="The link has expired or was altered",
            s404="The job was forgotten",
            s429="Too many downloads; see Retry-After",
        ),
        **UNAVAILABLE,
    },
    response_class=Response,
    openapi_extra={
        "parameters": [*query_parameters(LinkQuery), *header_parameters(_REQUEST_HEADERS)]
    },
)
async def get_file(request: Request, path: str, jobs: TheJobs) -> Response:
    """Where pictures are in a folder rather than in a bucket. Needs no key."""
    link = LinkQuery.model_validate(dict(parse_qsl(request.url.query)))
    file = await jobs.files.open_link(path, link.expires, link.signature)
    return Download(file, jobs.downloads)
