"""A real HTTP receiver on loopback, which keeps what it gets and answers as a test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import ssl
    from types import TracebackType

WAIT_S = 30.0


@dataclass(frozen=True)
class Received:
    """One request."""

    path: str
    headers: dict[str, str]
    body: str

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


Answer = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]


def status(code: int, *headers: str) -> Answer:
    """Answers with a status, without a body."""

    async def answer(received: Received, writer: asyncio.StreamWriter) -> None:
        lines = (f"HTTP/1.1 {code} Said", *headers, "Content-Length: 0", "", "")
        writer.write("\r\n".join(lines).encode())
        await writer.drain()

    return answer


async def hang(received: Received, writer: asyncio.StreamWriter) -> None:
    """Takes the request and never answers."""
    await asyncio.Event().wait()


def in_turn(*answers: Answer) -> Answer:
    """Each answer once, the last for all further requests."""
    left = list(answers)

    async def answer(received: Received, writer: asyncio.StreamWriter) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(received, writer)

    return answer


class Receiver:
    """A context: the receiver listens inside.

    Attributes:
        received: every whole request, in order.
        open: requests that wait for their answer.
        most_open: the largest `open` so far.
    """

    def __init__(
        self,
        answer: Answer | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.answer = answer or status(204)
        self.received: list[Received] = []
        self.open = self.most_open = 0
        self._host, self.port, self._tls = host, port, tls
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self._host}:{self.port}/hook"

    @property
    def ids(self) -> list[str]:
        return [one.id for one in self.received]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self._host, self.port, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            try:
                received = await _read(reader)
                self.received.append(received)
                self.open += 1
                self.most_open = max(self.open, self.most_open)
                try:
                    await self._until_gone(reader, self.answer(received, writer))
                finally:
                    self.open -= 1
            finally:
                writer.close()
                await writer.wait_closed()

    async def _until_gone(self, reader: asyncio.StreamReader, answer: Awaitable[None]) -> None:
        """A client that leaves ends its answer."""
        answering = asyncio.ensure_future(answer)
        leaving = asyncio.ensure_future(reader.read())
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)


async def _read(reader: asyncio.StreamReader) -> Received:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Received(first.split(" ")[1], headers, body.decode())


async def until(true: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(WAIT_S):
        while True:
            answer = true()
            if answer if isinstance(answer, bool) else await answer:
                return
            await asyncio.sleep(0.01)
