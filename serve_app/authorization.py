"""Who calls: the key of every request, its limits, and what the reference says of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from deployments.errors import Unauthorized
from serve_app.access.keys import ANONYMOUS
from serve_app.doors import KSERVE_HEALTH, below_root, door_at
from serve_app.problem import MEDIA_TYPE, Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from deployments.settings import AccessSettings
    from serve_app.access.keys import Key, KeyFile
    from serve_app.access.limits import Limits, Visit

OPEN = frozenset(
    {"", "/", "/healthz", "/readyz", *KSERVE_HEALTH, "/docs", "/openapi.json", "/playground"}
)
OPEN_BELOW = ("/docs/", "/files/", "/playground/")
"""Links below /files/ are signed; everything else here is for probes and readers."""
_SCHEME = "key"
_READABLE = (
    *("Location", "Preference-Applied", "Retry-After", "Server-Timing", "X-Request-Id"),
    *("RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset"),
    *("X-Imagen-Model", "X-Imagen-Seed", "X-Imagen-Batch-Size", "X-Imagen-Gpu-Seconds"),
    *("X-Imagen-Determinism", "X-Imagen-Size", "X-Imagen-Note"),
)
"""Headers of answers that pages of other origins may read."""
_OPENAI = ("Arch", "Helper-Method", "Lang", "OS", "Package-Version", "Poll-Helper", "Retry-Count")
_SENDABLE = (
    *("Authorization", "Idempotency-Key", "Last-Event-ID", "Prefer", "X-Request-Id"),
    # What OpenAI's client sends from a browser.
    *(f"X-Stainless-{name}" for name in (*_OPENAI, "Runtime", "Runtime-Version", "Timeout")),
)


def around(access: AccessSettings) -> list[Middleware]:
    """Middleware for proxies and browsers, if the settings want any. Errors pass through it."""
    found: list[Middleware] = []
    if access.trusted_proxies:
        found.append(
            Middleware(ProxyHeadersMiddleware, trusted_hosts=list(access.trusted_proxies))  # pyright: ignore[reportArgumentType] - types of ASGI under other names
        )
    if access.cors_origins:
        found.append(
            Middleware(
                CORSMiddleware,
                allow_origins=access.cors_origins,
                allow_methods=("GET", "POST", "DELETE"),
                allow_headers=_SENDABLE,
                expose_headers=_READABLE,
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class Audit:
    """What the access log says of a request beside its status."""

    visit: Visit
    client: str

    def __str__(self) -> str:
        visit = self.visit
        limit = f" limit={visit.refused}" if visit.refused else ""
        return f"key={visit.key.id} from={self.client} px={visit.pixels}{limit}"


class Access:
    """Asks for an API key, and holds its request to the key's limits, before any body is read.

    Routes find the key as `key` in the scope's state. They pass the pixels of a picture to
    `charge` there, and call `refund` if nothing comes of it.

    Args:
        keys: None asks nobody.
        limits: of keys.
        image_routes: paths whose POST takes one of a key's places for pictures.
    """

    def __init__(
        self, app: ASGIApp, keys: KeyFile | None, limits: Limits, image_routes: frozenset[str]
    ) -> None:
        self.app = app
        self.keys = keys
        self.limits = limits
        self.image_routes = image_routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, state = below_root(scope), scope["state"]
        headers = Headers(scope=scope)
        if self.keys is None or needs_no_key(scope["method"], path, headers):
            key = ANONYMOUS
        else:
            key = _key_of(headers, self.keys)
        visit = self.limits.visit(key)
        state |= {"key": key, "charge": visit.charge, "refund": visit.refund}
        state["answer_headers"] = visit.headers
        if key is not ANONYMOUS:
            state["audit"] = Audit(visit, (scope.get("client") or ("-",))[0])
        try:
            await visit.enter(picture=scope["method"] == "POST" and path in self.image_routes)
            await self.app(scope, receive, _leaving(visit, state, send))
        except Exception:
            # The client pays nothing for a fault of ours, but for a job that goes on all the same.
            await visit.leave(refund=not state.get("settled"))
            raise
        finally:
            await visit.leave()


def _leaving(visit: Visit, state: dict[str, Any], send: Send) -> Send:
    """Give a request's place back just before the end of its answer.

    A client that sends its next request at once finds it free. What the service itself refused or
    failed is not charged, unless a job has taken the request over.
    """
    status = 0

    async def send_and_leave(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif not message.get("more_body", False):
            refused = status == 429 or status >= 500
            await visit.leave(refund=refused and not state.get("settled"))
        await send(message)

    return send_and_leave


def needs_no_key(method: str, path: str, headers: Headers) -> bool:
    """Whether a request is answered without a key: pages, probes, signed links, preflights."""
    preflight = method == "OPTIONS" and "access-control-request-method" in headers
    return preflight or path in OPEN or path.startswith(OPEN_BELOW)


def _key_of(headers: Headers, keys: KeyFile) -> Key:
    """The key that a request names.

    Raises:
        Unauthorized: none, several, one of another kind, or one that is unknown or revoked.
    """
    given = headers.getlist("authorization")
    scheme, _, token = (given[0] if given else "").strip().partition(" ")
    if not given:
        found = "no Authorization header"
    elif len(given) > 1:
        found = "several Authorization headers"
    elif scheme.lower() != "bearer":
        found = "an Authorization header of another scheme"
    elif key := keys.find(token.strip()):
        return key
    else:
        found = "a key that is unknown or revoked"
    # The header itself may hold a secret, also one that is meant for another service.
    raise Unauthorized(
        "This route needs an API key.",
        value=found,
        remedy="Send the header `Authorization: Bearer` with a key from the operator.",
    )


def describe(openapi: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """The OpenAPI document with the key, and its refusals, at every route that needs one."""

    def described() -> dict[str, Any]:
        document = openapi()
        components = document.setdefault("components", {})
        if _SCHEME in components.get("securitySchemes", {}):
            return document  # FastAPI keeps it
        components["securitySchemes"] = {
            _SCHEME: {"type": "http", "scheme": "bearer", "description": "An API key"}
        }
        problem = {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}
        for path, operations in document["paths"].items():
            # Clients of other protocols read errors of another shape.
            content: Any = {"application/json": {}} if door_at(path) != "native" else problem
            for method, operation in operations.items():
                if not needs_no_key(method.upper(), path, Headers()):
                    operation["security"] = [{_SCHEME: []}]
                    answers = operation["responses"]
                    answers.setdefault(
                        "401", {"description": "No valid API key"} | {"content": content}
                    )
                    answers.setdefault(
                        "429",
                        {"description": "A limit of the key; see Retry-After"}
                        | {"content": content},
                    )
        return document

    return described
