"""The Ingress deployment: holds the model handles, and turns Ray's errors into ours."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
)
from starlette.datastructures import Headers, MutableHeaders

from deployments.contract import ImageJob, ImageResult, Task
from deployments.errors import Full, ImagenError, ModelFailed, NotReady
from deployments.store.node_init import pulling
from deployments.telemetry import HttpMetrics
from serve_app.api import ROUTES, Details, create_app, not_ready

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray.serve.handle import DeploymentHandle
    from starlette.types import Message, Receive, Scope, Send

    from deployments.registry import Registry
    from deployments.settings import Settings
    from serve_app.api import State

    Handle = DeploymentHandle[Any]

NAMES: dict[Task, str] = {
    Task.UPSCALE: "Upscale",
    Task.ENHANCE: "Enhance",
    Task.COMIC: "Comic",
    Task.AGED: "Aged",
    Task.BACKGROUND: "BackgroundRemove",
}
_ROUTES = {*ROUTES.values(), "/api/v1/models", "/healthz", "/readyz"}
_STATES_TTL_S = 1.0
_STATUS_TIMEOUT_S = 0.5
logger = logging.getLogger("ray.serve.imagen.ingress")


class HandleBackend:
    """A model deployment behind its Serve handle."""

    def __init__(self, task: Task, handle: Handle, retry_after_s: float) -> None:
        self._task = task
        self._handle = handle
        self._retry_after_s = retry_after_s

    async def replicas(self) -> list[Any]:
        """What each running replica says of its model; empty where none answers in time."""
        try:
            # Past the queues, so that busy replicas answer too.
            return await self._handle.broadcast("status").results_async(timeout_s=_STATUS_TIMEOUT_S)
        except (RayServeException, RayError, TimeoutError):
            return []

    async def __call__(self, job: ImageJob) -> ImageResult:
        response = self._handle.remote(job)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except (RayServeException, RayError) as error:
            raise self._translate(error) from None

    def _translate(self, error: Exception) -> ImagenError:
        if isinstance(error, BackPressureError):
            return Full(
                f"The queue of {self._task} is full.",
                value=str(self._task),
                remedy="Try again after Retry-After seconds.",
                retry_after_s=self._retry_after_s,
            )
        if isinstance(error, DeploymentUnavailableError):
            return not_ready(self._task, "failed")
        if isinstance(error, RayTaskError):
            ours: Any = error.cause
            return ours if isinstance(ours, ImagenError) else _unforeseen(self._task, error)
        return NotReady(
            f"The replica of {self._task} was lost.",
            value=str(self._task),
            remedy="Try again; another one is being started.",
            retry_after_s=self._retry_after_s,
        )


def _unforeseen(task: Task, error: RayTaskError) -> ModelFailed:
    logger.error("A replica raised an error of no known kind", exc_info=error)
    return ModelFailed(
        f"The model {task} failed on this picture.",
        value=str(task),
        remedy="Try again; if it keeps failing, report the request id.",
    )


class ServeBackends:
    """The five models of a Serve application."""

    def __init__(self, handles: Mapping[Task, Handle], retry_after_s: float) -> None:
        self._backends = {t: HandleBackend(t, h, retry_after_s) for t, h in handles.items()}
        self._application = serve.get_replica_context().app_name
        self._states: Mapping[Task, State] = {}
        self._stale_s = 0.0
        self._lock = asyncio.Lock()
        self._details = Details({}, {})
        self._details_stale_s = 0.0
        self._details_lock = asyncio.Lock()

    def __getitem__(self, task: Task) -> HandleBackend:
        return self._backends[task]

    async def states(self) -> Mapping[Task, State]:
        """As the Serve controller sees them, at most a second old."""
        async with self._lock:
            if time.monotonic() >= self._stale_s:
                status = await asyncio.to_thread(serve.status)
                deployments = status.applications[self._application].deployments
                self._states = {t: _state(deployments.get(n)) for t, n in NAMES.items()}
                self._stale_s = time.monotonic() + _STATES_TTL_S
        return self._states

    async def details(self) -> Details:
        """As replicas and nodes tell it, at most a second old; takes half a second at most."""
        async with self._details_lock:
            if time.monotonic() >= self._details_stale_s:
                running = [t for t, state in (await self.states()).items() if state == "ready"]
                replicas = asyncio.gather(*(self._backends[t].replicas() for t in running))
                percent = await pulling()
                self._details = Details(dict(zip(running, await replicas, strict=True)), percent)
                self._details_stale_s = time.monotonic() + _STATES_TTL_S
        return self._details


def _state(deployment: Any) -> State:
    """One deployment's state from its Serve status."""
    if deployment is None:
        return "starting"
    if deployment.replica_states.get("RUNNING", 0) > 0:
        return "ready"
    if deployment.status in ("UNHEALTHY", "DEPLOY_FAILED"):
        return "failed"
    idle = deployment.status == "HEALTHY" and not any(deployment.replica_states.values())
    return "idle" if idle else "starting"


class _ReplicaApp:
    """The ASGI app of whichever Ingress this process holds; built only once that has handles."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await _lifespan(receive, send)
        ingress: Any = serve.get_replica_context().servable_object
        await ingress.api(scope, receive, _without_repeated_id(scope, send))


def _without_repeated_id(scope: Scope, send: Send) -> Send:
    """Serve's proxy puts the request id of the request's header into the response too."""
    serves = Headers(scope=scope).get("x-request-id")

    async def send_once(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if headers.get("x-request-id") == serves:
                del headers["x-request-id"]
        await send(message)

    return send_once


async def _lifespan(receive: Receive, send: Send) -> None:
    while (await receive())["type"] == "lifespan.startup":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})


@serve.ingress(_ReplicaApp())  # pyright: ignore[reportUntypedClassDecorator]
class Ingress:
    """Speaks HTTP for the five models. Replicas share no state, so that any number behave as one.

    Args:
        handles: one per task.
        registry: what each task's model is.
        settings: limits and deadlines.
    """

    def __init__(
        self,
        handles: dict[Task, Handle],
        registry: Registry,
        settings: Settings,
    ) -> None:
        backends = ServeBackends(handles, settings.retry_after_s)
        self._metrics = HttpMetrics()
        self.api = create_app(backends, registry, settings, self._heard)

    def _heard(self, path: str, status: int, reason: str, seconds: float) -> None:
        route = path if path in _ROUTES else "other"  # whatever clients invent is one label
        self._metrics.answered(route, status, reason, seconds)
