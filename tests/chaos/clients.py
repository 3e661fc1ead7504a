"""Clients of jobs who do not give up, and the pictures that their jobs must bring."""

from __future__ import annotations

import asyncio
import io
import random
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import httpx
import numpy as np
from PIL import Image

from deployments.tasks import Task

if TYPE_CHECKING:
    from types import TracebackType

PATIENCE_S = 180.0
_PAUSE_S = 0.3
_BOUND = 1
"""Levels by which a pixel of the same request may differ, see docs/engine.md, "bounded"."""
_PASSING = {404, 408, 429, 500, 503}
"""Answers while a process is away. Serve's proxy gives 404 and 500 in plain text."""


@dataclass(frozen=True)
class Order:
    """A request.

    Attributes:
        seed: of the picture that is sent, and of the result where there is chance.
    """

    task: Task
    seed: int
    size_px: int = 64
    fields: dict[str, str] = field(default_factory=dict)
    n: int = 1

    @property
    def picture(self) -> bytes:
        """A PNG that no other order has."""
        rng = np.random.default_rng(self.seed)
        small = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(small).resize((self.size_px, self.size_px), 3).save(file, "png")
        return file.getvalue()

    def form(self, k: int = 0) -> dict[str, str]:
        """Its fields; for the k-th result, as a call of its own."""
        chance = {"seed": str(self.seed + k)} if self.task is Task.COMIC else {}
        return {**chance, **self.fields}


def mixed(count: int, rng: random.Random) -> list[Order]:
    """Orders of all models, each of another picture; some of several results."""
    orders = []
    for number in range(count):
        task = rng.choice([Task.COMIC, Task.COMIC, Task.BACKGROUND, Task.UPSCALE])
        comic = task is Task.COMIC
        steps = {"steps": rng.choice(["4", "8", "20"])} if comic else {}
        size_px = 40 if task is Task.UPSCALE else 64
        n = 2 if comic and rng.random() < 0.2 else 1
        orders.append(Order(task, 1000 * number + 7, size_px, steps, n))
    return orders


class Client:
    """A context. Repeats each request until it is answered.

    Attributes:
        keys: Idempotency-Keys by the ids of the jobs that they made.
        refused: answers on the way, by status; 0 for none.
    """

    def __init__(self, url: str) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=60, trust_env=False)
        self.keys: dict[str, str] = {}
        self.refused: dict[int, int] = {}

    async def submit(self, order: Order, **fields: str) -> str:
        """The id of a job, once there is a 202."""
        key = uuid.uuid4().hex
        response = await self._insist(
            "POST",
            order.task.route,
            files={"image": order.picture},
            data={**order.form(), **({"n": str(order.n)} if order.n > 1 else {}), **fields},
            headers={"Prefer": "respond-async", "Idempotency-Key": key},
        )
        assert response.status_code == 202, response.text
        job_id: str = response.json()["job_id"]
        assert job_id not in self.keys, "two keys found one job"
        self.keys[job_id] = key
        return job_id

    async def job(self, job_id: str) -> dict[str, Any]:
        return (await self._insist("GET", f"/api/v1/jobs/{job_id}")).json()

    async def ended(self, job_id: str, limit_s: float = PATIENCE_S) -> dict[str, Any]:
        """A job once it has ended."""
        return await self.when(job_id, {"completed", "failed", "canceled"}, limit_s)

    async def when(
        self, job_id: str, statuses: set[str], limit_s: float = PATIENCE_S
    ) -> dict[str, Any]:
        """A job once it has one of these statuses."""
        found: dict[str, Any] = {}
        try:
            async with asyncio.timeout(limit_s):
                while (found := await self.job(job_id))["status"] not in statuses:
                    await asyncio.sleep(_PAUSE_S)
        except TimeoutError:
            raise AssertionError(f"not {statuses} after {limit_s:g} s: {found}") from None
        return found

    async def cancel(self, job_id: str) -> dict[str, Any]:
        return (await self._insist("DELETE", f"/api/v1/jobs/{job_id}")).json()

    async def results(self, job: dict[str, Any]) -> list[bytes]:
        """The pictures of a completed job."""
        found = []
        for result in job["results"]:
            response = await self._insist("GET", result["url"], follow_redirects=True)
            assert response.status_code == 200, response.text
            found.append(response.content)
        return found

    async def direct(self, order: Order, k: int = 0) -> bytes:
        """The k-th result of an order, by a call that waits for it."""
        files = {"image": order.picture}
        response = await self._insist("POST", order.task.route, files=files, data=order.form(k))
        assert response.status_code == 200, response.text
        return response.content

    async def once(self, order: Order, **headers: str) -> httpx.Response:
        """The first answer, whatever it is."""
        files = {"image": order.picture}
        return await self._http.post(
            order.task.route, files=files, data=order.form(), headers=headers
        )

    async def _insist(self, method: str, path: str, **request: Any) -> httpx.Response:
        """An answer that is none of a process that is away."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                status = 0
                try:
                    response = await self._http.request(method, path, **request)
                    status = response.status_code
                    text = response.headers.get("content-type", "")
                    is_ours = text.startswith("application/problem+json")
                    if status not in _PASSING or (is_ours and status not in (429, 503)):
                        return response
                except httpx.TransportError:
                    pass
                self.refused[status] = self.refused.get(status, 0) + 1
                await asyncio.sleep(_PAUSE_S)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()


async def assert_right_pictures(client: Client, order: Order, job: dict[str, Any]) -> None:
    """The results of a job are those of direct calls, within the bound of the engine."""
    pictures = await client.results(job)
    assert len(pictures) == order.n
    for k, picture in enumerate(pictures):
        direct = await client.direct(order, k)
        ours, theirs = (np.asarray(Image.open(io.BytesIO(one)), int) for one in (picture, direct))
        assert ours.shape == theirs.shape
        difference = int(np.abs(ours - theirs).max())
        assert difference <= _BOUND, (order, k, difference)
