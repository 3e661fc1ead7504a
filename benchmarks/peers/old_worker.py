"""The worker loop that Imagen replaces: a queue and a process per model, one job at a time.

Configured like the original: attention slicing, no batching. In its favour, the queue is in memory
and the front answers with the picture, without a cloud queue, a bucket and polling.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import threading
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import typer
import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from benchmarks.peers.front import PREFIX, TASKS, media_type, read_upload

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.requests import Request

    from benchmarks.peers.work import Upload
    from deployments.tasks import Task

_START_S = 300


def work_forever(task: Task, jobs: Any, results: Any) -> None:
    """Run a worker process: take a job, finish it, take the next."""
    from benchmarks.peers.work import load

    work = load(task, sliced=True)
    results.put((None, b""))
    while (job := jobs.get()) is not None:
        number, upload = job
        try:
            item = work.decode(*upload)
            results.put((number, work.encode(item, work.call([item])[0])))
        except Exception as error:  # one job must not end the loop
            results.put((number, repr(error)))


class Worker:
    """The front's handle of one worker process."""

    def __init__(self, task: Task) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._jobs, self._results = spawn.Queue(), spawn.Queue()
        self._process = spawn.Process(
            target=work_forever, args=(task, self._jobs, self._results), daemon=True
        )
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._process.start()

    def wait_ready(self) -> None:
        self._results.get(timeout=_START_S)

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hand results to the waiting requests, on a thread of its own."""
        threading.Thread(target=self._collect, args=(loop,), daemon=True).start()

    def _collect(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            number, result = self._results.get()
            loop.call_soon_threadsafe(self._resolve, number, result)

    def _resolve(self, number: int, result: bytes | str) -> None:
        future = self._waiting.pop(number)
        if future.cancelled():
            return
        if isinstance(result, str):
            future.set_exception(RuntimeError(result))
        else:
            future.set_result(result)

    async def do(self, upload: Upload) -> bytes:
        number = next(self._numbers)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._jobs.put((number, upload))
        return await future

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()


async def _image(worker: Worker, request: Request) -> Response:
    upload = await read_upload(request)
    return Response(await worker.do(upload), media_type=media_type(upload))


async def _ready(_: Request) -> Response:
    return Response("ready")


def create_app(workers: dict[Task, Worker]) -> Starlette:
    """The HTTP front."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        for worker in workers.values():
            worker.listen(asyncio.get_running_loop())
        yield
        for worker in workers.values():
            worker.stop()

    routes = [
        Route(f"{PREFIX}/{path}", partial(_image, workers[task]), methods=["POST"])
        for path, task in TASKS.items()
    ]
    return Starlette(routes=[*routes, Route("/readyz", _ready)], lifespan=lifespan)


def main(port: int) -> None:
    """Serve until stopped."""
    workers = {task: Worker(task) for task in TASKS.values()}
    for worker in workers.values():
        worker.wait_ready()
    uvicorn.run(create_app(workers), host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    typer.run(main)
