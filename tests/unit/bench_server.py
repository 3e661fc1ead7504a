"""A real HTTP server on loopback that answers as a test defines, and records what it got."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiohttp import web

from tests.unit.fakes import picture_file

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    Answer = Callable[["Got"], Awaitable[web.Response]]

JSON_LENGTH = "Inference-Header-Content-Length"
PICTURE = picture_file()
HEADERS = {
    "X-Imagen-Batch-Size": "2",
    "X-Imagen-Gpu-Seconds": "0.5000",
    "Server-Timing": "decode;dur=10.0, denoise;dur=1500.0",
}


@dataclass(frozen=True)
class Got:
    """A request as it arrived, and how many had arrived before it."""

    number: int
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass
class Server:
    """Attributes:
    answer: makes the answer of each request.
    begun, got: requests that began; those that arrived whole, in order.
    most: requests in hand at a time.
    left: requests whose client went away.
    """

    answer: Answer
    url: str = ""
    begun: int = 0
    got: list[Got] = field(default_factory=list)
    left: int = 0
    most: int = 0
    _in_hand: int = 0

    async def handle(self, request: web.Request) -> web.Response:
        self.begun += 1
        self._in_hand += 1
        self.most = max(self.most, self._in_hand)
        try:
            body = await request.read()
            got = Got(len(self.got), request.path, dict(request.query), dict(request.headers), body)
            self.got.append(got)
            return await self.answer(got)
        except asyncio.CancelledError:
            self.left += 1
            raise
        finally:
            self._in_hand -= 1


def elements(data: bytes) -> list[bytes]:
    found: list[bytes] = []
    while data:
        (length,) = struct.unpack_from("<I", data)
        found.append(data[4 : 4 + length])
        data = data[4 + length :]
    return found


def kserve_answer(picture: bytes, before: bytes | None = None) -> tuple[dict[str, str], bytes]:
    """As Triton answers; `before` is another output ahead of the picture."""
    tensors = {"SEED": before} if before is not None else {}
    tensors = {n: struct.pack("<I", len(d)) + d for n, d in (tensors | {"IMAGE": picture}).items()}
    outputs = [
        {"name": n, "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(d)}}
        for n, d in tensors.items()
    ]
    head = json.dumps({"model_name": "comic", "outputs": outputs}).encode()
    return {JSON_LENGTH: str(len(head))}, head + b"".join(tensors.values())


async def picture(_: Got) -> web.Response:
    return web.Response(body=PICTURE, content_type="image/png", headers=HEADERS)


async def hang(_: Got) -> web.Response:
    await asyncio.Event().wait()
    raise AssertionError


def one_at_a_time(seconds: float) -> Answer:
    """Serves in turn, each for so long."""
    turn = asyncio.Lock()

    async def answer(got: Got) -> web.Response:
        async with turn:
            await asyncio.sleep(seconds)
        return await picture(got)

    return answer


@contextmanager
def serving(answer: Answer = picture) -> Iterator[Server]:
    """The server in a thread of its own, as far from the load's event loop as another process."""
    server, ready, loop = Server(answer), threading.Event(), asyncio.new_event_loop()
    end = asyncio.Event()

    async def main() -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/{path:.*}", server.handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await end.wait()
        # Clients have gone by now; what they left behind is accepted, noticed and closed first.
        deadline_s = loop.time() + 10
        await asyncio.sleep(0.05)
        while len(asyncio.all_tasks()) > 1 and loop.time() < deadline_s:
            await asyncio.sleep(0.01)
        await runner.cleanup()
        await asyncio.sleep(0.01)

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    assert ready.wait(30)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(30)
        loop.close()
