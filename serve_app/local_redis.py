"""The Serve class that runs a Redis for jobs where REDIS_URL names none."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from deployments.errors import JobsUnavailable
from serve_app.jobs.redis_process import RedisProcess

if TYPE_CHECKING:
    from pathlib import Path

_LOOK_S = 0.2


class LocalRedis:
    """One replica, which restarts its server if that dies. Both find the data of the last run.

    An application without a redis-server goes on without jobs.

    Args:
        folder: of the data.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: RedisProcess | None = None
        # A thread that stays, because Linux ends the server with the thread that started it. Not
        # the event loop's: reading a large file of data takes longer than Serve waits for it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="redis")
        self._watch: asyncio.Task[None] | None = None

    async def url(self) -> str:
        """Where the server is, with its password.

        Raises:
            JobsUnavailable: there is none, and why.
        """
        if self._watch is None:
            self._watch = asyncio.create_task(self._keep_running())
        return await self._ensured()

    async def _ensured(self) -> str:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._ensure)

    def _ensure(self) -> str:
        if self._process is None:
            self._process = RedisProcess(self._folder)
        return self._process.ensure()

    async def _keep_running(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self._ensured()
            except JobsUnavailable:
                await asyncio.sleep(5)  # whoever asks for the URL gets the reason

    def __del__(self) -> None:
        """Called by Serve when the application ends."""
        if process := getattr(self, "_process", None):
            process.close()
