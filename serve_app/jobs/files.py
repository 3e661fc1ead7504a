"""The pictures of jobs, in one bucket: what clients sent, and what came of it.

inputs/{job_id}/image
inputs/{job_id}/background
inputs/{job_id}/mask
outputs/{job_id}/result-{k}.png    or .webp, .jpeg
outputs/{job_id}/result-{k}.json   written last: its presence says that the result is whole
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from deployments.errors import (
    JobsUnavailable,
    LinkRefused,
    Missing,
    NoSuchJob,
    SetupError,
    SourceFailed,
    StoreUnwritable,
    Unsignable,
)
from deployments.settings import StoreSettings
from deployments.store.bucket import read_whole
from deployments.store.folder_bucket import FolderBucket, local_folder
from deployments.store.provider import make_bucket
from deployments.store.transfer import retrying
from serve_app.jobs.links import FolderLinks, folder_key
from serve_app.jobs.record import Inputs

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from pathlib import Path

    from deployments.settings import JobSettings
    from deployments.store.bucket import Bucket
    from serve_app.jobs.record import InputName, JobSpec

T = TypeVar("T")
FOLDERS = ("inputs", "outputs")
"""Everything below them expires."""
_SWEEP_LIMIT_S = 3600.0
_THREADS = 10
"""Google's client keeps as many connections."""
_TRIES = StoreSettings(attempts=4, backoff_s=0.1)
_ID = re.compile(r"[0-9a-f]{32}")
_PICTURE = re.compile(r"outputs/([0-9a-f]{32})/result-[0-9]{1,3}\.(png|webp|jpeg)")
_LARGEST_K = 999
_JSON = "application/json"
logger = logging.getLogger("ray.serve.imagen.jobs")


class LinkedFile(NamedTuple):
    """A picture in a folder.

    Attributes:
        path: on this machine.
        status: size and time of its change.
        media_type: such as image/png.
    """

    path: Path
    status: os.stat_result
    media_type: str


class JobFiles:
    """The pictures of jobs. Nothing is ever overwritten; methods may be called at the same time.

    Args:
        bucket: where they are.
        link_key: signs the links to a folder's files; None for a bucket that signs by itself.
        limit_s: of one call, with all its tries.

    Raises:
        JobsUnavailable: the storage refuses, is full, or does not answer in time. The log has the
            cause.
        NoSuchJob: the job id is malformed, or the file is not there, perhaps because it expired.
    """

    def __init__(self, bucket: Bucket, link_key: bytes | None, limit_s: float = 30) -> None:
        self._bucket = bucket
        self._limit_s = limit_s
        self._links = FolderLinks(link_key) if link_key else None
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="job-files")

    async def put_input(self, job_id: str, image: bytes, name: InputName = "image") -> None:
        """Store a picture that a client sent."""
        await self._call(partial(self._bucket.put, _input(job_id, name), image))

    async def input(self, job_id: str, name: InputName = "image") -> bytes:
        """A picture that a client sent."""
        return await self._read(_input(job_id, name), job_id)

    async def inputs(self, spec: JobSpec) -> Inputs:
        """All pictures that a client sent for a job."""
        there: dict[InputName, bool] = {
            "image": spec.has_image,
            "background": bool(spec.background_px),
            "mask": spec.has_mask,
        }
        names: list[InputName] = [name for name, is_there in there.items() if is_there]
        files = {str(name): await self.input(spec.job_id, name) for name in names}
        return Inputs(**files)

    async def put_result(self, job_id: str, k: int, image: bytes, document: dict[str, Any]) -> None:
        """Store a result, unless there is one: first the picture, then its document.

        Args:
            k: which of the job's results, from 0.
            document: what is known of the picture; `media_type` is image/png, image/webp or
                image/jpeg. `bytes` is added.
        """
        media_type: str = document["media_type"]
        path = _picture(job_id, k, media_type)
        size = len(image)
        if not await self._call(partial(self._bucket.put, path, image, media_type)):
            # Another worker's picture is there, and the document describes that one.
            size = (await self._call(partial(self._bucket.stat, [path])))[0].size
        content = json.dumps({**document, "bytes": size}).encode()
        await self._call(partial(self._bucket.put, _document(job_id, k), content, _JSON))

    async def result_document(self, job_id: str, k: int) -> dict[str, Any] | None:
        """What is known of a result; None until it is whole."""
        try:
            content = await self._call(partial(read_whole, self._bucket, _document(job_id, k)))
        except Missing:
            return None
        return json.loads(content)

    async def result(self, job_id: str, k: int) -> tuple[bytes, str]:
        """A result's picture and media type."""
        media_type = await self._media_type(job_id, k)
        return await self._read(_picture(job_id, k, media_type), job_id), media_type

    async def link(self, job_id: str, k: int, expires_s: float) -> str:
        """A link that opens a result without credentials.

        Args:
            k: which of the job's results, from 0.
            expires_s: how long it works: above 0, at most seven days.

        Returns:
            The URL of a bucket, or for a folder a path below the application's root.
        """
        path = _picture(job_id, k, await self._media_type(job_id, k))
        if self._links:
            return self._links.sign(path, expires_s)
        return await self._call(partial(self._bucket.sign, path, expires_s))

    async def open_link(self, path: str, expires: str, signature: str) -> LinkedFile:
        """The file behind a link to a folder's picture.

        Args:
            path: what follows `/files/` in the link.
            expires, signature: as in the link.

        Raises:
            LinkRefused: the link has expired, was altered, or is not of this service.
        """
        match = _PICTURE.fullmatch(path)
        if self._links is None or match is None or not isinstance(self._bucket, FolderBucket):
            raise LinkRefused(
                "This is no link of this service.", value=path, remedy="Ask for the job's result."
            )
        self._links.check(path, expires, signature)
        try:
            place, status = await self._call(partial(self._bucket.place, path))
        except Missing as error:
            raise _no_such_job(match[1]) from error
        return LinkedFile(place, status, f"image/{match[2]}")

    async def delete(self, job_id: str) -> None:
        """Delete every file of a job."""
        await self._call(partial(self._delete, _checked(job_id)))

    async def sweep(self, older_than_s: float) -> int:
        """Delete a folder's files that are older; how many. A bucket's lifecycle does it there."""
        if not isinstance(self._bucket, FolderBucket):
            return 0
        return await self._call(partial(self._bucket.expire, older_than_s), _SWEEP_LIMIT_S)

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _media_type(self, job_id: str, k: int) -> str:
        document = await self.result_document(job_id, k)
        if document is None:
            raise _no_such_job(job_id)
        return document["media_type"]

    async def _read(self, path: str, job_id: str) -> bytes:
        try:
            return await self._call(partial(read_whole, self._bucket, path))
        except Missing as error:
            raise _no_such_job(job_id) from error

    def _delete(self, job_id: str) -> None:
        with suppress(Missing):  # somebody else deletes the same job
            listed = (self._bucket.list(f"{folder}/{job_id}/") for folder in FOLDERS)
            paths = [file.path for files in listed for file in files]
            # Documents first, so that no result looks whole without its picture.
            for path in sorted(paths, key=lambda path: not path.endswith(".json")):
                self._bucket.delete(path)

    async def _call(self, work: Callable[[], T], limit_s: float | None = None) -> T:
        """Run `work` on a thread, and repeat it after each Transient.

        Raises:
            JobsUnavailable: it fails for good, or takes longer than the limit.
            Missing: a file is not there.
        """
        limit_s = limit_s or self._limit_s
        stop_s = time.monotonic() + limit_s

        def attempt() -> T:
            if time.monotonic() > stop_s:  # nobody waits any more
                raise SourceFailed("The storage of jobs is too slow.")
            return work()

        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limit_s):
                return await loop.run_in_executor(self._pool, retrying, attempt, _TRIES)
        except Missing:
            raise
        except (SetupError, OSError, TimeoutError) as error:
            logger.error("The storage of jobs failed: %s", str(error) or type(error).__name__)
            raise _unavailable(error) from error


def open_job_files(settings: JobSettings) -> JobFiles:
    """The files of jobs where the settings say; makes no request to a bucket yet.

    Raises:
        ConfigError: `storage` is no URL of a bucket.
        StoreUnwritable: a folder cannot be written.
    """
    url = settings.storage or f"file://{settings.place / 'files'}"
    bucket = make_bucket(url)
    is_folder = isinstance(bucket, FolderBucket)
    return JobFiles(bucket, folder_key(local_folder(url)) if is_folder else None)


def _checked(job_id: str) -> str:
    if not _ID.fullmatch(job_id):
        raise _no_such_job(job_id)
    return job_id


def _input(job_id: str, name: InputName) -> str:
    return f"inputs/{_checked(job_id)}/{name}"


def _document(job_id: str, k: int) -> str:
    if not 0 <= k <= _LARGEST_K:
        raise _no_such_job(job_id)
    return f"outputs/{_checked(job_id)}/result-{k}.json"


def _picture(job_id: str, k: int, media_type: str) -> str:
    path = _document(job_id, k).removesuffix("json") + media_type.removeprefix("image/")
    if not _PICTURE.fullmatch(path):
        raise ValueError(f"not a media type of results: {media_type}")
    return path


def _no_such_job(job_id: str) -> NoSuchJob:
    return NoSuchJob(
        "There is no such job, result or picture; they are kept for a limited time.",
        value=job_id,
        remedy="Check the id, or submit the picture again.",
    )


def _unavailable(error: Exception) -> JobsUnavailable:
    """The error that clients see; it says nothing of the storage's place."""
    fact = "The storage of jobs does not answer."
    if isinstance(error, StoreUnwritable):
        fact = "The storage of jobs takes no files."
    elif isinstance(error, Unsignable):
        fact = "The storage of jobs cannot sign links."
    return JobsUnavailable(
        fact,
        value=error.code if isinstance(error, SetupError) else type(error).__name__,
        remedy="Try again after Retry-After seconds; requests without Prefer go on."
        " Operators: run `imagen storage check`.",
        retry_after_s=5,
    )
