"""Sends one request and classifies its outcome.

Uses aiohttp rather than httpx, because it needs less CPU per request, which a server on the same
machine would lack.
"""

from __future__ import annotations

import asyncio
import io
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from benchmarks.load.protocols import Answer, call, read_answer
from deployments.errors import Unreachable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.load.plan import Plan, Target
    from benchmarks.load.report import Outcome
    from benchmarks.load.workload import Request, Size

_CONNECT_S = 5.0
# Idle connections are closed before any server closes them, which would race the next request.
_IDLE_S = 1.0


@dataclass(frozen=True, slots=True)
class Ending:
    """The outcome of a request.

    Attributes:
        outcome: as in `Record`.
        sent_s, ended_s: times of `time.perf_counter`.
        status: the HTTP status, if there was an answer.
        answer: its content, or the name of the connection's error.
    """

    outcome: Outcome
    sent_s: float
    ended_s: float
    status: int | None = None
    answer: Answer = Answer()  # noqa: RUF009 - frozen


class Client:
    """Posts photos to a target, on as many connections as needed; an asynchronous context."""

    def __init__(
        self, plan: Plan, photos: Mapping[Size, bytes], api_key: str | None = None
    ) -> None:
        self._target = plan.target
        self._timeout_s = plan.timeout_s
        self._photos = photos
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(self, request: Request) -> Ending:
        """Post the request. Whatever the server does is an outcome, not an exception."""
        sent_s = time.perf_counter()
        leaves_s = request.leaves_after_s
        leaving = leaves_s is not None and leaves_s < self._timeout_s
        outcome: Outcome
        status, answer = None, Answer()
        try:
            async with asyncio.timeout(leaves_s if leaving else self._timeout_s):
                status, answer = await self._post(request)
        except TimeoutError:
            outcome = "disconnected" if leaving else "timeout"
        except (aiohttp.ClientError, OSError) as error:
            outcome, answer = "connection_error", Answer(type(error).__name__, str(error)[:300])
        else:
            pictureless = "refused" if status != 200 else "no_picture"
            outcome = "ok" if answer.code is None else pictureless
        return Ending(outcome, sent_s, time.perf_counter(), status, answer)

    async def _post(self, request: Request) -> tuple[int, Answer]:
        prepared = call(self._target, request, self._photos[request.size])
        url = URL(self._target.url.rstrip("/") + prepared.path, encoded=True)
        # aiohttp warns of large `bytes`, and sends a file without copying it.
        data = io.BytesIO(prepared.body)
        async with self._session.post(
            url, data=data, headers=prepared.headers, allow_redirects=False
        ) as response:
            body = await response.read()
            return response.status, read_answer(
                self._target, response.status, response.headers, body
            )


async def check_reachable(target: Target) -> None:
    """Raises Unreachable unless a server listens at the target's address."""
    parts = urlsplit(target.url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        async with asyncio.timeout(_CONNECT_S):
            _, writer = await asyncio.open_connection(parts.hostname, port)
    except OSError as error:  # TimeoutError is one
        raise Unreachable(
            "No server listens at the address.",
            value=target.url,
            remedy="Start the server (`make run`), or give its address with --url.",
        ) from error
    writer.close()
