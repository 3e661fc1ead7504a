"""Pictures in JSON: as base64, or as a data URL (RFC 2397)."""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import TYPE_CHECKING, Any, cast

from deployments.errors import InvalidParameter, MalformedRequest, UnsupportedMedia
from serve_app.protocols.multipart import Form

if TYPE_CHECKING:
    from starlette.requests import Request

MEDIA_TYPE = "application/json"
_DATA_URL = re.compile(r"data:(?P<kind>[^;,]*)(?P<options>(?:;[^;,]*)*),(?P<data>.*)", re.DOTALL)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SHOWN = 40
"""Characters of a wrong value that an error shows."""


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object that a request's body holds.

    Raises:
        MalformedRequest: it is no JSON, or no object.
    """
    body = await request.body()
    try:
        found: object = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedRequest(
            "The body is not JSON.",
            value=f"{len(body)} bytes",
            remedy="Send a JSON object in UTF-8.",
        ) from error
    if not isinstance(found, dict):
        raise MalformedRequest(
            "The body must be a JSON object.",
            value=type(found).__name__,
            remedy='Send {"name": value, …}.',
        )
    return cast("dict[str, Any]", found)


async def read_form(request: Request, *, needs_image: bool = True) -> Form:
    """A JSON body as the form that it stands for: `image` is base64, all else a parameter.

    Raises:
        MalformedRequest: it is no JSON object, or lacks the image.
        InvalidParameter: a value is of the wrong kind.
        UnsupportedMedia: the image is a data URL of something else.
    """
    given = await read_object(request)
    image = given.pop("image", None)
    if image is None and needs_image:
        raise MalformedRequest(
            "The body has no image.",
            value=", ".join(sorted(given)) or "no field",
            remedy="Add the picture as base64 or as a data URL: image.",
        )
    fields = {name: text_of(name, value) for name, value in given.items() if value is not None}
    return Form(None if image is None else picture_of("image", image), fields)


def is_json(request: Request) -> bool:
    """Whether the body says that it is JSON."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == MEDIA_TYPE


def picture_of(name: str, value: object) -> bytes:
    """The bytes of a picture.

    Args:
        name: of the field, for errors.
        value: base64, or a data URL that holds it.

    Raises:
        InvalidParameter: it is neither.
        UnsupportedMedia: the data URL is of something else than a picture.
    """
    text = value if isinstance(value, str) else ""
    if _ADDRESS.match(text):
        raise InvalidParameter(
            f"{name} is an address, and this service fetches nothing.",
            value=text[:_SHOWN],
            remedy="Send the picture itself, as base64 or as a data URL.",
        )
    if found := _DATA_URL.fullmatch(text):
        _check_kind(name, found)
        text = found["data"]
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise InvalidParameter(
            f"{name} is not base64.",
            value=str(value)[:_SHOWN],
            remedy="Send base64 (RFC 4648) or data:image/png;base64,….",
        )
    return data


def _check_kind(name: str, url: re.Match[str]) -> None:
    if url["kind"] and not url["kind"].lower().startswith("image/"):
        raise UnsupportedMedia(
            f"The data URL in {name} is of another kind.",
            value=url["kind"][:_SHOWN],
            remedy="Send a picture: data:image/png;base64,….",
        )
    if "base64" not in url["options"].lower().split(";"):
        raise InvalidParameter(
            f"The data URL in {name} is not base64.",
            value=url.group()[:_SHOWN],
            remedy="Send data:image/png;base64,….",
        )


def text_of(name: str, value: object) -> str:
    """A parameter's value as the text that a form would have.

    Raises:
        InvalidParameter: it is a list, an object or null.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise InvalidParameter(
        f"{name} must be a text, a number, true or false.",
        value=json.dumps(value)[:_SHOWN],
        remedy="Leave it out for its default.",
    )


def base64_of(data: bytes) -> str:
    """The bytes as base64 text."""
    return base64.b64encode(data).decode("ascii")
