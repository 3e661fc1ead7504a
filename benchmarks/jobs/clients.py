"""Closed loops of clients that upload a picture."""

from __future__ import annotations

import asyncio
import io
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Final, NamedTuple

import aiohttp
from PIL import Image, ImageOps

from deployments.settings import ROOT
from deployments.tasks import Task

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

TASK: Final = Task.BACKGROUND
"""The fastest model, so that jobs themselves weigh most."""
LARGE_PX: Final = 768
"""Width and height of a JPEG of about 100 KB."""
SMALL_PX: Final = 256
ASYNC: Final = {"Prefer": "respond-async"}
WAIT: Final = {"Prefer": "wait=30"}
_BOUNDARY: Final = "imagen-bench"
_TIMEOUT_S: Final = 60


class Way(NamedTuple):
    """One kind of request.

    Attributes:
        url: of the route.
        headers: beside the content type.
        status: of its good answer.
    """

    url: str
    headers: Mapping[str, str]
    status: int


@dataclass
class Block:
    """A closed loop of some clients.

    Attributes:
        seconds: of each request that got its good answer.
        wall_s: of all.
        others: other answers, by status.
    """

    seconds: list[float] = field(default_factory=list[float])
    wall_s: float = 0.0
    others: Counter[int] = field(default_factory=Counter[int])

    @property
    def per_s(self) -> float:
        """Good answers a second."""
        return len(self.seconds) / self.wall_s


@cache
def picture(side_px: int) -> bytes:
    """A square JPEG of docs/photo.jpg."""
    file = io.BytesIO()
    with Image.open(ROOT / "docs/photo.jpg") as photo:
        square = ImageOps.fit(photo.convert("RGB"), (side_px, side_px), Image.Resampling.LANCZOS)
    square.save(file, "JPEG", quality=90)
    return file.getvalue()


@cache
def form(side_px: int) -> bytes:
    """A multipart body with such a picture."""
    head = (
        f"--{_BOUNDARY}\r\n"
        'Content-Disposition: form-data; name="image"; filename="photo.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    )
    return head.encode() + picture(side_px) + f"\r\n--{_BOUNDARY}--\r\n".encode()


@asynccontextmanager
async def session() -> AsyncGenerator[aiohttp.ClientSession]:
    """A client with as many connections as needed, which it keeps."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
        headers={"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"},
    ) as opened:
        yield opened


async def upload(client: aiohttp.ClientSession, way: Way, side_px: int, block: Block) -> None:
    """Send one request, and note its answer in the block."""
    start_s = time.perf_counter()
    # aiohttp warns of large `bytes`, and sends a file without copying it.
    data = io.BytesIO(form(side_px))
    async with client.post(way.url, data=data, headers=way.headers) as response:
        await response.read()
    if response.status == way.status:
        block.seconds.append(time.perf_counter() - start_s)
    else:
        block.others[response.status] += 1


async def closed_loop(
    client: aiohttp.ClientSession, way: Way, side_px: int, *, clients: int, requests: int
) -> Block:
    """So many requests by so many clients, each of which waits for its answer."""
    block, left = Block(), iter(range(requests))

    async def one_client() -> None:
        for _ in left:
            await upload(client, way, side_px, block)

    start_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(one_client())
    block.wall_s = time.perf_counter() - start_s
    return block
