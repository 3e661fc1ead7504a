"""Results of requests without a job, which clients get by address: kept while it works."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from deployments.errors import JobsUnavailable, RateLimited
from serve_app.jobs.record import new_job_id
from serve_app.jobs.results import document_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.contract import ImageResult
    from deployments.settings import ClientJobSettings
    from serve_app.jobs.files import JobFiles
    from serve_app.jobs.queue import JobQueue

_SPARE_S = 5
"""By which a file outlives its link: Redis and this machine may not agree on the time."""


class Kept:
    """Keeps results, so many for each API key. Whoever sweeps jobs deletes them.

    Args:
        queue: counts them.
        files: where they are.
        clients: how many there may be, and how long their links work.
    """

    def __init__(self, queue: JobQueue, files: JobFiles, clients: ClientJobSettings) -> None:
        self._queue = queue
        self._files = files
        self._clients = clients

    async def check_room(self, owner: str, pictures: int) -> None:
        """Whether so many results could be kept now; raises as `keep`.

        Args:
            owner: id of the API key.
            pictures: 1 to 8.
        """
        await self._count(new_job_id(), owner, pictures, only_check=True)

    async def keep(self, owner: str, results: Sequence[ImageResult]) -> list[str]:
        """Keep the results of a request until their links stop working; a link to each.

        Args:
            owner: id of the API key.
            results: 1 to 8.

        Raises:
            RateLimited: as many of this owner's are kept as may be.
            JobsUnavailable: Redis or the storage does not answer.
        """
        kept_id, count, link_s = new_job_id(), len(results), self._clients.link_s
        # Counted first, so that a replica that dies leaves no file that nobody forgets.
        await self._count(kept_id, owner, count, link_s + _SPARE_S)
        try:
            for k, result in enumerate(results):
                await self._files.put_result(kept_id, k, result.image, document_of(result))
            return [await self._files.link(kept_id, k, link_s) for k in range(count)]
        except JobsUnavailable:
            with suppress(JobsUnavailable):
                await self._count(kept_id, owner, count)
            raise

    async def _count(
        self,
        kept_id: str,
        owner: str,
        pictures: int,
        seconds: float = 0,
        *,
        only_check: bool = False,
    ) -> None:
        most = self._clients.max_urls
        wait_s = await self._queue.keep(
            kept_id, owner, pictures, most=most, seconds=seconds, only_check=only_check
        )
        if wait_s > 0:
            raise RateLimited(
                "No more pictures of this API key are kept for their addresses.",
                value=f"jobs.max_urls = {most}",
                remedy="Try again after Retry-After seconds, when older addresses have ended, or"
                " let the answer hold the pictures themselves.",
                retry_after_s=wait_s,
            )
