"""An application that reads and checks each upload as Imagen does, and throws it away.

/upload is a bare FastAPI route. /whole is the same route behind Imagen's middleware, which limits
bodies and logs each request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from ray import serve

from benchmarks.jobs.clients import TASK
from deployments.catalogue import load_registry
from deployments.settings import AccessSettings, ClientSettings, Settings
from serve_app.api import create_app
from serve_app.intake import Call, Checked, Intake
from serve_app.jobs.options import split
from serve_app.protocols.multipart import read_form

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.types import Receive, Scope, Send


def open_intake() -> Intake:
    """The checks of an application whose settings are the default ones."""
    settings = Settings()
    nobody: Any = None  # no request goes on to a model
    return Intake(nobody, load_registry(*settings.models), ClientSettings())


async def read_call(request: Request, intake: Intake) -> tuple[Call, Checked]:
    """An upload, read and checked.

    Raises:
        RequestError: it is wrong.
    """
    form = await intake.read(read_form(request), intake.deadline_s())
    fields, _ = split(form.fields)
    call = Call(TASK, fields, form.image, ", ".join(request.headers.getlist("accept")))
    return call, await intake.check(call)


async def upload(request: Request) -> Response:
    """Read, check, forget."""
    await read_call(request, request.app.state.intake)
    return Response(status_code=204)


class _ReplicaApp:
    """The ASGI app of the replica in this process."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            return await send({"type": "lifespan.shutdown.complete"})
        here: Any = serve.get_replica_context().servable_object
        app = here.whole if scope["path"].endswith("/whole") else here.bare
        await app(scope, receive, send)


@serve.deployment(max_ongoing_requests=500, ray_actor_options={"num_cpus": 0.1})
@serve.ingress(_ReplicaApp())
class Baseline:
    """Answers 204."""

    def __init__(self) -> None:
        clients = ClientSettings(access=AccessSettings(auth="off"))
        nobody: Any = None
        self.bare = FastAPI()
        self.bare.state.intake = open_intake()
        self.bare.add_api_route("/upload", upload, methods=["POST"])
        self.whole = create_app(nobody, load_registry(*Settings().models), clients)
        self.whole.add_api_route("/whole", upload, methods=["POST"])


def build(args: dict[str, Any]) -> Application:
    """The application; it takes no args."""
    return Baseline.bind()
