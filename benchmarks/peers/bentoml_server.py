"""BentoML: a service per model with a batchable API, and a front that depends on the five.

Configured with Imagen's batch limits and timeout, and one worker a service. Its adaptive batching
learns the window from 11 requests of each model, which the warm-up sends. In its favour, a batch is
decoded and encoded on two threads, as in Imagen.
"""

# No `from __future__ import annotations`: BentoML reads the annotations as objects.
from typing import Any

import bentoml
from fastapi import FastAPI, Request, Response

from benchmarks.peers.front import PREFIX, TASKS, media_type, read_upload
from benchmarks.peers.work import MAX_BATCH, TIMEOUT_S, load
from deployments.tasks import Task

_OPTIONS: dict[str, Any] = {"workers": 1, "traffic": {"timeout": TIMEOUT_S}}
front = FastAPI()


@front.post(PREFIX + "/{path:path}")
async def image(path: str, request: Request) -> Response:
    upload = await read_upload(request)
    model = getattr(bentoml.get_current_service(), TASKS[path])
    pictures = await model.to_async.generate([upload])
    return Response(pictures[0], media_type=media_type(upload))


def _service(task: Task) -> Any:
    class Model:
        """One model."""

        def __init__(self) -> None:
            self._work = load(task)

        @bentoml.api(
            batchable=True, max_batch_size=MAX_BATCH[task], max_latency_ms=TIMEOUT_S * 1000
        )
        def generate(self, uploads: list[Any]) -> list[Any]:
            return self._work.serve(uploads)

    return bentoml.service(Model, name=str(task), **_OPTIONS)


@bentoml.service(name="gateway", **_OPTIONS)
@bentoml.asgi_app(front)
class Gateway:
    """HTTP, for the models it depends on."""

    upscale = bentoml.depends(_service(Task.UPSCALE))
    enhance = bentoml.depends(_service(Task.ENHANCE))
    comic = bentoml.depends(_service(Task.COMIC))
    aged = bentoml.depends(_service(Task.AGED))
    background = bentoml.depends(_service(Task.BACKGROUND))
