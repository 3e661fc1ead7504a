"""Pictures in JSON: as base64, as a data URL (RFC 2397), or by address."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from typing import TYPE_CHECKING, Any, cast

from deployments.contract import PICTURE
from deployments.errors import InvalidParameter, MalformedRequest, UnsupportedMedia
from serve_app.protocols.multipart import MAX_FIELD_BYTES, MAX_PARTS, MAY_BE_FILES, Form

if TYPE_CHECKING:
    from starlette.requests import Request

    from serve_app.fetching import Fetcher

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_WORD = re.compile(r"#?\w{0,30}")
"""A colour, say, and no picture: those take more characters."""
_SHOWN = 40
"""Characters of a wrong value that an error shows."""
_MOST_HEAD = 200
"""Characters of a data URL before its data."""
_MOST_NESTED = 1000
"""Objects and lists of a body: far more than any request has."""
_BLANKS = "\t\n\r "


async def read_body(request: Request) -> bytes:
    """All of a body. Unlike `Request.body`, the request does not keep it."""
    return b"".join([chunk async for chunk in request.stream()])


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object that a request's body holds. Raises as `object_of`."""
    return object_of(await read_body(request))


def object_of(body: bytes) -> dict[str, Any]:
    """The JSON object that some bytes hold.

    Raises:
        MalformedRequest: it is no JSON, no object, or holds far too much.
        InvalidParameter: a name comes twice.
    """
    if body.count(b"{") + body.count(b"[") > _MOST_NESTED or body.count(b":") > _MOST_NESTED:
        raise MalformedRequest(
            "The body holds more than any request has.",
            value=f"{len(body)} bytes",
            remedy="Send each parameter once.",
        )
    size = len(body)
    try:
        text = body.decode("utf-8-sig")
        del body  # it may be large, and the caller may have let it go
        found: object = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise MalformedRequest(
            "The body is not JSON.",
            value=f"{size} bytes",
            remedy="Send a JSON object in UTF-8.",
        ) from error
    if not isinstance(found, dict):
        raise MalformedRequest(
            "The body must be a JSON object.",
            value=json.dumps(found)[:_SHOWN],
            remedy='Send {"name": value, …}.',
        )
    return cast("dict[str, Any]", found)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(pairs) > MAX_PARTS:
        raise MalformedRequest(
            f"An object of the body has more than {MAX_PARTS} names.",
            value=f"{len(pairs)}",
            remedy="Send each parameter once.",
        )
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidParameter(
            f"The field {twice[:100]} comes more than once.",
            value=f"{names.count(twice)} times",
            remedy="Send it once.",
        )
    return found


async def read_form(request: Request, *, needs_image: bool = True) -> Form:
    """A JSON body as the form that it stands for: pictures are base64, all else is a parameter.

    Raises:
        MalformedRequest: it is no JSON object, or lacks the image.
        InvalidParameter: a value is of the wrong kind.
        UnsupportedMedia: a picture is a data URL of something else.
        TooLarge: the image was fetched, and is too large.
    """
    given = await read_object(request)
    image = given.pop("image", None)
    if image is None and needs_image:
        raise MalformedRequest(
            "The body has no image.",
            value=", ".join(sorted(given)) or "no field",
            remedy="Add the picture as base64 or as a data URL: image.",
        )
    image = None if image is None else await picture_at(request, "image", image)
    files = take_files(given)
    fields = {name: text_of(name, value) for name, value in given.items() if value is not None}
    return Form(image, fields, **files)


def take_files(given: dict[str, Any]) -> dict[str, bytes]:
    """Take the background and the mask out of a JSON object, where they are pictures.

    The word picture stays in their place, as in a form. A word of the client's stays, too.

    Raises as `picture_of`.
    """
    files: dict[str, bytes] = {}
    for name in MAY_BE_FILES:
        value = given.get(name)
        if isinstance(value, str) and not _WORD.fullmatch(value):
            files[name] = picture_of(name, value)
            given[name] = PICTURE
    return files


async def picture_at(request: Request, name: str, value: object) -> bytes:
    """The bytes of a picture in a request, fetched if it is an address and the service does that.

    Raises as `picture_of`, and as `Fetcher.fetch`.
    """
    fetcher: Fetcher | None = request.app.state.fetcher
    if fetcher is None or not isinstance(value, str) or not _ADDRESS.match(value):
        return picture_of(name, value)
    state = request.scope["state"]
    return await fetcher.fetch(value, state["key"].id, state["hold_bytes"])


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
        raise _not_fetched(name, text)
    if text[:5].lower() == "data:":
        most = len("data:") + _MOST_HEAD + 1
        end = text.find(",", 0, most)
        _check_head(name, text[len("data:") : most if end < 0 else end])
        text = text[end + 1 :]
    if any(blank in text for blank in _BLANKS):
        text = text.translate(dict.fromkeys(map(ord, _BLANKS)))
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise InvalidParameter(
            f"{name} is not base64.",
            value=(text or json.dumps(value))[:_SHOWN],
            remedy="Send base64 (RFC 4648) or data:image/png;base64,….",
        )
    return data


def _not_fetched(name: str, address: str) -> InvalidParameter:
    remedy = "Send the picture itself, as base64 or as a data URL."
    if name.lower() == "image":  # no other picture is ever fetched
        remedy += (
            " The operator can switch fetching on for native JSON and OpenAI's edits:"
            " fetch.enabled."
        )
    return InvalidParameter(
        f"{name} is an address, and is not fetched.", value=address[:_SHOWN], remedy=remedy
    )


def _check_head(name: str, head: str) -> None:
    """Check what a data URL says of its data."""
    kind, *options = head[:_MOST_HEAD].lower().split(";")
    if kind and not kind.startswith("image/"):
        raise UnsupportedMedia(
            f"The data URL in {name} is of another kind.",
            value=kind[:_SHOWN],
            remedy="Send a picture: data:image/png;base64,….",
        )
    if "base64" not in options or len(head) > _MOST_HEAD:
        raise InvalidParameter(
            f"The data URL in {name} is not base64.",
            value=head[:_SHOWN],
            remedy="Send data:image/png;base64,….",
        )


def text_of(name: str, value: object) -> str:
    """A parameter's value as the text that a form would have.

    Raises:
        InvalidParameter: it is a list, an object, null, no finite number, or too long.
    """
    if isinstance(value, str):
        if len(value) > MAX_FIELD_BYTES:
            raise InvalidParameter(
                f"The field {name[:100]} is longer than {MAX_FIELD_BYTES} characters.",
                value=f"{len(value)} characters",
                remedy="Shorten it.",
            )
        return value
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    raise InvalidParameter(
        f"{name} must be a text, a finite number, true or false.",
        value=json.dumps(value)[:_SHOWN],
        remedy="Send one of these; a field that is not required may be left out.",
    )


def base64_of(data: bytes) -> str:
    """The bytes as base64 text."""
    return base64.b64encode(data).decode("ascii")
