"""The same jobs by Celery, as Ray's documentation of asynchronous inference has it.

`@task_consumer` with Ray's CeleryTaskProcessorAdapter, and Redis as broker and result store. The
picture travels in the message, as base64 in JSON, and so does the result. The task calls the same
model replica as Imagen does.
"""

from __future__ import annotations

import asyncio
import base64
import os
import time
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.schema import CeleryAdapterConfig, TaskProcessorConfig
from ray.serve.task_consumer import instantiate_adapter_from_config, task_consumer, task_handler

from benchmarks.jobs.baseline_app import open_intake, read_call
from benchmarks.jobs.clients import TASK
from deployments.contract import ImageJob, parse
from serve_app.protocols.jobs import preference_of

if TYPE_CHECKING:
    from ray.serve import Application

api = FastAPI()
_TASK_NAME = "process"
_URL = os.environ["REDIS_URL"]
_TIMEOUT_S = 60


def config(queue: str) -> TaskProcessorConfig:
    """Celery with a queue in this Redis; every other value is Ray's default."""
    return TaskProcessorConfig(
        queue_name=queue, adapter_config=CeleryAdapterConfig(broker_url=_URL, backend_url=_URL)
    )


@serve.deployment(max_ongoing_requests=8, ray_actor_options={"num_cpus": 0})
@task_consumer(task_processor_config=config("worked"))
class Consumer:
    """Carries eight tasks at a time, on threads, because Celery's tasks cannot be coroutines."""

    def __init__(self) -> None:
        self._model: Any = serve.get_deployment_handle(TASK.deployment, "imagen")

    @task_handler(name=_TASK_NAME)
    def process(self, image: str, fields: dict[str, str], width_px: int, height_px: int) -> str:
        """The result's picture, base64."""
        job = ImageJob(
            request=parse(TASK.request, fields),
            image=base64.b64decode(image),
            output_format="png",
            timeout_s=_TIMEOUT_S,
            request_id="celery",
            width_px=width_px,
            height_px=height_px,
            sent_unix_s=time.time(),
        )
        return base64.b64encode(self._model.remote(job).result().image).decode()


@api.post("/{queue}")
async def submit(request: Request, queue: str) -> Response:
    """202; or with `Prefer: wait`, the picture.

    Args:
        request: the upload.
        queue: worked, or kept, which nobody consumes.
    """
    here: Any = serve.get_replica_context().servable_object
    call, checked = await read_call(request, here.intake)
    image = base64.b64encode(call.image or b"").decode()
    args = [image, dict(call.fields), checked.width_px, checked.height_px]
    adapter = here.adapters[queue]
    # On a thread: Celery's calls block.
    task = await asyncio.to_thread(adapter.enqueue_task_sync, _TASK_NAME, args=args)
    preference = preference_of(request, None)
    if preference is None or not preference.wait_s:
        return JSONResponse({"job_id": task.id, "status": "queued"}, 202)
    # Ray's adapter can only ask for the status again and again; Celery's own call is told.
    result = adapter._app.AsyncResult(task.id)
    picture = await asyncio.to_thread(result.get, timeout=preference.wait_s)
    return Response(base64.b64decode(picture), media_type="image/png")


@serve.deployment(max_ongoing_requests=500, ray_actor_options={"num_cpus": 0.1})
@serve.ingress(api)
class Front:
    """Reads and checks uploads as Imagen does, and sends a task for each."""

    def __init__(self, _: Any) -> None:
        self.intake = open_intake()
        self.adapters: dict[str, Any] = {
            queue: instantiate_adapter_from_config(config(queue)) for queue in ("worked", "kept")
        }


def build(args: dict[str, Any]) -> Application:
    """The application; it takes no args."""
    return Front.bind(Consumer.bind())
