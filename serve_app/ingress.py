"""The Ingress deployment: holds the model handles, and turns Ray's errors into ours."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import ActorDiedError, RayError, RayTaskError
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
NOTICE_S = 2
"""How often Serve looks whether a replica lives: a lost one is replaced no sooner."""
_PROCESS_S = 3
"""A new process, before the model's own start in it."""
_START_S = 20
"""The start of a model on two busy cores, until a replica has said how long its own took."""
_VIEW_TTL_S = 1.0
_STATUS_TIMEOUT_S = 0.5
_GAVE_UP = {"REPLICA_STARTUP_FAILED", "DEPLOYMENT_ACTOR_FAILED", "INTERNAL_ERROR"}
logger = logging.getLogger("ray.serve.imagen.ingress")


class HandleBackend:
    """A model deployment behind its Serve handle."""

    def __init__(self, task: Task, handle: Handle, retry_after_s: float) -> None:
        self._task = task
        self._handle = handle
        self._retry_after_s = retry_after_s
        self._start_s: float | None = None
        self._lost_s: float | None = None
        self._asked: asyncio.Task[Any] | None = None

    @property
    def recovery_s(self) -> float:
        """Until there is a replica again, if the last one has been lost; at least a pause."""
        whole_s = NOTICE_S + _PROCESS_S + (self._start_s or _START_S)
        since_s = 0 if self._lost_s is None else time.monotonic() - self._lost_s
        return max(whole_s - since_s, self._retry_after_s)

    async def replicas(self) -> list[Any] | None:
        """What each running replica says of its model; None where that cannot be told in time."""
        try:
            # Past the queues, so that busy replicas answer too.
            answers = await self._handle.broadcast("status").results_async(
                timeout_s=_STATUS_TIMEOUT_S, return_exceptions=True
            )
        except DeploymentUnavailableError:
            answers = []
        except (RayServeException, RayError, TimeoutError):
            return None
        if not answers:
            # None that this process knows of: a new one is told a moment after it starts.
            return None if self._lost_s is None else []
        found = [answer for answer in answers if not isinstance(answer, Exception)]
        if found:
            self._start_s = max(status["start_s"] for status in found)
            self._lost_s = None
        elif all(isinstance(answer, ActorDiedError) for answer in answers):
            self.lose()
        else:
            return None
        return found

    async def __call__(self, job: ImageJob) -> ImageResult:
        response = self._handle.remote(job)
        try:
            result = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except (RayServeException, RayError) as error:
            raise self._translate(error) from None
        self._lost_s = None
        if self._start_s is None and self._asked is None:
            # While there is one to ask: how long the next one will take is known from the last.
            self._asked = asyncio.create_task(self.replicas())
        return result

    def lose(self) -> None:
        """From now on a new replica is awaited."""
        if self._lost_s is None:
            self._lost_s = time.monotonic()

    def _translate(self, error: Exception) -> ImagenError:
        if isinstance(error, BackPressureError):
            return Full(
                f"The queue of {self._task} is full.",
                value=str(self._task),
                remedy="Try again after Retry-After seconds.",
                retry_after_s=self._retry_after_s if self._lost_s is None else self.recovery_s,
            )
        if isinstance(error, DeploymentUnavailableError):
            return not_ready(self._task, "failed", self.recovery_s)
        if isinstance(error, RayTaskError):
            ours: Any = error.cause
            return ours if isinstance(ours, ImagenError) else _unforeseen(self._task, error)
        self.lose()
        return NotReady(
            f"The replica of {self._task} was lost.",
            value=str(self._task),
            remedy="Try again after Retry-After seconds; another one is being started.",
            retry_after_s=self.recovery_s,
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
        self._details = Details({}, {})
        self._stale_s = 0.0
        self._lock = asyncio.Lock()
        self._asked: asyncio.Future[Any] | None = None

    def __getitem__(self, task: Task) -> HandleBackend:
        return self._backends[task]

    def recovery_s(self, task: Task) -> float:
        return self._backends[task].recovery_s

    async def states(self) -> Mapping[Task, State]:
        """As replicas and the Serve controller tell it, at most a second old."""
        await self._look()
        return self._states

    async def details(self) -> Details:
        """As replicas and nodes tell it, at most a second old."""
        await self._look()
        return self._details

    async def _look(self) -> None:
        async with self._lock:
            if time.monotonic() < self._stale_s:
                return
            told = asyncio.gather(*(self._backends[task].replicas() for task in NAMES))
            deployments, percent = await asyncio.gather(self._deployments(), pulling())
            replicas = dict(zip(NAMES, await told, strict=True))
            last = self._states
            self._states = {
                task: _state(deployments.get(name), replicas[task], last.get(task))
                for task, name in NAMES.items()
            }
            for task, backend in self._backends.items():
                if (last.get(task), self._states[task]) == ("ready", "starting"):
                    backend.lose()
            self._details = Details({t: found for t, found in replicas.items() if found}, percent)
            self._stale_s = time.monotonic() + _VIEW_TTL_S

    async def _deployments(self) -> Mapping[str, Any]:
        """As the Serve controller sees them; nothing while it is away.

        A call to a controller that restarts lasts until it is back: whoever asks next waits for
        the same one.
        """
        if self._asked is None:
            self._asked = asyncio.ensure_future(asyncio.to_thread(serve.status))
        if not (await asyncio.wait({self._asked}, timeout=_STATUS_TIMEOUT_S))[0]:
            return {}
        asked, self._asked = self._asked, None
        try:
            application = asked.result().applications.get(self._application)
        except (RayServeException, RayError):
            return {}
        return application.deployments if application else {}


def _state(deployment: Any, replicas: list[Any] | None, last: State | None) -> State:
    """One model's state.

    Args:
        deployment: its Serve status; None while the controller is away.
        replicas: those that answered; None if that is unknown.
        last: the state before.
    """
    if replicas:
        return "ready"
    if deployment is None:
        kept = last if replicas is None or last != "ready" else None
        return kept or "starting"
    if replicas is None and deployment.replica_states.get("RUNNING", 0) > 0:
        return "ready"  # too busy to answer in time
    if deployment.status_trigger in _GAVE_UP:
        return "failed"
    rests = deployment.status == "HEALTHY" or last == "idle"
    return "idle" if rests and not any(deployment.replica_states.values()) else "starting"


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
