"""The HTTP API: image routes, models, health, and one handler for every error."""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fastapi import FastAPI, Request
from fastapi_offline import FastAPIOffline
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response

from deployments import images
from deployments.contract import REQUESTS, BackgroundRequest, ImageJob, Task, check_used, parse
from deployments.errors import (
    ImagenError,
    InvalidParameter,
    MalformedRequest,
    MethodNotAllowed,
    NotFound,
    NotReady,
    ServiceError,
    SlowUpload,
    TooLarge,
    too_late,
)
from serve_app.middleware import (
    AccessLog,
    BodyLimit,
    ErrorBoundary,
    Heard,
    Home,
    InFlightLimit,
    RequestId,
)
from serve_app.protocols import native, openapi

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Literal

    from deployments.contract import ImageResult, TaskRequest
    from deployments.registry import ModelSpec, Registry
    from deployments.settings import Settings

    State = Literal["ready", "idle", "starting", "failed"]

_OPERATOR_S = 60
"""A model that gave up starting needs somebody: nobody knows how long."""
ROUTES: dict[Task, str] = {
    Task.UPSCALE: "/api/v1/images/upscale",
    Task.ENHANCE: "/api/v1/images/enhance",
    Task.COMIC: "/api/v1/images/style/comic",
    Task.AGED: "/api/v1/images/style/aged",
    Task.BACKGROUND: "/api/v1/images/background/remove",
}


class Backend(Protocol):
    """Whatever runs one model.

    Raises only errors of our own tree.
    """

    async def __call__(self, job: ImageJob) -> ImageResult: ...


class Details(NamedTuple):
    """Behind the states.

    Attributes:
        replicas: of each task with running ones, what each serves: digest serving, digest wanted,
            and why they differ.
        pulling: percent of each model that some node is fetching, by model name.
    """

    replicas: Mapping[Task, list[Any]]
    pulling: Mapping[str, float]


class Backends(Protocol):
    """The five models, and how they are."""

    def __getitem__(self, task: Task) -> Backend: ...

    def recovery_s(self, task: Task) -> float:
        """Seconds after which a model that is not ready will probably answer."""
        ...

    async def states(self) -> Mapping[Task, State]:
        """ready, idle (no replica, wakes on demand), starting or failed."""
        ...

    async def details(self) -> Details:
        """What replicas serve, and what nodes pull."""
        ...


def create_app(
    backends: Backends, registry: Registry, settings: Settings, heard: Heard | None = None
) -> FastAPI:
    """The whole HTTP API around five backends. Knows neither Ray nor torch.

    Args:
        heard: is told of each answer.
    """
    app = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        redirect_slashes=False,
        static_url="/docs/static",
        title="Imagen",
        version="1.0.0",
        description=openapi.DESCRIPTION,
        middleware=[
            Middleware(RequestId),
            Middleware(AccessLog, heard=heard),
            Middleware(ErrorBoundary),
            Middleware(Home, path="/docs"),
            Middleware(
                BodyLimit,
                max_body_bytes=settings.limits.max_body_bytes,
                uploads=settings.uploads,
                retry_after_s=settings.retry_after_s,
            ),
            Middleware(
                InFlightLimit,
                max_uploads=settings.max_uploads,
                retry_after_s=settings.retry_after_s,
            ),
        ],
    )
    app.add_exception_handler(ImagenError, _on_imagen_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    for task, path in ROUTES.items():
        _add_image_route(app, path, _Processor(task, backends, registry[task], settings))
    _add_service_routes(app, backends, registry)
    return app


class _Processor:
    """One image route: parse, call, respond."""

    def __init__(self, task: Task, backends: Backends, spec: ModelSpec, settings: Settings) -> None:
        self.task = task
        self._backends = backends
        self.spec = spec
        self._timeout_s = settings.request_timeout_s
        self._retry_after_s = settings.retry_after_s
        self._limits = images.Limits(**settings.limits.model_dump())
        # Few, because a hostile header can keep a thread busy for seconds.
        self._header_threads = ThreadPoolExecutor(settings.pixel_threads, "headers")

    async def __call__(self, request: Request) -> Response:
        try:
            return await self._answer(request)
        except ServiceError as error:
            if error.retry_after_s is None:
                error.retry_after_s = self._retry_after_s
            raise

    async def _answer(self, request: Request) -> Response:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._timeout_s
        try:
            async with asyncio.timeout_at(deadline_s):
                form = await native.read_form(request)
        except TimeoutError as error:
            raise _too_slow(self._timeout_s) from error
        try:
            async with asyncio.timeout_at(deadline_s):
                job = await self._job(request, form, lambda: deadline_s - loop.time())
                return native.image_response(await self._backends[self.task](job))
        except TimeoutError as error:
            raise await self._why_late() from error

    async def _job(
        self, request: Request, form: native.Form, left_s: Callable[[], float]
    ) -> ImageJob:
        _check_query(request)
        typed = parse(self.task, form.fields)
        check_used(typed, self.spec.parameters)
        header = await asyncio.get_running_loop().run_in_executor(
            self._header_threads, images.read_header, form.image, self._limits
        )
        scale = self.spec.scale
        width_px, height_px = header.width_px * scale, header.height_px * scale
        if scale > 1:
            self._check_output(width_px, height_px)
        accept = ", ".join(request.headers.getlist("accept"))
        # A cut-out needs alpha; any other picture may lose it if that is all the client takes.
        chosen = native.choose_format(typed.output_format, accept, transparent=is_cut_out(typed))
        images.check_encodable(chosen, width_px, height_px)
        return ImageJob(
            typed,
            form.image,
            chosen,
            left_s(),
            _request_id(request),
            header.width_px,
            header.height_px,
            time.time(),
        )

    def _check_output(self, width_px: int, height_px: int) -> None:
        limit = self._limits.max_output_px
        if width_px * height_px > limit:
            factor = self.spec.scale**2
            raise TooLarge(
                f"The result may have at most {limit} px.",
                value=f"{width_px} x {height_px} = {width_px * height_px} px",
                remedy=f"Send a picture of at most {limit // factor} px.",
            )

    async def _why_late(self) -> ImagenError:
        state = (await self._backends.states()).get(self.task, "starting")
        if state == "ready":
            return too_late()
        return not_ready(self.task, state, self._backends.recovery_s(self.task))


def is_cut_out(request: TaskRequest) -> bool:
    """Whether the result is transparent by the request's own wish."""
    return isinstance(request, BackgroundRequest) and request.output == "rgba"


def _check_query(request: Request) -> None:
    if request.url.query:
        raise InvalidParameter(
            "Parameters go into the form, not behind the ? of the address.",
            value=request.url.query,
            remedy="Send them as form fields, as curl -F steps=20 does.",
        )


def _too_slow(timeout_s: float) -> SlowUpload:
    return SlowUpload(
        "The upload takes too long.",
        value=f"more than {timeout_s:g} s",
        remedy="Send a smaller picture, or use a faster connection.",
    )


def not_ready(task: Task, state: State, recovery_s: float) -> NotReady:
    """The error for a model that cannot answer now."""
    failed = state == "failed"
    return NotReady(
        f"The model {task} is {state}.",
        value=state,
        remedy="Ask the operator; /readyz says more."
        if failed
        else "Try again after Retry-After seconds.",
        retry_after_s=max(recovery_s, _OPERATOR_S) if failed else recovery_s,
    )


def _add_image_route(app: FastAPI, path: str, processor: _Processor) -> None:
    kind = REQUESTS[processor.task]

    async def endpoint(request: Request) -> Response:
        return await processor(request)

    app.post(
        path,
        name=str(processor.task),
        operation_id=str(processor.task),
        summary=kind.__doc__,
        tags=["images"],
        response_class=Response,
        responses=openapi.RESPONSES,
        openapi_extra=openapi.request_body(kind, processor.spec),
    )(endpoint)


def _add_service_routes(app: FastAPI, backends: Backends, registry: Registry) -> None:
    @app.get("/api/v1/models", tags=["service"], summary="What serves each route, and its state")
    async def models(request: Request) -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        states = await backends.states()
        routes = {task: _under_root(request, ROUTES[task]) for task in Task}
        return {
            "models": [
                openapi.describe_model(registry[task], routes[task], states.get(task, "starting"))
                for task in Task
            ]
        }

    @app.get("/healthz", tags=["service"], summary="The process lives")
    async def healthz() -> dict[str, str]:  # pyright: ignore[reportUnusedFunction]
        return {"status": "alive"}

    @app.get(
        "/readyz",
        tags=["service"],
        summary="200 when every model is ready or idle",
        responses={503: {"description": "A model is starting or has failed"}},
    )
    async def readyz() -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        states = await backends.states()
        models = {str(task): states.get(task, "starting") for task in Task}
        waiting = [task for task in Task if models[task] not in ("ready", "idle")]
        ready = not waiting
        details = await backends.details()
        body = {
            "status": "ready" if ready else "not ready",
            "models": models,
            "replicas": {str(task): found for task, found in details.replicas.items()},
            "pulling_percent": {m: round(p, 1) for m, p in details.pulling.items()},
        }
        if ready:
            return JSONResponse(body)
        recovery_s = max(backends.recovery_s(task) for task in waiting)
        return JSONResponse(body, 503, {"Retry-After": str(math.ceil(recovery_s))})


def _under_root(request: Request, path: str) -> str:
    """A route as clients write it, below whatever prefix the application is deployed under."""
    return request.scope.get("root_path", "") + path


def _request_id(request: Request) -> str:
    return request.scope["state"]["request_id"]


async def _on_imagen_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ImagenError)  # noqa: S101 - Starlette dispatches by class
    return native.error_response(error, request.scope)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - Starlette dispatches by class
    routes = ", ".join(_under_root(request, route) for route in ROUTES.values())
    known: dict[int, Callable[[], ImagenError]] = {
        404: lambda: NotFound(
            "There is no such route.",
            value=request.scope["path"],
            remedy=f"Image routes: {routes}.",
        ),
        405: lambda: MethodNotAllowed(
            "This route does not take that method.",
            value=request.method,
            remedy=f"Use {Headers(error.headers or {}).get('allow', 'another one')}.",
        ),
    }

    def fallback() -> ImagenError:
        return MalformedRequest(
            f"{error.detail}.",
            value=f"HTTP {error.status_code}",
            remedy=f"See {_under_root(request, '/docs')} for what this route takes.",
        )

    ours = known.get(error.status_code, fallback)()
    return native.error_response(ours, request.scope, error.headers)
