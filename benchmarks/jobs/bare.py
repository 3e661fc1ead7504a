"""Jobs a second without HTTP and Ray: the queue alone, and with pictures and a worker."""

from __future__ import annotations

import asyncio
import secrets
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from benchmarks.jobs.alone import jobs_of, part, redis_server, until_ended
from benchmarks.jobs.clients import LARGE_PX, TASK, picture
from benchmarks.server import cpu_s
from serve_app.jobs.record import JobSpec, new_job_id

if TYPE_CHECKING:
    import psutil

SUBMITTERS: Final = 16


class Kind(NamedTuple):
    """What is measured.

    Attributes:
        title: in tables.
        other: the process that ends the jobs, see `alone`.
        has_image: whether each job has a picture and a result of 100 KB.
        jobs: of one round.
    """

    title: str
    other: str
    has_image: bool
    jobs: int


KINDS: Final = (
    Kind("queue: submit, claim, finish", "finisher", has_image=False, jobs=3000),
    Kind("with pictures, as the worker does it", "worker", has_image=True, jobs=1000),
)


async def measure(kind: Kind, redis: str, folder: Path, other: psutil.Process) -> dict[str, float]:
    """One round: jobs a second, from the first submission until the last job has ended."""
    owner = secrets.token_hex(4)
    image = picture(LARGE_PX) if kind.has_image else None
    before_s, other_s = time.process_time(), cpu_s(other)
    async with jobs_of(redis, folder) as jobs:
        left = iter(range(kind.jobs))

        async def submitter() -> None:
            for _ in left:
                await jobs.submit(_spec(owner, has_image=kind.has_image), image)

        start_s = time.perf_counter()
        await asyncio.gather(*(submitter() for _ in range(SUBMITTERS)))
        accepted_s = time.perf_counter() - start_s
        ended_s = await until_ended(jobs, owner, kind.jobs) - start_s
    return {
        "per_s": kind.jobs / ended_s,
        "accepted_per_s": kind.jobs / accepted_s,
        "submitter_cpu_ms": (time.process_time() - before_s) / kind.jobs * 1e3,
        "other_cpu_ms": (cpu_s(other) - other_s) / kind.jobs * 1e3,
    }


def _spec(owner: str, *, has_image: bool) -> JobSpec:
    return JobSpec(
        job_id=new_job_id(),
        owner=owner,
        task=TASK,
        request={},
        output_format="png",
        width_px=LARGE_PX,
        height_px=LARGE_PX,
        has_image=has_image,
        fingerprint=secrets.token_hex(32),
        request_id=secrets.token_hex(16),
    )


def run(rounds: int) -> dict[str, Any]:
    """So many rounds of each kind, with medians."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        with (
            tempfile.TemporaryDirectory(prefix="bench-jobs-") as name,
            redis_server(Path(name)) as redis,
            part(kind.other, redis, Path(name)) as other,
        ):
            runs = [
                asyncio.run(measure(kind, redis, Path(name), other)) for _ in range(rounds + 1)
            ][1:]  # the first one warms up
        found[kind.title] = {
            "jobs": kind.jobs,
            "runs": runs,
            "median": {key: statistics.median(run[key] for run in runs) for key in runs[0]},
        }
    return found
