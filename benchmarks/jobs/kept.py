"""What finished jobs cost: memory of Redis and of the processes, and time of a listing page.

Then their time is made to be over, and nothing may be left of them.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from redis import Redis

from benchmarks.jobs.alone import jobs_of, part, redis_server, until_ended
from benchmarks.jobs.clients import ASYNC, SMALL_PX, TASK, Way, closed_loop, session
from benchmarks.server import free_port

if TYPE_CHECKING:
    import aiohttp
    import psutil

    from serve_app.jobs.service import Jobs

OWNER: Final = "anonymous"
_CLIENTS: Final = 8
_WARM_UP: Final = 100
_PAGE: Final = 20
_ASKED: Final = 30
_GONE_S: Final = 600
_MIB: Final = 2**20


def run(counts: tuple[int, ...]) -> dict[str, Any]:
    """Rising numbers of finished jobs; the last one says how much is kept and then forgotten."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-jobs-") as name,
        redis_server(Path(name)) as redis,
    ):
        port = free_port()
        with (
            part("ingress", redis, Path(name), str(port)) as ingress,
            part("worker", redis, Path(name)) as worker,
        ):
            found = _Kept(redis, Path(name), f"http://127.0.0.1:{port}", ingress, worker)
            return asyncio.run(found.measure(counts))


class _Kept:
    """An Ingress and a worker without Ray, and their Redis."""

    def __init__(
        self, redis: str, folder: Path, url: str, ingress: psutil.Process, worker: psutil.Process
    ) -> None:
        self._url, self._folder, self._ingress, self._worker = url, folder, ingress, worker
        self._redis_url = redis
        self._redis = Redis.from_url(redis, decode_responses=True)

    async def measure(self, counts: tuple[int, ...]) -> dict[str, Any]:
        async with jobs_of(self._redis_url, self._folder) as jobs, session() as client:
            await _wait_ready(client, self._url)
            empty, before = self._used(), 0
            rows: list[dict[str, Any]] = []
            for count in (_WARM_UP, *counts):
                await self._submit(client, jobs, count - before, count)
                before = count
                rows.append({"jobs": count, **self._used(), **await self._pages(client, count)})
            last = rows[-1]
            per_job = (last["redis_bytes"] - empty["redis_bytes"]) / last["jobs"]
            return {
                "empty": empty,
                "rows": rows[1:] if counts[0] == _WARM_UP else rows,
                "redis_bytes_per_job": per_job,
                "forgotten": await self._forget(),
            }

    async def _submit(
        self, client: aiohttp.ClientSession, jobs: Jobs, more: int, sum_: int
    ) -> None:
        way = Way(self._url + TASK.route, ASYNC, 202)
        block = await closed_loop(client, way, SMALL_PX, clients=_CLIENTS, requests=more)
        if block.others:
            raise RuntimeError(f"Jobs were refused: {dict(block.others)}.")
        await until_ended(jobs, OWNER, sum_)

    def _used(self) -> dict[str, Any]:
        memory: Any = self._redis.info("memory")
        return {
            "redis_bytes": memory["used_memory"],
            "ingress_mib": self._ingress.memory_info().rss / _MIB,
            "worker_mib": self._worker.memory_info().rss / _MIB,
            "keys": self._redis.dbsize(),
        }

    async def _pages(self, client: aiohttp.ClientSession, count: int) -> dict[str, float]:
        """Milliseconds of the first page, of one in the middle, and of the last."""
        cursors = [""]
        while cursor := (await self._page(client, cursors[-1]))[1]:
            cursors.append(cursor)
        assert len(cursors) == -(-count // _PAGE), "a page is missing"
        asked = {"first": cursors[0], "middle": cursors[len(cursors) // 2], "last": cursors[-1]}
        seconds: dict[str, list[float]] = {name: [] for name in asked}
        for _ in range(_ASKED):
            for name, cursor in asked.items():
                seconds[name].append((await self._page(client, cursor))[0])
        return {f"{name}_ms": statistics.median(took) * 1e3 for name, took in seconds.items()}

    async def _page(self, client: aiohttp.ClientSession, cursor: str) -> tuple[float, str | None]:
        start_s = time.perf_counter()
        query = {"limit": str(_PAGE), **({"cursor": cursor} if cursor else {})}
        async with client.get(f"{self._url}/api/v1/jobs", params=query) as response:
            body = await response.json()
        if response.status != 200 or not body["jobs"]:
            raise RuntimeError(f"A page has no jobs: {response.status}.")
        return time.perf_counter() - start_s, body["next_cursor"]

    async def _forget(self) -> dict[str, Any]:
        """Let every job's time be over; the sweep of the Ingress does the rest."""
        expiry, start_s = "imagen:expiry", time.perf_counter()
        self._redis.zunionstore(expiry, {expiry: 0})
        while self._redis.zcard(expiry):
            if time.perf_counter() > start_s + _GONE_S:
                raise TimeoutError("Jobs are not forgotten.")
            await asyncio.sleep(0.1)
        seconds = time.perf_counter() - start_s
        await asyncio.sleep(2)  # the files of the last ones
        left = [key for key in self._redis.scan_iter("imagen:*")]
        files = sum(1 for path in (self._folder / "files").rglob("*/*/*") if path.is_file())
        return {"seconds": seconds, "keys_left": left, "files_left": files, **self._used()}


async def _wait_ready(client: aiohttp.ClientSession, url: str) -> None:
    while True:
        try:
            async with client.get(f"{url}/readyz") as response:
                if response.status == 200:
                    return
        except OSError:
            pass  # not listening yet
        await asyncio.sleep(0.1)
