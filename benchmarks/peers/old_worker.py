"""The worker loop that Imagen replaces: a queue and a process per model, one job at a time.

Configured like the original: attention slicing, no batching. In its favour, the queue is in memory
and the front answers with the picture, without a cloud queue, a bucket and polling.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import typer
import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from benchmarks.peers.front import PREFIX, TASKS, media_type, read_upload

if TYPE_CHECKING:
    from starlette.requests import Request

    from benchmarks.peers.work import Upload, Work
    from deployments.tasks import Task

_models: list[Work] = []
"""Of a worker process: its only model."""


def load(task: Task) -> None:
    """Prepare a worker process."""
    from benchmarks.peers import work

    _models.append(work.load(task, sliced=True))


def do_job(upload: Upload) -> bytes:
    """Finish one job in a worker process."""
    return _models[0].serve([upload])[0]


def is_ready() -> bool:
    """Answers once the worker process has loaded its model."""
    return bool(_models)


def start_worker(task: Task) -> ProcessPoolExecutor:
    """A process with one model, and its queue."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, spawn, initializer=load, initargs=(task,))


async def _image(worker: ProcessPoolExecutor, request: Request) -> Response:
    upload = await read_upload(request)
    picture = await asyncio.get_running_loop().run_in_executor(worker, do_job, upload)
    return Response(picture, media_type=media_type(upload))


async def _ready(_: Request) -> Response:
    return Response("ready")


def main(port: int) -> None:
    """Serve until stopped."""
    workers = {path: start_worker(task) for path, task in TASKS.items()}
    for starting in [worker.submit(is_ready) for worker in workers.values()]:
        starting.result()
    routes = [
        Route(f"{PREFIX}/{path}", partial(_image, worker), methods=["POST"])
        for path, worker in workers.items()
    ]
    app = Starlette(routes=[*routes, Route("/readyz", _ready)])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
    for worker in workers.values():
        worker.shutdown(cancel_futures=True)


if __name__ == "__main__":
    typer.run(main)
