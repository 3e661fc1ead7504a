"""The model handles: Ray's errors to ours, and how the models are."""

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

from deployments.errors import Full, ImagenError, ModelFailed, NotReady
from deployments.store.node_init import pulling
from serve_app.intake import Details, not_ready

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from ray.serve.handle import DeploymentHandle

    from deployments.catalogue import Registry
    from deployments.contract import ImageJob, ImageResult, JobProgress
    from serve_app.intake import State

    Handle = DeploymentHandle[Any]

HEALTH_CHECK_PERIOD_S = 2
"""How often Serve checks that a replica lives. A lost one is replaced no sooner."""
_PROCESS_START_S = 3
"""A new process, before the model's own start in it."""
_MODEL_START_S = 20
"""The start of a model on two busy cores, until a replica has told how long its own start took."""
_VIEW_TTL_S = 1.0
_STATUS_TIMEOUT_S = 0.5
_GAVE_UP = {"REPLICA_STARTUP_FAILED", "DEPLOYMENT_ACTOR_FAILED", "INTERNAL_ERROR"}
logger = logging.getLogger("ray.serve.imagen.ingress")


class HandleBackend:
    """A model deployment behind its Serve handle.

    Attributes:
        retry_after_s: the shortest pause that a refused caller is told.
    """

    def __init__(self, name: str, handle: Handle, retry_after_s: float = 2) -> None:
        self._name = name
        self._handle = handle
        self.retry_after_s = retry_after_s
        self._start_s: float | None = None
        self._lost_s: float | None = None
        self._query: asyncio.Task[Any] | None = None

    @property
    def recovery_s(self) -> float:
        """Seconds until there is a replica again after the last one was lost.

        At least the pause that a refused client is told.
        """
        whole_s = HEALTH_CHECK_PERIOD_S + _PROCESS_START_S + (self._start_s or _MODEL_START_S)
        since_s = 0 if self._lost_s is None else time.monotonic() - self._lost_s
        return max(whole_s - since_s, self.retry_after_s)

    async def replicas(self) -> list[Any] | None:
        """The status of each running replica; None if that is unknown."""
        try:
            # A broadcast passes the queues, so that busy replicas answer too.
            answers = await self._handle.broadcast("status").results_async(
                timeout_s=_STATUS_TIMEOUT_S, return_exceptions=True
            )
        except DeploymentUnavailableError:
            answers = []
        except (RayServeException, RayError, TimeoutError):
            return None
        if not answers:
            # This process knows of no replica. It learns of a new one a moment after its start.
            return None if self._lost_s is None else []
        statuses = [answer for answer in answers if not isinstance(answer, Exception)]
        if statuses:
            self._start_s = max(status["start_s"] for status in statuses)
            self._lost_s = None
        elif all(isinstance(answer, ActorDiedError) for answer in answers):
            self.mark_lost()
        else:
            return None
        return statuses

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
        if self._start_s is None and self._query is None:
            # Learn how long a start takes while a replica can tell: the next one takes as long.
            self._query = asyncio.create_task(self.replicas())
        return result

    async def stream(self, job: ImageJob) -> AsyncGenerator[JobProgress | tuple[ImageResult, ...]]:
        """How far a request is, and then its results; see `ModelDeployment.stream`.

        Raises:
            ImagenError: as a call does.
        """
        answers: Any = self._handle.options(method_name="stream", stream=True).remote(job)
        try:
            async for answer in answers:
                self._lost_s = None
                yield answer
        except (RayServeException, RayError) as error:
            raise self._translate(error) from None
        finally:
            answers.cancel()  # does nothing to one that has ended

    def mark_lost(self) -> None:
        """The last replica was lost, and recovery begins now."""
        if self._lost_s is None:
            self._lost_s = time.monotonic()

    def _translate(self, error: Exception) -> ImagenError:
        if isinstance(error, BackPressureError):
            return Full(
                f"The queue of {self._name} is full.",
                value=self._name,
                remedy="Try again after Retry-After seconds.",
                retry_after_s=self.retry_after_s if self._lost_s is None else self.recovery_s,
            )
        if isinstance(error, DeploymentUnavailableError):
            return not_ready(self._name, "failed", self.recovery_s)
        if isinstance(error, RayTaskError):
            ours: Any = error.cause
            return ours if isinstance(ours, ImagenError) else _unexpected(self._name, error)
        self.mark_lost()
        return NotReady(
            f"The replica of {self._name} was lost.",
            value=self._name,
            remedy="Try again after Retry-After seconds; another one is being started.",
            retry_after_s=self.recovery_s,
        )


def _unexpected(name: str, error: RayTaskError) -> ModelFailed:
    logger.error("A replica raised an unexpected error", exc_info=error)
    return ModelFailed(
        f"The model {name} failed on this picture.",
        value=name,
        remedy="Try again; if it keeps failing, report the request id.",
    )


class ServeBackends:
    """The models of a Serve application by name, and how they are."""

    def __init__(self, handles: Mapping[str, Handle], registry: Registry) -> None:
        self._backends = {n: HandleBackend(n, h) for n, h in handles.items()}
        self._deployment = {spec.name: registry.deployment(spec) for spec in registry.models}
        self._application = serve.get_replica_context().app_name
        self._states: Mapping[str, State] = {}
        self._details = Details({}, {})
        self._stale_s = 0.0
        self._lock = asyncio.Lock()
        self._status: asyncio.Future[Any] | None = None

    def __getitem__(self, name: str) -> HandleBackend:
        return self._backends[name]

    def set_retry_after(self, seconds: float) -> None:
        """From now on refused callers are told to wait at least so long."""
        for backend in self._backends.values():
            backend.retry_after_s = seconds

    def recovery_s(self, name: str) -> float:
        return self._backends[name].recovery_s

    async def states(self) -> Mapping[str, State]:
        """From the replicas and the Serve controller, at most a second old."""
        await self._refresh()
        return self._states

    async def details(self) -> Details:
        """From the replicas and the nodes, at most a second old."""
        await self._refresh()
        return self._details

    async def _refresh(self) -> None:
        async with self._lock:
            if time.monotonic() < self._stale_s:
                return
            asked = asyncio.gather(*(one.replicas() for one in self._backends.values()))
            deployments, percent = await asyncio.gather(self._deployments(), pulling())
            replicas = dict(zip(self._backends, await asked, strict=True))
            last = self._states
            self._states = {
                name: _state(deployments.get(deployment), replicas[name], last.get(name))
                for name, deployment in self._deployment.items()
            }
            for name, backend in self._backends.items():
                if (last.get(name), self._states[name]) == ("ready", "starting"):
                    backend.mark_lost()
            running = {name: statuses for name, statuses in replicas.items() if statuses}
            self._details = Details(running, percent)
            self._stale_s = time.monotonic() + _VIEW_TTL_S

    async def _deployments(self) -> Mapping[str, Any]:
        """What the Serve controller says of each deployment; nothing while it is away.

        A call to a controller that restarts lasts until it is back, so that the next caller waits
        for the same call.
        """
        if self._status is None:
            self._status = asyncio.ensure_future(asyncio.to_thread(serve.status))
        if not (await asyncio.wait({self._status}, timeout=_STATUS_TIMEOUT_S))[0]:
            return {}
        status, self._status = self._status, None
        try:
            application = status.result().applications.get(self._application)
        except (RayServeException, RayError):
            return {}
        return application.deployments if application else {}


def _state(deployment: Any, replicas: list[Any] | None, last: State | None) -> State:
    """One model's state.

    Args:
        deployment: its Serve status; None while the controller is away.
        replicas: statuses of those that answered; None if that is unknown.
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
    at_rest = deployment.status == "HEALTHY" or last == "idle"
    return "idle" if at_rest and not any(deployment.replica_states.values()) else "starting"
