"""Forgets what is over. Ingress replicas do it, because there may be no worker."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from deployments.errors import JobsUnavailable
from serve_app.jobs.options import life_s

if TYPE_CHECKING:
    from serve_app.jobs.files import JobFiles
    from serve_app.jobs.queue import JobQueue

EVERY_S = 5.0
_FOLDER_EVERY_S = 3600.0


async def keep_sweeping(
    queue: JobQueue, files: JobFiles, keep_s: float, every_s: float = EVERY_S
) -> NoReturn:
    """Forget jobs whose time is over, with their pictures, until cancelled.

    Of a folder it also deletes pictures that no record leads to, such as those of a submission that
    broke off. A bucket's lifecycle does that there.

    Args:
        queue: of the jobs.
        files: their pictures.
        keep_s: how long jobs are kept after their end.
        every_s: pause between two sweeps.
    """
    folder_due_s = 0.0
    while True:
        with suppress(JobsUnavailable):
            await _forget(queue, files)
            if time.monotonic() >= folder_due_s:
                await files.sweep(life_s(keep_s))
                folder_due_s = time.monotonic() + _FOLDER_EVERY_S
        await asyncio.sleep(every_s)


async def _forget(queue: JobQueue, files: JobFiles) -> None:
    while job_ids := await queue.sweep():
        # An exception is no matter: files that stay behind expire by themselves.
        deleted = (files.delete(job_id) for job_id in job_ids)
        await asyncio.gather(*deleted, return_exceptions=True)
