"""The Ingress deployment: the HTTP API as a Serve class."""

from __future__ import annotations

import asyncio
import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from ray import serve
from starlette.datastructures import Headers, MutableHeaders

from deployments.errors import ConfigError
from deployments.settings import ClientJobSettings, ClientSettings, parse_settings
from deployments.telemetry import HttpMetrics, JobMetrics
from serve_app.access.limits import Limits
from serve_app.api import create_app
from serve_app.backends import ServeBackends
from serve_app.jobs.connection import open_link
from serve_app.jobs.service import open_jobs
from serve_app.jobs.signals import Signals
from serve_app.jobs.sweeping import keep_sweeping
from serve_app.jobs.watching import watch
from serve_app.v2.calls import Calls
from serve_app.v2.door import GrpcDoor, check_message_size
from serve_app.worker import own_url

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from fastapi import FastAPI
    from starlette.types import Message, Receive, Scope, Send

    from deployments.catalogue import Registry
    from deployments.settings import Settings
    from serve_app.backends import Handle
    from serve_app.doors import Door
    from serve_app.jobs.service import Jobs

logger = logging.getLogger("ray.serve.imagen.ingress")


class _ReplicaApp:
    """The ASGI app of the Ingress replica in this process, which is built once it has handles."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await _lifespan(receive, send)
        ingress: Any = serve.get_replica_context().servable_object
        await ingress.api(scope, receive, _without_repeated_id(scope, send))


def _without_repeated_id(scope: Scope, send: Send) -> Send:
    """Leave out our request id if Serve's proxy adds the same one to the response."""
    proxy_id = Headers(scope=scope).get("x-request-id")

    async def send_once(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if headers.get("x-request-id") == proxy_id:
                del headers["x-request-id"]
        await send(message)

    return send_once


async def _lifespan(receive: Receive, send: Send) -> None:
    while (await receive())["type"] == "lifespan.startup":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})


@serve.ingress(_ReplicaApp())  # pyright: ignore[reportUntypedClassDecorator]
class Ingress(Calls):
    """Speaks HTTP for the models. Replicas share no state, so that any number behave as one.

    Args:
        handles: by model.
        registry: what each model is.
        settings: of the application; what clients may do is in the `user_config`.
        beside: the deployments of jobs, by name: `worker`, and `redis` unless REDIS_URL names one.
            Empty without jobs.
    """

    def __init__(
        self,
        handles: dict[str, Handle],
        registry: Registry,
        settings: Settings,
        beside: dict[str, Handle],
    ) -> None:
        self._metrics = HttpMetrics()
        self._backends, self._registry = ServeBackends(handles, registry), registry
        link = open_link(own_url(beside.get("redis")))
        signals = Signals(link, settings.jobs.namespace)
        self._limits = Limits(lambda: link.current, settings.jobs.namespace)
        self._jobs: Jobs | None = None
        self._loops: list[Callable[[], Coroutine[Any, Any, None]]] = [signals.listen]
        self._running: list[asyncio.Task[None]] = []
        if beside:
            metrics, keep_s = JobMetrics(), settings.jobs.keep_s
            jobs = open_jobs(link, signals, settings.jobs, ClientJobSettings(), metrics.count_end)
            self._loops.append(partial(watch, jobs.queue, metrics))
            self._loops.append(partial(keep_sweeping, jobs.queue, jobs.files, keep_s))
            self._jobs = jobs
        self.api: FastAPI | None = None
        self._routes: frozenset[str] = frozenset()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve on the event loop, after `__init__` and whenever it changes.

        Each call makes the API anew, so that requests at hand end by the settings that they began
        with. The first may raise, which stops the start of the replica. A later one never raises,
        because Serve would replace a working replica by a failed one: the former settings stay.
        """
        try:
            clients = parse_settings(ClientSettings, user_config, "user_config of Ingress")
            check_message_size(clients, os.environ)
        except ConfigError as error:
            if self.api is None:
                raise
            logger.error("user_config refused, the former one stays in force: %s", error)
            return
        self.api = await asyncio.to_thread(self._api, clients)
        self.grpc_door = GrpcDoor(self.api, enabled=clients.grpc.enabled)
        self._backends.set_retry_after(clients.retry_after_s)
        self._limits.retry_after_s = clients.retry_after_s
        if not self._running:
            self._running = [asyncio.create_task(loop()) for loop in self._loops]

    def _api(self, clients: ClientSettings) -> FastAPI:
        jobs = self._jobs and self._jobs.under(clients.jobs)
        api = create_app(self._backends, self._registry, clients, self._count, jobs, self._limits)
        self._routes = frozenset(api.openapi()["paths"])
        return api

    def _count(self, path: str, status: int, reason: str, seconds: float, door: Door) -> None:
        route = path if path in self._routes else "other"  # unknown paths share one label
        self._metrics.answered(route, status, reason, seconds, door)
