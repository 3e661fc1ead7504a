"""The Ingress deployment: the HTTP API as a Serve class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray import serve
from starlette.datastructures import Headers, MutableHeaders

from deployments.telemetry import HttpMetrics
from serve_app.api import create_app
from serve_app.backends import ServeBackends

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

    from deployments.registry import Registry
    from deployments.settings import Settings
    from deployments.tasks import Task
    from serve_app.backends import Handle


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
class Ingress:
    """Speaks HTTP for the models. Replicas share no state, so that any number behave as one.

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
        self.api = create_app(backends, registry, settings, self._count)
        self._routes = frozenset(self.api.openapi()["paths"])

    def _count(self, path: str, status: int, reason: str, seconds: float) -> None:
        route = path if path in self._routes else "other"  # unknown paths share one label
        self._metrics.answered(route, status, reason, seconds)
