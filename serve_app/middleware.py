"""Pure ASGI middleware, in one visible list: see `api.create_app`."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import RedirectResponse

from deployments.errors import Full, ImagenError, NotReady, SlowUpload, TooLarge
from serve_app.doors import KSERVE_HEALTH, Door, below_root, door_of
from serve_app.problem import error_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from deployments.settings import UploadSettings

logger = logging.getLogger("ray.serve.imagen.access")  # Serve gives its children a handler
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_PROBES = {"/healthz", "/readyz", *KSERVE_HEALTH}
"""Asked so often that their lines would bury the others."""
_STILL_S = 1.0
"""A body without a byte for so long makes room for one that arrives."""


class RequestId:
    """Gives every request an id: the client's if that is well-formed. The response repeats it.

    The response also gets the headers that others have put into `answer_headers` of the state,
    whoever makes it.
    """

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
                added = scope["state"].get("answer_headers", {})
                MutableHeaders(scope=message).update({"X-Request-Id": request_id, **added})
            await send(message)

        await self.app(scope, receive, send_with_id)


OnAnswer = Callable[[str, int, str, float, Door], None]
"""Called after each answer with the route, the status, the reason (`ok`, or the code of the
problem), the seconds it took, and the protocol. The route is the path below the application's root,
with names of parameters such as `{job_id}` for their values if it is known."""


class AccessLog:
    """Logs one line per request: method, path, status, seconds, request id. Probes are DEBUG.

    The line of a request with an API key goes on with the reason (`ok`, or the code of the problem)
    and the `audit` of the state.

    Args:
        on_answer: called as well. Of a client that left before its answer it gets status 0 and
            reason `disconnected`.
    """

    def __init__(self, app: ASGIApp, on_answer: OnAnswer | None = None) -> None:
        self.app = app
        self.on_answer = on_answer

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
            reason = scope["state"].get("reason", "ok") if status else "disconnected"
            audit = scope["state"].get("audit")
            logger.log(
                logging.DEBUG if below_root(scope) in _PROBES else logging.INFO,
                "%s %s %s %.3f s %s%s",
                scope["method"],
                quote(scope["path"], errors="replace"),
                status or "disconnected",
                seconds,
                scope["state"]["request_id"],
                f" {reason} {audit}" if audit else "",
            )
            if self.on_answer:
                self.on_answer(_route_of(scope), status, reason, seconds, door_of(scope))


def _route_of(scope: Scope) -> str:
    return getattr(scope.get("route"), "path_format", below_root(scope))


class ErrorBoundary:
    """Turns whatever error a route did not expect into a problem, never into a traceback."""

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
                logger.exception("Unexpected error, request %s", request_id)
                error = NotReady(
                    f"The service could not handle the request {request_id}.",
                    value=request_id,
                    remedy="Try again; if it keeps failing, report the request id.",
                    retry_after_s=5,
                )
            await error_response(error, scope)(scope, receive, send)


class Home:
    """The application's root: a page for browsers, and the way to the reference for the rest.

    A middleware, because below a prefix the root has no path that a route could match.

    Args:
        page: path of the page, for clients that take HTML.
        reference: path that others are sent to.
    """

    def __init__(self, app: ASGIApp, page: str, reference: str) -> None:
        self.app = app
        self.page = page
        self.reference = reference

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
        if not asked or (path := below_root(scope)) not in ("", "/"):
            return await self.app(scope, receive, send)
        root = scope.get("root_path", "")
        if "text/html" not in Headers(scope=scope).get("accept", ""):
            answer = RedirectResponse(root + self.reference, headers={"Vary": "Accept"})
        elif path == "":
            # The page names its files relative to a path that ends in a slash.
            answer = RedirectResponse(f"{root}/")
        else:
            answer = self.app
            scope = {**scope, "path": root + self.page}
        await answer(scope, receive, send)


class BodyLimit:
    """Limits the size and the pace of each body, and what all of them hold together.

    A body that brings nothing for `pause_s`, or less than `min_bytes_per_s`, is refused. When all
    bodies together hold too much, the one that has stood still longest gives up its room.

    A body that no route reads is left to the server in front, which discards it after the answer.

    `beside_bytes` of the request's state, where it is there, are held besides from the beginning: a
    message over gRPC, say.
    """

    def __init__(
        self, app: ASGIApp, max_body_bytes: int, uploads: UploadSettings, retry_after_s: float
    ) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.uploads = uploads
        self.retry_after_s = retry_after_s
        self._arriving: OrderedDict[_Body, None] = OrderedDict()  # longest still first
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if _exceeds(declared, self.max_body_bytes):
            raise self._too_large(f"{declared} bytes")
        announced = declared.strip("0") or "transfer-encoding" in headers
        if scope["method"] in ("GET", "HEAD") and not announced:
            return await self.app(scope, receive, send)
        self._make_room(bodies=1)
        now_s = asyncio.get_running_loop().time()
        beside_bytes = scope["state"].get("beside_bytes", 0)
        body = _Body(asyncio.timeout_at(now_s + self.uploads.pause_s), now_s, beside_bytes)
        self._held_bytes += beside_bytes
        scope["state"]["leave_upload"] = partial(self._forget, body)
        scope["state"]["hold_bytes"] = partial(self._hold, body)
        try:
            async with body.timer:
                self._arriving[body] = None
                await self.app(scope, self._limited(body, receive), self._answering(body, send))
        except TimeoutError as error:
            if not body.timer.expired():
                raise
            raise self._too_slow(body) from error
        finally:
            self._arriving.pop(body, None)
            self._forget(body)

    def _hold(self, body: _Body, some_bytes: int) -> None:
        """Count bytes that a route has fetched for its request; raises as `_make_room`."""
        body.came_bytes += some_bytes
        self._held_bytes += some_bytes
        self._make_room()

    def _forget(self, body: _Body) -> None:
        """Count its bytes no more."""
        self._held_bytes -= body.held_bytes
        body.came_bytes = body.beside_bytes = 0

    def _limited(self, body: _Body, receive: Receive) -> Receive:
        async def limited() -> Message:
            message = await receive()
            if body in self._arriving:
                self._take(body, message)
            return message

        return limited

    def _answering(self, body: _Body, send: Send) -> Send:
        """An answer that has begun is not refused any more, whatever its body does."""

        async def answering(message: Message) -> None:
            if message["type"] == "http.response.start" and body in self._arriving:
                self._end(body)
            await send(message)

        return answering

    def _end(self, body: _Body) -> None:
        """Wait for no more of it."""
        del self._arriving[body]
        if not body.timer.expired():
            body.timer.reschedule(None)

    def _take(self, body: _Body, message: Message) -> None:
        some_bytes = len(message.get("body", b""))
        body.came_bytes += some_bytes
        self._held_bytes += some_bytes
        if body.came_bytes > self.max_body_bytes:
            raise self._too_large(f"more than {self.max_body_bytes} bytes")
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._end(body)
        elif some_bytes:
            self._arriving.move_to_end(body)
            body.wait(some_bytes, self.uploads)
        self._make_room()

    def _make_room(self, bodies: int = 0) -> None:
        """Give up bodies that have stood still until the others fit.

        Raises:
            Full: every body is arriving.
        """
        uploads = self.uploads
        still_s = asyncio.get_running_loop().time() - _STILL_S
        while (
            len(self._arriving) + bodies > uploads.max_arriving
            or self._held_bytes > uploads.max_held_bytes
        ):
            longest = next(iter(self._arriving), None)
            if longest is None or longest.last_s > still_s:
                raise self._full()
            del self._arriving[longest]
            self._held_bytes -= longest.held_bytes
            longest.give_up()

    def _full(self) -> Full:
        return Full(
            "The service takes no more uploads at the moment.",
            value=f"{len(self._arriving)} arriving, {self._held_bytes} bytes held",
            remedy="Try again after Retry-After seconds.",
            retry_after_s=self.retry_after_s,
        )

    def _too_large(self, size: str) -> TooLarge:
        return TooLarge(
            f"The body may have at most {self.max_body_bytes} bytes.",
            value=size,
            remedy="Send a smaller picture, or one in a compressed format.",
        )

    def _too_slow(self, body: _Body) -> SlowUpload:
        uploads = self.uploads
        return SlowUpload(
            "The upload stood still, and others needed its room."
            if body.given_up
            else f"The upload stood still for {uploads.pause_s:g} s, or fell behind"
            f" {uploads.min_bytes_per_s} bytes a second.",
            value=f"{body.came_bytes} bytes came",
            remedy="Send it again; a smaller picture, or over a faster connection.",
        )


@dataclass(slots=True, eq=False)
class _Body:
    """A body that is arriving.

    Attributes:
        timer: ends the request unless more arrives by then.
        last_s: when the last byte arrived.
        beside_bytes: that are held for it besides: the message that it was taken out of.
        came_bytes: bytes so far.
        given_up: whether its room went to others.
    """

    timer: asyncio.Timeout
    last_s: float
    beside_bytes: int = 0
    came_bytes: int = 0
    given_up: bool = False

    @property
    def held_bytes(self) -> int:
        return 0 if self.given_up else self.came_bytes + self.beside_bytes

    def wait(self, some_bytes: int, uploads: UploadSettings) -> None:
        """Each byte buys time, but never more than one pause."""
        self.last_s = asyncio.get_running_loop().time()
        due_s = self.timer.when() or self.last_s
        earned_s = some_bytes / uploads.min_bytes_per_s
        self.timer.reschedule(min(due_s + earned_s, self.last_s + uploads.pause_s))

    def give_up(self) -> None:
        self.given_up = True
        if not self.timer.expired():
            self.timer.reschedule(0)


class InFlightLimit:
    """Limits how many uploads are worked on at a time; one more gets 429.

    Only an upload that has arrived whole takes a place, so that a client that stops sending blocks
    nobody. A route that has made a job of its upload gives the place back: it calls
    `leave_upload` in the request's state.
    """

    def __init__(self, app: ASGIApp, max_uploads: int, retry_after_s: float) -> None:
        self.app = app
        self.max_uploads = max_uploads
        self.retry_after_s = retry_after_s
        self._uploads = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        self._check()
        inside = counted_once = False

        async def counted() -> Message:
            nonlocal inside, counted_once
            message = await receive()
            whole = message["type"] == "http.request" and not message.get("more_body", False)
            if whole and not counted_once:
                self._check()
                inside = counted_once = True
                self._uploads += 1
            return message

        outer: Callable[[], None] = scope["state"].get("leave_upload", lambda: None)

        def leave() -> None:
            nonlocal inside
            self._uploads -= inside
            inside = False
            outer()

        scope["state"]["leave_upload"] = leave
        try:
            await self.app(scope, counted, send)
        finally:
            leave()

    def _check(self) -> None:
        if self._uploads >= self.max_uploads:
            raise Full(
                "The service takes no more uploads at the moment.",
                value=f"{self._uploads} under way",
                remedy="Try again after Retry-After seconds.",
                retry_after_s=self.retry_after_s,
            )


def _exceeds(declared: str, limit: int) -> bool:
    # Compared by length first: Python refuses to read numbers of more than 4,300 digits.
    digits = declared.lstrip("0") or "0"
    return digits.isdecimal() and (len(digits) > len(str(limit)) or int(digits) > limit)
