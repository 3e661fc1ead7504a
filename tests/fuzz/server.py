"""The whole HTTP application in a process of its own, for the fuzzers: tests.jobs.application.

    python -m tests.fuzz.server REDIS_URL FOLDER [KEYS]

Its first line says where it is. It ends when its standard input does. Errors go to standard error.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from deployments import images
from deployments.settings import LimitSettings, UploadSettings
from tests.jobs.application import StandInModel, StandInModels, application

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from deployments.contract import ImageJob, ImageResult, JobProgress

PAUSE_S = 0.7
"""A body that brings nothing for so long is refused."""
STREAM_S = 1.5
"""An event stream ends after so long."""
SLOW = "slow"
"""The prompt of a request that takes a second."""
KEEP_S = 30
"""Jobs are forgotten after so long, so that a long run forgets, too."""


@dataclass
class DecodingModels(StandInModels):
    """Models that decode the picture, as real ones do first, and remember nothing."""

    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))

    def __getitem__(self, name: str) -> StandInModel:
        return DecodingModel(self, name)


class DecodingModel(StandInModel):
    models: DecodingModels

    async def stream(self, job: ImageJob) -> AsyncGenerator[JobProgress | tuple[ImageResult, ...]]:
        if job.image is not None:
            loop = asyncio.get_running_loop()
            decode = images.decode, job.image, LimitSettings()
            await loop.run_in_executor(self.models.threads, *decode)
        if getattr(job.request, "prompt", "") == SLOW:
            await asyncio.sleep(1)
        async for told in super().stream(job):
            yield told
        self.models.jobs.clear()
        self.models.stepped.clear()


async def main(redis_url: str, folder: str, keys: str = "") -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    async with application(
        redis_url,
        Path(folder),
        keys=Path(keys) if keys else None,
        models=DecodingModels(),
        uploads=UploadSettings(pause_s=PAUSE_S),
        stream_s=STREAM_S,
        keep_s=KEEP_S,
    ) as app:
        print(app.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
