"""A stand-in for the service, after docs/jobs.md: jobs are in memory, pauses are the model.

It serves tests of clients, which can make it refuse, break off and keep jobs waiting.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import socket
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import Headers, UploadFile
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from deployments.errors import (
    Full,
    IdempotencyConflict,
    ImagenError,
    InvalidParameter,
    JobConflict,
    JobsUnavailable,
    LinkRefused,
    ModelFailed,
    NoSuchJob,
    NotFound,
    RateLimited,
    RequestError,
    Unauthorized,
)
from serve_app.problem import error_response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from starlette.requests import Request
    from starlette.types import Message, Receive, Scope, Send

ENDED = ("completed", "failed", "canceled")
OF_JOBS = {"n", "priority", "deadline_s", "webhook", "webhook_events", "preview"}
OF_TASKS = {"steps", "seed", "strength", "prompt"}
FAILING = "fail"
"""The prompt of a job that fails."""
SIZE_PX = 8
MODEL = "comic@0123456789abcdef"
NOTE = {"code": "seed_drawn", "text": "A note."}
SIGNATURE = "signed"


def picture_of(seed: int) -> bytes:
    """The picture that a seed gives."""
    file = io.BytesIO()
    Image.new("RGB", (SIZE_PX, SIZE_PX), (seed % 256, 0, 0)).save(file, "PNG")
    return file.getvalue()


@dataclass
class StandInJob:
    """A job, and the events of it so far: name, data."""

    task: str
    fields: dict[str, str]
    image: bytes
    owner: str
    files: dict[str, bytes] = field(default_factory=dict)
    retry_of: str | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: float = field(default_factory=time.time)
    status: str = ""
    steps_done: int = 0
    error: dict[str, Any] | None = None
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def seeds(self) -> list[int]:
        first = int(self.fields.get("seed", 5))
        return [first + k for k in range(int(self.fields.get("n", 1)))]

    @property
    def steps(self) -> int:
        return int(self.fields.get("steps", 4))

    def become(self, status: str) -> None:
        self.status = status
        self.events.append((status, self.document()))

    def document(self) -> dict[str, Any]:
        here = f"/api/v1/jobs/{self.id}"
        webhook = self.fields.get("webhook")
        return {
            "job_id": self.id,
            "status": self.status,
            "task": self.task.rpartition("/")[2],
            "priority": self.fields.get("priority", "interactive"),
            "created_at": stamp(self.created),
            "started_at": None if self.status == "queued" else stamp(self.created),
            "ended_at": stamp(self.created) if self.status in ENDED else None,
            "expires_at": stamp(self.created + 7 * 86_400),
            "deadline_at": stamp(self.created + float(self.fields.get("deadline_s", 86_400))),
            "position": 1 if self.status == "queued" else None,
            "steps_done": self.steps_done,
            "steps": self.steps,
            "eta_s": None if self.status in ENDED else 0.5,
            "attempts": 1,
            "timings_s": {"queue": 0.1, "total": 0.5},
            "gpu_seconds": 0.0,
            "cost": None,
            "error": self.error,
            "webhook": webhook and {"url": webhook, "events": ["completed"], "pending": 0},
            "retry_of": self.retry_of,
            "request": {name: v for name, v in self.fields.items() if name in OF_TASKS},
            "results": self._results(here) if self.status == "completed" else [],
            "links": {"self": here, "events": f"{here}/events", "result": f"{here}/result"},
        }

    def _results(self, here: str) -> list[dict[str, Any]]:
        return [
            {
                "url": f"{here}/results/{k}",
                "seed": seed,
                "media_type": "image/png",
                "width_px": SIZE_PX,
                "height_px": SIZE_PX,
                "bytes": len(picture_of(seed)),
                "metadata": {
                    "model": MODEL,
                    "batch_size": 2,
                    "notes": [NOTE],
                },
            }
            for k, seed in enumerate(self.seeds)
        ]


def stamp(seconds: float) -> str:
    text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


@dataclass
class Got:
    """A request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class StandIn:
    """What a test may set, and what came.

    Attributes:
        key: the only API key; None wants none.
        faults: what happens to the next requests, in order: an error is answered, `drop` handles
            the request and breaks the answer off, `bare 404` and `bare 429` are what Serve's proxy
            answers while no application is deployed or the Ingress is full, `page` and `redirect`
            are answers of something else, and `pass` lets it through.
        holding: jobs stay queued.
        step_s: pause of each step.
        stream_events: after how many events a stream ends, as it is planned; 0 for never.
        breaking_streams: so many streams break off after their first event.
        quiet_s: the pause that streams ask for before the client comes back.
        async_by_default: the setting `respond_async_by_default`.
        got: the requests so far.
        jobs: in order of submission.
    """

    url: str = ""
    key: str | None = None
    faults: list[ImagenError | str] = field(default_factory=list)
    holding: bool = False
    step_s: float = 0.005
    stream_events: int = 0
    breaking_streams: int = 0
    quiet_s: float = 0.01
    async_by_default: bool = False
    got: list[Got] = field(default_factory=list)
    jobs: dict[str, StandInJob] = field(default_factory=dict)
    _first: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    _running: set[asyncio.Task[None]] = field(default_factory=set)

    def app(self) -> Starlette:
        one = "/api/v1/jobs/{id}"
        return Starlette(
            routes=[
                Route("/api/v1/images/{task:path}", self.process, methods=["POST"]),
                Route("/api/v1/jobs", self.list, methods=["GET"]),
                Route(one, self.read, methods=["GET"]),
                Route(one, self.cancel, methods=["DELETE"]),
                Route(f"{one}/retry", self.retry, methods=["POST"]),
                Route(f"{one}/events", self.stream, methods=["GET"]),
                Route(f"{one}/result", self.result, methods=["GET"]),
                Route(f"{one}/results/{{k:int}}", self.result, methods=["GET"]),
                Route("/files/{seed:int}", self.file, methods=["GET"]),
            ],
            exception_handlers={ImagenError: refuse, 404: no_route},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application with the faults in front."""
        headers = dict(Headers(scope=scope))
        self.got.append(Got(scope["method"], scope["path"], headers))
        scope["state"] = {"request_id": uuid.uuid4().hex}
        fault = self.faults.pop(0) if self.faults else "pass"
        if isinstance(fault, ImagenError):
            await error_response(fault, scope)(scope, receive, send)
        elif fault in ELSE:
            await ELSE[fault](scope, receive, send)
        elif fault == "drop":
            await self._app(scope, receive, nowhere)
            await send({"type": "http.response.start", "status": 200, "headers": [LONGER]})
            await send({"type": "http.response.body", "body": b"{"})
        else:
            await self._app(scope, receive, send)

    def __post_init__(self) -> None:
        self._app = self.app()

    # --- Submitting

    async def process(self, request: Request) -> Response:
        owner = self._owner(request)
        async with request.form() as form:
            uploads = {n: await v.read() for n, v in form.items() if isinstance(v, UploadFile)}
            image = uploads.pop("image", b"")
            fields = {name: v for name, v in form.items() if isinstance(v, str)}
        if unknown := fields.keys() - OF_JOBS - OF_TASKS:
            raise InvalidParameter(
                f"There is no parameter {min(unknown)}.", value=min(unknown), remedy="Leave it out."
            )
        prefer = request.headers.get("prefer", "")
        wait_s = int(prefer.removeprefix("wait=")) if prefer.startswith("wait=") else None
        if prefer != "respond-async" and wait_s is None and not self.async_by_default:
            return self._at_once(request, fields)
        task = request.path_params["task"]
        job = self._job_of(request, StandInJob(task, fields, image, owner, uploads))
        until = time.monotonic() + (wait_s or 0)
        while wait_s is not None and job.status not in ENDED and time.monotonic() < until:
            await asyncio.sleep(0.005)
        if wait_s is not None and job.status == "completed" and len(job.seeds) == 1:
            return picture_response(job.seeds[0])
        return accepted(job, prefer)

    def _at_once(self, request: Request, fields: dict[str, str]) -> Response:
        wrong = sorted(OF_JOBS & fields.keys())
        if wrong or "idempotency-key" in request.headers:
            raise InvalidParameter(
                "A request without Prefer makes no job.",
                value=", ".join(wrong) or "Idempotency-Key",
                remedy="Send Prefer: respond-async.",
            )
        return picture_response(int(fields.get("seed", 5)))

    def _job_of(self, request: Request, job: StandInJob) -> StandInJob:
        """The job, or the one that came before with the same idempotency key."""
        name = request.headers.get("idempotency-key")
        body = hashlib.sha256(repr((job.task, job.fields, job.image)).encode()).hexdigest()
        if name and (before := self._first.get((job.owner, name))):
            if before[0] != body:
                raise IdempotencyConflict(
                    "This Idempotency-Key came before with another body.",
                    value=name,
                    remedy="Use a key of its own for each request.",
                )
            return self.jobs[before[1]]
        if name:
            self._first[job.owner, name] = (body, job.id)
        self._begin(job)
        return job

    def _begin(self, job: StandInJob) -> None:
        self.jobs[job.id] = job
        job.become("queued")
        task = asyncio.get_running_loop().create_task(self._work(job))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _work(self, job: StandInJob) -> None:
        while self.holding and job.status == "queued":
            await asyncio.sleep(0.005)
        if job.status == "queued":
            job.become("processing")
        while job.status == "processing":
            await asyncio.sleep(self.step_s)
            if job.status != "processing":
                return
            job.steps_done += 1
            steps = {"steps_done": job.steps_done, "steps": job.steps, "eta_s": 0.5}
            job.events.append(("progress", {"job_id": job.id, "status": job.status} | steps))
            if job.fields.get("preview") == "true":
                small = base64.b64encode(picture_of(job.steps_done)).decode()
                job.events.append(("preview", {"image": f"data:image/jpeg;base64,{small}"}))
            if job.steps_done == job.steps:
                self._end(job)

    def _end(self, job: StandInJob) -> None:
        if job.fields.get("prompt") != FAILING:
            return job.become("completed")
        failed = ModelFailed("The model gave no picture.", value="black", remedy="Try another.")
        job.error = failed.details(uuid.uuid4().hex)
        job.become("failed")

    # --- Reading

    async def list(self, request: Request) -> Response:
        owner, query = self._owner(request), request.query_params
        limit = int(query.get("limit", 20))
        if not 1 <= limit <= 100:
            raise InvalidParameter("limit is out of range.", value=limit, remedy="1 to 100.")
        found = [
            job
            for job in reversed(self.jobs.values())
            if job.owner == owner and query.get("status") in (None, job.status)
        ]
        start = [job.id for job in found].index(query["cursor"]) + 1 if "cursor" in query else 0
        page = found[start : start + limit]
        more = start + limit < len(found)
        return JSONResponse(
            {
                "jobs": [job.document() for job in page],
                "next_cursor": page[-1].id if more else None,
            }
        )

    async def read(self, request: Request) -> Response:
        return JSONResponse(self._found(request).document())

    async def cancel(self, request: Request) -> Response:
        job = self._found(request)
        if job.status in ("completed", "failed"):
            raise conflict(job, "The job has ended.")
        if job.status != "canceled":
            job.become("canceled")
        return JSONResponse(job.document())

    async def retry(self, request: Request) -> Response:
        old = self._found(request)
        if old.status not in ("failed", "canceled"):
            raise conflict(old, "The job neither failed nor was it canceled.")
        job = StandInJob(old.task, old.fields, old.image, old.owner, retry_of=old.id)
        self._begin(job)
        return accepted(job)

    async def result(self, request: Request) -> Response:
        job, k = self._found(request), request.path_params.get("k", 0)
        if job.status != "completed":
            raise conflict(job, "The job is not completed.")
        if k >= len(job.seeds):
            raise NoSuchJob("The job has no such result.", value=k, remedy="Count from 0.")
        # Another origin than the service's, as a bucket is.
        there = self.url.replace("127.0.0.1", "localhost")
        link = f"{there}/files/{job.seeds[k]}?signature={SIGNATURE}"
        return Response(status_code=307, headers={"Location": link})

    async def file(self, request: Request) -> Response:
        if "authorization" in request.headers:
            raise RequestError("Two credentials.", value="Authorization", remedy="Send the link.")
        if request.query_params.get("signature") != SIGNATURE:
            raise LinkRefused("The link was altered.", value="signature", remedy="Ask for another.")
        return Response(picture_of(request.path_params["seed"]), media_type="image/png")

    async def stream(self, request: Request) -> Response:
        job = self._found(request)
        last = request.headers.get("last-event-id", "")
        begin = int(last.partition("-")[2]) + 1 if last else 0
        if job.status in ENDED and begin == len(job.events):
            return Response(status_code=204)
        return StreamingResponse(self._events(job, begin), media_type="text/event-stream")

    async def _events(self, job: StandInJob, begin: int) -> AsyncIterator[str]:
        retry = f"retry: {int(self.quiet_s * 1000)}\n\n"
        for number in range(begin, 10_000):
            while number == len(job.events):
                await asyncio.sleep(0.005)
            name, data = job.events[number]
            yield f"id: 1732633445123-{number}\nevent: {name}\ndata: {json.dumps(data)}\n\n"
            if name in ENDED:
                return
            if self.breaking_streams:
                self.breaking_streams -= 1
                raise ConnectionAbortedError
            if self.stream_events and number - begin + 1 == self.stream_events:
                yield retry
                return

    def _owner(self, request: Request) -> str:
        given = request.headers.get("authorization", "")
        if self.key is not None and given != f"Bearer {self.key}":
            raise Unauthorized(
                "The request has no valid API key.",
                value="unknown key" if given else "no key",
                remedy="Send Authorization: Bearer with a key.",
            )
        return given

    def _found(self, request: Request) -> StandInJob:
        owner = self._owner(request)
        job = self.jobs.get(request.path_params["id"])
        if job is None or job.owner != owner:
            raise NoSuchJob(
                "There is no such job.",
                value=request.path_params["id"],
                remedy="Jobs expire; list them at /api/v1/jobs.",
            )
        return job


ELSE: dict[str, Response] = {
    "bare 404": PlainTextResponse("Path '/' not found.", 404),
    "bare 429": PlainTextResponse("Request dropped due to backpressure.", 429),
    "page": HTMLResponse("<h1>Welcome</h1>"),
    "redirect": Response(status_code=308, headers={"Location": "https://example.com/"}),
}
LONGER = (b"content-length", b"1000")
"""Announces more than comes."""


async def nowhere(_: Message) -> None:
    """Drops an answer."""


async def no_route(request: Request, _: Exception) -> Response:
    missing = NotFound("No such route.", value=request.url.path, remedy="Look at /docs.")
    return error_response(missing, request.scope)


async def refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ImagenError)
    return error_response(error, request.scope)


def conflict(job: StandInJob, fact: str) -> JobConflict:
    return JobConflict(fact, value=job.status, remedy="Look at its status.")


def accepted(job: StandInJob, prefer: str = "respond-async") -> Response:
    return JSONResponse(
        {"job_id": job.id, "status": job.status},
        202,
        {"Location": f"/api/v1/jobs/{job.id}", "Preference-Applied": prefer},
    )


def picture_response(seed: int) -> Response:
    headers = {
        "X-Imagen-Model": MODEL,
        "X-Imagen-Batch-Size": "2",
        "X-Imagen-Size": f"{SIZE_PX}x{SIZE_PX}",
        "X-Imagen-Seed": str(seed),
        "X-Imagen-Note": "frames_dropped: The first of 12 frames was used., "
        "seed_drawn: None was sent, and so one was drawn: see the result.",
        "X-Request-Id": "request-1",
        "Server-Timing": "decode;dur=10.0, denoise;dur=1500.5",
    }
    return Response(picture_of(seed), media_type="image/png", headers=headers)


def busy(retry_after_s: float = 0) -> Full:
    return Full("The queue is full.", value="64", remedy="Wait.", retry_after_s=retry_after_s)


def limited(retry_after_s: float = 0) -> RateLimited:
    return RateLimited(
        "The key made too many requests.", value="5/s", remedy="Wait.", retry_after_s=retry_after_s
    )


def away() -> JobsUnavailable:
    return JobsUnavailable("Redis is away.", value="away", remedy="Wait.", retry_after_s=0)


@contextmanager
def serving() -> Iterator[StandIn]:
    """The stand-in on a free port of loopback, in a thread of its own."""
    stand_in = StandIn()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stand_in.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(
            uvicorn.Config(
                stand_in,
                log_level="critical",
                ws="none",
                lifespan="off",
                timeout_graceful_shutdown=1,
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield stand_in
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
