"""Jobs over HTTP through Serve's proxy: the rate of accepted ones, and the overhead of one."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx

from benchmarks.jobs.alone import redis_server
from benchmarks.jobs.clients import (
    ASYNC,
    LARGE_PX,
    SMALL_PX,
    TASK,
    WAIT,
    Block,
    Way,
    closed_loop,
    session,
    upload,
)
from benchmarks.jobs.systems import CELERY_BIN, system
from benchmarks.server import cpu_s, process_title, running

if TYPE_CHECKING:
    import aiohttp
    import psutil

    from benchmarks.server import Server

BLOCKS: Final = {8: 200, 32: 300}
"""Uploads of a block by clients: two seconds or so."""
_WARM_UP: Final = 30
_READY_S: Final = 60


@dataclass
class Measured:
    """A block, and what it cost.

    Attributes:
        cpu_ms: of each kind of process, for each upload; those below 0.05 ms are left out.
    """

    block: Block
    cpu_ms: dict[str, float]


def run(rounds: int, calls: int) -> dict[str, Any]:
    """Rates and overheads, in turns on one server.

    Args:
        rounds: of blocks, of every way at every number of clients.
        calls: of each way, for the overhead.
    """
    celery = (CELERY_BIN / "celery").exists()
    with (
        tempfile.TemporaryDirectory(prefix="bench-jobs-") as name,
        redis_server(Path(name)) as redis,
        running(system(redis, celery=celery)) as server,
    ):
        _wait_ready(server.url + "/accepting/readyz")
        return asyncio.run(_measure(server, rounds, calls, celery=celery))


async def _measure(server: Server, rounds: int, calls: int, *, celery: bool) -> dict[str, Any]:
    url = server.url
    rates = {
        "baseline": Way(f"{url}/baseline/upload", {}, 204),
        "baseline, whole": Way(f"{url}/baseline/whole", {}, 204),
        "jobs": Way(f"{url}/accepting{TASK.route}", ASYNC, 202),
    }
    answers = {
        "sync": Way(url + TASK.route, {}, 200),
        "job": Way(url + TASK.route, WAIT, 200),
    }
    if celery:
        rates["celery"] = Way(f"{url}/celery/kept", ASYNC, 202)
        answers["celery"] = Way(f"{url}/celery/worked", WAIT, 200)
    async with session() as client:
        for way in (*rates.values(), *answers.values()):
            await _warm_up(client, way)
        overhead = await _overhead(client, answers, calls)
        rate = await _rates(client, server, rates, rounds)
    return {"overhead": overhead, "rate": rate}


async def _warm_up(client: aiohttp.ClientSession, way: Way) -> None:
    """Until it answers well, and then some more."""
    until_s, done = time.monotonic() + _READY_S, 0
    while done < _WARM_UP:
        block = await closed_loop(client, way, SMALL_PX, clients=1, requests=1)
        done += len(block.seconds)
        if block.others:
            if time.monotonic() > until_s:
                raise TimeoutError(f"{way.url} answers {dict(block.others)}.")
            await asyncio.sleep(0.5)


async def _overhead(
    client: aiohttp.ClientSession, ways: dict[str, Way], calls: int
) -> dict[str, Any]:
    """One client, each way in turn; the difference is taken in each turn."""
    blocks = {name: Block() for name in ways}
    for turn in range(calls):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            await upload(client, ways[name], SMALL_PX, blocks[name])
    found: dict[str, Any] = {}
    for name, block in blocks.items():
        if block.others:
            raise RuntimeError(f"{name}: {dict(block.others)}")
        found[name] = {"p50_ms": _p(block.seconds, 50), "p95_ms": _p(block.seconds, 95)}
        if name != "sync":
            pairs = zip(block.seconds, blocks["sync"].seconds, strict=True)
            more = [ours - sync for ours, sync in pairs]
            found[name] |= {"more_p50_ms": _p(more, 50), "more_p95_ms": _p(more, 95)}
    return {"calls": calls, "px": SMALL_PX, **found}


def _p(seconds: list[float], percent: int) -> float:
    return statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1] * 1e3


async def _rates(
    client: aiohttp.ClientSession, server: Server, ways: dict[str, Way], rounds: int
) -> dict[str, Any]:
    runs: dict[tuple[int, str], list[Measured]] = defaultdict(list)
    for turn in range(rounds):
        for clients, requests in BLOCKS.items():
            for name in list(ways)[:: -1 if turn % 2 else 1]:
                found = await _block(client, server, ways[name], clients, requests)
                runs[clients, name].append(found)
    return {str(clients): _summary(runs, clients, list(ways)) for clients in BLOCKS}


async def _block(
    client: aiohttp.ClientSession, server: Server, way: Way, clients: int, requests: int
) -> Measured:
    before = _cpu_s(server.process)
    block = await closed_loop(client, way, LARGE_PX, clients=clients, requests=requests)
    if block.others:
        raise RuntimeError(f"{way.url}: {dict(block.others)}")
    after = _cpu_s(server.process)
    cpu_ms = {t: (s - before.get(t, 0)) / requests * 1e3 for t, s in after.items()}
    return Measured(block, {title: round(ms, 2) for title, ms in cpu_ms.items() if ms > 0.05})


def _cpu_s(server: psutil.Process) -> dict[str, float]:
    """CPU seconds by kind of process: of the server, of this process, of its Redis."""
    used: dict[str, float] = defaultdict(float)
    me = server.parent()
    for process in [me, *me.children(recursive=True)] if me else []:
        title = "clients" if process == me else process_title(process)
        used[title] += cpu_s(process)
    return used


def _summary(
    runs: dict[tuple[int, str], list[Measured]], clients: int, names: list[str]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        measured = runs[clients, name]
        per_s = [one.block.per_s for one in measured]
        base = [one.block.per_s for one in runs[clients, "baseline"]]
        ratios = [mine / theirs for mine, theirs in zip(per_s, base, strict=True)]
        titles = {title for one in measured for title in one.cpu_ms}
        found[name] = {
            "per_s": per_s,
            "median_per_s": statistics.median(per_s),
            "of_baseline": ratios,
            "median_of_baseline": statistics.median(ratios),
            "p50_ms": statistics.median(s for one in measured for s in one.block.seconds) * 1e3,
            "cpu_ms": {
                title: statistics.median(one.cpu_ms.get(title, 0) for one in measured)
                for title in sorted(titles)
            },
        }
    return found


def _wait_ready(url: str) -> None:
    until_s = time.monotonic() + _READY_S
    while not httpx.get(url, timeout=10, trust_env=False).is_success:
        if time.monotonic() > until_s:
            raise TimeoutError(f"{url} is not ready.")
        time.sleep(0.5)
