"""The HTTP API: its middleware, its routers, and one handler for every error."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Match, Mount
from starlette.staticfiles import StaticFiles

from deployments.errors import (
    ImagenError,
    MalformedRequest,
    MethodNotAllowed,
    NotFound,
    ServiceError,
)
from deployments.tasks import Task
from serve_app import authorization, page, service
from serve_app.access.keys import KeyFile
from serve_app.access.limits import Limits
from serve_app.authorization import Access
from serve_app.doors import below_root, door_at
from serve_app.fetching import Fetcher
from serve_app.intake import Intake
from serve_app.middleware import (
    AccessLog,
    BodyLimit,
    ErrorBoundary,
    Home,
    InFlightLimit,
    OnAnswer,
    RequestId,
)
from serve_app.problem import error_response
from serve_app.protocols import files, kserve, native, openai
from serve_app.protocols import jobs as job_routes
from serve_app.protocols.naming import unserved

if TYPE_CHECKING:
    from deployments.catalogue import Registry
    from deployments.settings import ClientSettings
    from serve_app.intake import Backends
    from serve_app.jobs.service import Jobs

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_ROUTERS = (openai.router, kserve.router, job_routes.router, files.router, service.router)
DESCRIPTION = (
    "Image models behind one API. Send a picture as the form field `image`; the answer is a "
    "picture. Every error is problem+json (RFC 9457) with fact, value, remedy and request id."
)


def create_app(
    backends: Backends,
    registry: Registry,
    clients: ClientSettings,
    on_answer: OnAnswer | None = None,
    jobs: Jobs | None = None,
    limits: Limits | None = None,
) -> FastAPI:
    """The whole HTTP API around the models. Knows neither Ray nor torch.

    Args:
        backends: the models.
        registry: what each model is.
        clients: limits and deadlines.
        on_answer: called after each answer.
        jobs: of the application; None if it keeps none.
        limits: counts what API keys use; None counts in this process.
    """
    limits = limits or Limits(lambda: None, "imagen", retry_after_s=clients.retry_after_s)
    app = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        redirect_slashes=False,
        static_url="/docs/static",
        title="Imagen",
        version=version("imagen"),
        description=DESCRIPTION,
        middleware=_middleware(clients, on_answer, _access(clients, registry, limits)),
    )
    app.state.backends, app.state.registry = backends, registry
    app.state.intake = Intake(backends, registry, clients)
    app.state.jobs = jobs
    app.state.fetcher = _fetcher(clients)
    app.state.retry_after_s = clients.retry_after_s
    _add_routes(app, registry, with_jobs=jobs is not None)
    app.add_exception_handler(ImagenError, on_error)
    app.add_exception_handler(HTTPException, on_error)
    if clients.access.auth == "keys":
        app.openapi = authorization.describe(app.openapi)
    return app


def _add_routes(app: FastAPI, registry: Registry, *, with_jobs: bool) -> None:
    for router in (native.router(registry, with_jobs=with_jobs), *_ROUTERS):
        app.include_router(router)
    page.add_page(app)
    # FastAPIOffline mounts the files of its page; `page.add_files` says what is wrong with that.
    for mount in [route for route in app.routes if isinstance(route, Mount)]:
        assert isinstance(mount.app, StaticFiles)  # noqa: S101 - nothing else is mounted
        app.routes.remove(mount)
        page.add_files(app, mount.path, mount.app)


def _fetcher(clients: ClientSettings) -> Fetcher | None:
    """What fetches pictures that requests name by address; None if nothing does."""
    if not clients.fetch.enabled:
        return None
    return Fetcher(clients.fetch, clients.limits.max_body_bytes)


def _access(clients: ClientSettings, registry: Registry, limits: Limits) -> Middleware:
    access = clients.access
    keys = KeyFile(access.keys_file, access.limits) if access.auth == "keys" else None
    native_routes = (task.route for task in registry)
    routes = frozenset((*native_routes, *openai.IMAGE_ROUTES, *kserve.infer_paths(registry)))
    return Middleware(Access, keys=keys, limits=limits, image_routes=routes)


def _middleware(
    clients: ClientSettings, on_answer: OnAnswer | None, access: Middleware
) -> list[Middleware]:
    """From the outside in."""
    return [
        Middleware(RequestId),
        Middleware(AccessLog, on_answer=on_answer),
        *authorization.around(clients.access),
        Middleware(ErrorBoundary),
        Middleware(Home, page=f"{page.PATH}/index.html", reference="/docs"),
        access,
        Middleware(
            BodyLimit,
            max_body_bytes=clients.limits.max_body_bytes,
            uploads=clients.uploads,
            retry_after_s=clients.retry_after_s,
        ),
        Middleware(
            InFlightLimit,
            max_uploads=clients.max_uploads,
            retry_after_s=clients.retry_after_s,
        ),
    ]


async def on_error(request: Request, error: Exception) -> Response:
    """Every error as a document: problem+json, or as the client's protocol has it."""
    if isinstance(error, ImagenError):
        if isinstance(error, ServiceError) and error.retry_after_s is None:
            error.retry_after_s = request.app.state.retry_after_s
        return error_response(error, request.scope)
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for these two alone
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = _allowed(request)
    return error_response(_ours(error, request), request.scope, headers)


def _allowed(request: Request) -> str:
    """The methods that the request's path takes. Starlette names those of one route alone."""
    routes = request.app.routes
    return ", ".join(
        method
        for method in _METHODS
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes
        )
    )


def _ours(error: HTTPException, request: Request) -> ImagenError:
    """Starlette's error in our own tree."""
    prefix = request.scope.get("root_path", "")
    known: dict[int, Callable[[], ImagenError]] = {
        404: lambda: _not_found(request, prefix),
        405: lambda: MethodNotAllowed(
            "This route does not take that method.",
            value=request.method,
            remedy=f"Use {_allowed(request)}.",
        ),
    }
    if known_error := known.get(error.status_code):
        return known_error()
    return MalformedRequest(
        f"{error.detail}.",
        value=f"HTTP {error.status_code}",
        remedy=f"See {prefix}/docs for what this route takes.",
    )


def _not_found(request: Request, prefix: str) -> NotFound:
    """The error for a path that is no route, or the route of a task that no model serves."""
    path = request.scope["path"]
    registry: Registry = request.app.state.registry
    by_door = {"openai": openai.IMAGE_ROUTES, "kserve": kserve.ROUTES}
    of_tasks = tuple(task.route for task in registry)
    named = by_door.get(door_at(below_root(request.scope)), of_tasks)
    routes = ", ".join(prefix + route for route in named)
    for task in Task:
        if path == prefix + task.route:
            return unserved(task, path, f"Served: {routes}.")
    return NotFound("There is no such route.", value=path, remedy=f"Image routes: {routes}.")
