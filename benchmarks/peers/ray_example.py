"""Ray Serve in the style of its Stable Diffusion example: a FastAPI ingress, a handle to each
model, and one stock call for each request.

Configured like the example, with one replica of each model, as in Imagen. In its favour, the
picture travels as a PNG rather than as a pickled image, and is encoded in the model's process.
"""

# No `from __future__ import annotations`: after Ray's pickling FastAPI needs objects.
from typing import Any

from fastapi import FastAPI, Request, Response
from ray import serve
from ray.serve import Application

from benchmarks.peers.front import PREFIX, TASKS, media_type, read_upload
from deployments.tasks import Task

# As in configs/local.yaml: the shares only count; all replicas fit two cores.
MODEL_OPTIONS = {"num_cpus": 0.2}
front = FastAPI()


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=1000)
@serve.ingress(front)
class Front:
    """HTTP, for the models behind the handles."""

    def __init__(self, models: dict[Task, Any]) -> None:
        self._models = models

    @front.post(PREFIX + "/{path:path}")
    async def image(self, path: str, request: Request) -> Response:
        upload = await read_upload(request)
        picture = await self._models[TASKS[path]].generate.remote(upload)
        return Response(picture, media_type=media_type(upload))

    @front.get("/readyz")
    async def ready(self) -> Response:
        for model in self._models.values():
            await model.ready.remote()
        return Response("ready")


@serve.deployment(ray_actor_options=MODEL_OPTIONS)
class Model:
    """One model; Serve calls a plain method for one request at a time."""

    def __init__(self, task: Task) -> None:
        from benchmarks.peers.work import load

        self._work = load(task)

    def ready(self) -> None:
        """Answers once the model is loaded."""

    def generate(self, upload: tuple[bytes, dict[str, str]]) -> bytes:
        return self._work.serve([upload])[0]


def bind(model: Any) -> Application:
    """The front with a deployment of `model` for each task."""
    models = {task: model.options(name=str(task)).bind(task) for task in TASKS.values()}
    return Front.bind(models)  # type: ignore[attr-defined]


app = bind(Model)
