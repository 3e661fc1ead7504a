"""Stand-ins for what lies around the HTTP API: models, pictures, and a client."""

from __future__ import annotations

import asyncio
import io
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from PIL import Image

from deployments.catalogue import Registry, load_registry
from deployments.contract import ImageJob, ImageResult, JobProgress
from deployments.settings import AccessSettings, ClientSettings, LimitSettings
from deployments.tasks import Task
from serve_app.api import create_app
from serve_app.intake import Details

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message

    from serve_app.intake import State
    from serve_app.middleware import OnAnswer

REGISTRY = load_registry(Path("configs/models/starter.yaml"))
NAMES = [spec.name for spec in REGISTRY.models]
COMIC_ALONE = Registry([REGISTRY[Task.COMIC]], {})
SERVED = tuple(task for task in REGISTRY if task.needs_picture)
"""The tasks that a starter model serves from a picture."""
OPEN_TO_ALL = AccessSettings(auth="off")


def picture_file(width: int = 24, height: int = 16, kind: str = "PNG", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.effect_noise((width, height), 60).convert(mode).save(file, kind)
    return file.getvalue()


@dataclass
class FakeBackends:
    """Models that do as they are told, and remember what they were asked.

    Attributes:
        error: raised instead of answering.
        refusal: raised by a stream before its first step.
        delay_s: how long each answer takes.
        result: what comes back; None: the job's own image, as the format it asks for.
        state: of every model, but for those in `other_states`, by name.
        jobs: what was received, in order.
    """

    error: Exception | None = None
    refusal: Exception | None = None
    delay_s: float = 0.0
    result: ImageResult | None = None
    state: State = "ready"
    other_states: dict[str, State] = field(default_factory=dict)
    states_error: Exception | None = None
    known_details: Details = field(default_factory=lambda: Details({}, {}))
    jobs: list[ImageJob] = field(default_factory=list)

    def __getitem__(self, name: str) -> FakeBackend:
        return FakeBackend(self, name)

    def recovery_s(self, name: str) -> float:
        return 12.3

    async def states(self) -> Mapping[str, State]:
        if self.states_error is not None:
            raise self.states_error
        return dict.fromkeys(NAMES, self.state) | self.other_states

    async def details(self) -> Details:
        return self.known_details


@dataclass
class FakeBackend:
    backends: FakeBackends
    name: str

    async def __call__(self, job: ImageJob) -> ImageResult:
        self.backends.jobs.append(job)
        await asyncio.sleep(self.backends.delay_s)
        if self.backends.error is not None:
            raise self.backends.error
        return self.backends.result or result_of(job, self.name)

    async def stream(self, job: ImageJob) -> AsyncIterator[JobProgress | tuple[ImageResult, ...]]:
        """Four steps, each with a preview, and then the results."""
        yield JobProgress(0, 0)
        if self.backends.refusal is not None:
            raise self.backends.refusal
        for done in range(1, 5):
            yield JobProgress(done, 4, preview=b"preview" if job.preview else None)
        first = await self(job)
        yield tuple(replace(first, seed=7 + k) for k in range(job.n))


def result_of(job: ImageJob, name: str, **changes: Any) -> ImageResult:
    values: dict[str, Any] = {
        "image": job.image,
        "media_type": f"image/{job.output_format}",
        "width_px": 24,
        "height_px": 16,
        "model": f"{name}@0123abcd",
        "seed": 7,
        "batch_size": 3,
        "gpu_seconds": 0.25,
        "timings_s": {"decode": 0.001, "denoise": 1.5},
    }
    return ImageResult(**values | changes)


def app_of(
    backends: FakeBackends | None = None,
    timeout_s: float = 60,
    on_answer: OnAnswer | None = None,
    **limits: int,
) -> FastAPI:
    clients = ClientSettings(
        request_timeout_s=timeout_s, limits=LimitSettings(**limits), access=OPEN_TO_ALL
    )
    return create_app(backends or FakeBackends(), REGISTRY, clients, on_answer)


async def send(app: ASGIApp, method: str, path: str, **options: Any) -> httpx.Response:
    """One request by way of a real HTTP client."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://imagen") as client:
        return await client.request(method, path, **options)


async def post(app: ASGIApp, path: str, image: bytes, **options: Any) -> httpx.Response:
    """One upload, as curl -F image=@photo.png does it; `data` holds the other fields."""
    return await send(app, "POST", path, files={"image": ("photo.png", image)}, **options)


Headers = dict[str, str] | list[tuple[str, str]]


async def raw(
    app: ASGIApp,
    path: str,
    body: AsyncIterator[Message],
    headers: Headers | None = None,
    on_sent: Callable[[Message], None] = lambda message: None,
    **scope: Any,
) -> list[Message]:
    """One request as a server hands it over: header lines and messages just as given.

    `on_sent` sees each message of the answer at the moment it is sent.
    """
    lines = headers.items() if isinstance(headers, dict) else headers or ()
    basis = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "server": ("imagen", 80),
        "path": path,
        "query_string": b"",
        "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in lines],
    }
    sent: list[Message] = []

    async def receive() -> Message:
        return await anext(body)

    async def keep(message: Message) -> None:
        sent.append(message)
        on_sent(message)

    await app(basis | scope, receive, keep)
    return sent


async def chunks(parts: Sequence[bytes]) -> AsyncIterator[Message]:
    """A body in these parts; whoever reads on learns that the client has gone."""
    for position, part in enumerate(parts):
        await asyncio.sleep(0)
        more = position + 1 < len(parts)
        yield {"type": "http.request", "body": part, "more_body": more}
    while True:
        await asyncio.sleep(0)
        yield {"type": "http.disconnect"}
