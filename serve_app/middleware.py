"""Pure ASGI middleware, in one visible list: see `api.create_app`."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect

from deployments.errors import Full, ImagenError, NotReady, TooLarge
from serve_app import wire

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("ray.serve.imagen.access")  # Serve gives its children a handler
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestId:
    """Every request has an id, its client's if that is well-formed; the response repeats it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


Heard = Callable[[str, int, str, float], None]
"""Told of each answer: path, status, reason (`ok`, or the code of the problem), seconds."""


class AccessLog:
    """One line a request: method, path, status, seconds, request id.

    Args:
        heard: is told, too; of a client that left before its answer, status 0 and reason `gone`.
    """

    def __init__(self, app: ASGIApp, heard: Heard | None = None) -> None:
        self.app = app
        self.heard = heard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start_s, status = time.monotonic(), 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            seconds = time.monotonic() - start_s
            logger.info(
                "%s %s %s %.3f s %s",
                scope["method"],
                quote(scope["path"], errors="replace"),
                status or "gone",
                seconds,
                scope["state"]["request_id"],
            )
            if self.heard:
                reason = scope["state"].get("reason", "ok") if status else "gone"
                self.heard(scope["path"], status, reason, seconds)


class ErrorBoundary:
    """The last seam: whatever a route did not foresee becomes a problem, never a traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except ClientDisconnect:
            logger.info("Client left, request %s", scope["state"]["request_id"])
        # Nothing may leave as a 500; the log keeps the traceback.
        except Exception as error:
            if started:
                raise
            request_id = scope["state"]["request_id"]
            if not isinstance(error, ImagenError):
                logger.exception("Unforeseen error, request %s", request_id)
                error = NotReady(
                    "The service could not handle the request.",
                    remedy="Try again; if it keeps failing, report the request id.",
                    retry_after_s=5,
                )
            await wire.error_response(error, scope)(scope, receive, send)


class InFlightLimit:
    """At most so many uploads at a time in this process; one more is told when to come back.

    Keep it below the Ingress's `max_ongoing_requests`: Serve's own refusal is plain text.
    """

    def __init__(self, app: ASGIApp, max_uploads: int, retry_after_s: float) -> None:
        self.app = app
        self.max_uploads = max_uploads
        self.retry_after_s = retry_after_s
        self._uploads = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if self._uploads >= self.max_uploads:
            refusal = wire.error_response(self._full(), scope)
            return await refusal(scope, receive, send)
        self._uploads += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._uploads -= 1

    def _full(self) -> Full:
        return Full(
            "The service takes no more uploads at the moment.",
            value=f"{self._uploads} under way",
            remedy="Try again after Retry-After seconds.",
            retry_after_s=self.retry_after_s,
        )


class BodyLimit:
    """Bodies are limited while they stream in, and a body nobody reads is thrown away.

    A proxy in front hands a body on as it arrives; left unread, it would pile up in this process.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, drain_s: float = 10.0) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.drain_s = drain_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        seen, ended = 0, False

        async def limited() -> Message:
            nonlocal seen, ended
            message = await receive()
            seen += len(message.get("body", b""))
            ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
            if seen > self.max_body_bytes:
                raise self._too_large(f"more than {self.max_body_bytes} bytes")
            return message

        declared = Headers(scope=scope).get("content-length", "0")
        if _exceeds(declared, self.max_body_bytes):
            error = self._too_large(f"{declared} bytes")
            await wire.error_response(error, scope)(scope, receive, send)
        else:
            await self.app(scope, limited, send)
        if not ended:
            await _discard(receive, self.drain_s)

    def _too_large(self, size: str) -> TooLarge:
        return TooLarge(
            f"The body may have at most {self.max_body_bytes} bytes.",
            value=size,
            remedy="Send a smaller picture, or one in a compressed format.",
        )


def _exceeds(declared: str, limit: int) -> bool:
    # Compared by length first: Python refuses to read numbers of more than 4,300 digits.
    digits = declared.lstrip("0") or "0"
    return digits.isdecimal() and (len(digits) > len(str(limit)) or int(digits) > limit)


async def _discard(receive: Receive, limit_s: float) -> None:
    """Read what is left of a body into nothing, for a bounded time."""
    try:
        async with asyncio.timeout(limit_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return
