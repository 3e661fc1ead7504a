"""Sends a plan's requests when they are due, and builds the report."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from benchmarks import machine
from benchmarks.load.client import Client, Ending, check_reachable
from benchmarks.load.report import Machine, Record, Report, derive
from benchmarks.load.workload import photos, requests, warm_up

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from typing import Any

    from benchmarks.load.plan import Plan
    from benchmarks.load.workload import Request

    Progress = Callable[[str, int], None]
    """Called with the phase, and the number of its requests that are done."""


def run(
    plan: Plan,
    url: str | None = None,
    *,
    unloaded_s: Mapping[int, float] | None = None,
    usd_per_gpu_hour: float | None = None,
    api_key: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run a plan. In the main thread, Ctrl-C or SIGTERM ends it early, with a report.

    Args:
        plan: what to send.
        url: the server's address; None takes the plan's.
        unloaded_s: unloaded latency by request, which is then not measured.
        usd_per_gpu_hour: the price, for the cost of pictures.
        api_key: of the server; it is no part of the report.
        progress: called after every request.

    Raises:
        Unreachable, ConfigError: no server listens there; the photo or the URL is not valid.
    """

    async def main() -> Report:
        stop = asyncio.Event()
        if threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            for ending in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(ending, stop.set)
        return await run_async(
            plan,
            url,
            stop=stop,
            unloaded_s=unloaded_s,
            usd_per_gpu_hour=usd_per_gpu_hour,
            api_key=api_key,
            progress=progress,
        )

    return asyncio.run(main())


def run_whole(plan: Plan, url: str, progress: Progress | None = None) -> Report:
    """As `run`, for one load of several.

    Raises:
        KeyboardInterrupt: it was stopped early.
    """
    report = run(plan, url, progress=progress)
    if report.interrupted:
        raise KeyboardInterrupt
    return report


async def run_async(
    plan: Plan,
    url: str | None = None,
    *,
    stop: asyncio.Event | None = None,
    unloaded_s: Mapping[int, float] | None = None,
    usd_per_gpu_hour: float | None = None,
    api_key: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """As `run`, in a running event loop; `stop` ends it early."""
    if url is not None:
        plan = plan.change(target={"url": url})
    pictures = photos(plan)
    await check_reachable(plan.target)
    load_before, started = machine.load_average(), datetime.now(UTC).isoformat(timespec="seconds")
    async with Client(plan, pictures, api_key) as client:
        load = _Load(plan, client, progress or _no_progress, dict(unloaded_s or {}))
        interrupted = await _until(load.drive(), stop or asyncio.Event())
    records = sorted(load.records, key=lambda record: record.index)
    return Report(
        plan=plan,
        url=plan.target.url,
        protocol=plan.target.protocol,
        started=started,
        interrupted=interrupted,
        wall_s=load.wall_s,
        machine=Machine(
            **machine.describe(),
            load_before=load_before,
            load_after=machine.load_average(),
            generator_cpu_share=load.cpu_s / load.wall_s if load.wall_s else 0.0,
        ),
        unloaded_s=load.unloaded_s,
        records=tuple(records),
        **derive(records, load.wall_s, usd_per_gpu_hour),
    )


@dataclass
class _Load:
    """A run in progress.

    Attributes:
        unloaded_s: latency of request i on the idle server.
        records: of the counted requests, in the order they ended.
        wall_s, cpu_s: of the counted part, until its last record.
    """

    plan: Plan
    client: Client
    progress: Progress
    unloaded_s: dict[int, float]
    records: list[Record] = field(default_factory=list[Record])
    wall_s: float = 0.0
    cpu_s: float = 0.0
    _start_s: float = 0.0
    _cpu_start_s: float = 0.0

    async def drive(self) -> None:
        """Send the warm-up, measure the idle server if the plan says so, then send the load."""
        for done, request in enumerate(warm_up(self.plan), 1):
            await self.client.send(request)
            self.progress("warming up", done)
        if self.plan.slowdown and not self.unloaded_s:
            await self._measure_idle()
        self._start_s, self._cpu_start_s = time.perf_counter(), time.process_time()
        await (self._open() if self.plan.mode == "open" else self._closed())

    async def _measure_idle(self) -> None:
        for request in requests(self.plan):
            if request.index == self.plan.slowdown_requests:
                return
            ending = await self.client.send(replace(request, leaves_after_s=None))
            if ending.outcome == "ok":
                self.unloaded_s[request.index] = ending.ended_s - ending.sent_s
            self.progress("one by one on the idle server", request.index + 1)

    async def _open(self) -> None:
        """Send each request at its arrival, whether or not earlier ones were answered."""
        async with asyncio.TaskGroup() as group:
            for request in requests(self.plan):
                due_s = self._start_s + (request.arrival_s or 0.0)
                await asyncio.sleep(due_s - time.perf_counter())
                group.create_task(self._count(request, due_s))

    async def _closed(self) -> None:
        """Let each client send as soon as its last request is answered."""
        left = requests(self.plan)
        end_s = self._start_s + (self.plan.duration_s or float("inf"))

        async def one_client() -> None:
            while time.perf_counter() < end_s and (request := next(left, None)):
                await self._count(request, time.perf_counter())

        async with asyncio.TaskGroup() as group:
            for _ in range(self.plan.concurrency or 1):
                group.create_task(one_client())

    async def _count(self, request: Request, due_s: float) -> None:
        sent_s = time.perf_counter()
        try:
            ending = await self.client.send(request)
        except asyncio.CancelledError:
            self._add(request, due_s, Ending("unfinished", sent_s, time.perf_counter()))
            raise
        self._add(request, due_s, ending)

    def _add(self, request: Request, due_s: float, ending: Ending) -> None:
        self.records.append(self._record(request, due_s, ending))
        self.wall_s = time.perf_counter() - self._start_s
        self.cpu_s = time.process_time() - self._cpu_start_s
        self.progress("under load", len(self.records))

    def _record(self, request: Request, due_s: float, ending: Ending) -> Record:
        answer = ending.answer
        return Record(
            index=request.index,
            task=request.label,
            size=request.size,
            parameters=dict(request.parameters),
            due_s=due_s - self._start_s,
            sent_s=ending.sent_s - self._start_s,
            latency_s=ending.ended_s - due_s,
            unloaded_s=self.unloaded_s.get(request.index),
            leaves=request.leaves_after_s is not None,
            outcome=ending.outcome,
            status=ending.status,
            code=answer.code,
            detail=answer.detail,
            batch_size=answer.batch_size,
            gpu_seconds=answer.gpu_seconds,
            stages_s=answer.stages_s,
        )


def _no_progress(_phase: str, _done: int) -> None:
    pass


async def _until(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> bool:
    """Run the work until it ends or `stop` is set; returns whether it was stopped."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working  # to raise its exception
            return False
        return True
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)
