"""`imagen jobs`: the queue, and jobs that failed although nothing was wrong with them."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.config import clients_of, settings_of
from cli.console import Output, make_table
from cli.ending import ending
from deployments.errors import ConfigError, JobsUnavailable, NoSuchJob
from deployments.settings import ClientSettings
from deployments.tasks import Task
from serve_app.jobs.connection import RedisLink, connect, url_of_environment
from serve_app.jobs.record import timestamp
from serve_app.jobs.service import open_jobs
from serve_app.jobs.signals import Signals

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from deployments.settings import JobSettings
    from serve_app.jobs.record import Job
    from serve_app.jobs.service import Jobs

jobs_app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="The queue of jobs."
)
dead_app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Jobs that lost their worker or their model each time they were tried.",
)
jobs_app.add_typer(dead_app, name="dead")
Config = Annotated[Path, typer.Option("--config", help="The Serve config file of the application")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout")]
_DEFAULT = Path("configs/local.yaml")


@jobs_app.command("depth")
def depth(config: Config = _DEFAULT, as_json: AsJson = False) -> None:
    """Show how many jobs of each task wait and run, and how long the oldest has waited."""
    output = Output(as_json=as_json)
    with ending(output):
        found = asyncio.run(_depth(config))
    table = make_table("Task", "Waiting", "Running", "Oldest waits")
    for task, (waiting, running, oldest_s) in found.items():
        table.add_row(str(task), str(waiting), str(running), f"{oldest_s:.0f} s" if waiting else "")
    output.show(table)
    output.emit(
        {
            str(task): {"waiting": waiting, "running": running, "oldest_s": round(oldest_s, 1)}
            for task, (waiting, running, oldest_s) in found.items()
        }
    )


@dead_app.command("list")
def list_dead(config: Config = _DEFAULT, as_json: AsJson = False) -> None:
    """Show the last 100, newest first."""
    output = Output(as_json=as_json)
    with ending(output):
        found = asyncio.run(_dead(config))
    table = make_table("Id", "Task", "Key", "Ended", "Attempts", "Why")
    for job in found:
        why = (job.error or {}).get("fact", "")
        ended = timestamp(job.ended_s) or ""
        attempts = str(job.attempts)
        table.add_row(job.spec.job_id, job.spec.task, job.spec.owner, ended, attempts, why)
    output.show(table if found else "There are no dead letters.")
    output.emit(
        {
            "jobs": [
                {
                    "job_id": job.spec.job_id,
                    "task": str(job.spec.task),
                    "owner": job.spec.owner,
                    "ended_at": timestamp(job.ended_s),
                    "attempts": job.attempts,
                    "error": job.error,
                }
                for job in found
            ]
        }
    )


@dead_app.command("requeue")
def requeue(
    job_id: Annotated[str, typer.Argument(help="From `imagen jobs dead list`")],
    config: Config = _DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Queue a dead job anew, as a new job of the same key."""
    output = Output(as_json=as_json)
    with ending(output):
        new_id = asyncio.run(_requeue(config, job_id))
    output.show(f"Job {new_id} is queued.")
    output.emit({"job_id": new_id, "retry_of": job_id})


async def _depth(config: Path) -> dict[Task, tuple[int, int, float]]:
    async with _open(config) as jobs:
        return await jobs.queue.depth()


async def _dead(config: Path) -> list[Job]:
    async with _open(config) as jobs:
        return await jobs.queue.dead()


async def _requeue(config: Path, job_id: str) -> str:
    async with _open(config) as jobs:
        job = await jobs.queue.get(job_id)
        if job is None:
            raise NoSuchJob(
                "There is no such job.", value=job_id, remedy="See `imagen jobs dead list`."
            )
        made = await jobs.retry(
            job.spec.owner, job_id, "imagen jobs", idempotency_key=f"requeue {job_id}"
        )
        await jobs.queue.bury(job_id)
        return made.job_id


@asynccontextmanager
async def _open(config: Path) -> AsyncGenerator[Jobs]:
    settings, clients = settings_of(config).jobs, clients_of(config) or ClientSettings()
    url = url_of_environment() or await _own_url(settings)

    async def found() -> str:
        return url

    link = RedisLink(found)
    await link.refresh()
    try:
        yield open_jobs(link, Signals(link, settings.namespace), settings, clients.jobs)
    finally:
        await link().aclose()


async def _own_url(settings: JobSettings) -> str:
    """The Redis that the application on this machine runs.

    Raises:
        JobsUnavailable: it runs none.
        ConfigError: several applications run one.
    """
    known = [_address(place) for place in settings.place.glob("redis/*/server.json")]
    found = [url for url in known if await _answers(url)]
    if not found:
        raise JobsUnavailable(
            "No Redis of jobs runs here.",
            value="no answer",
            remedy="Start the application, or set REDIS_URL.",
        )
    if len(found) > 1:
        raise ConfigError(
            "Several applications keep jobs on this machine.",
            value=len(found),
            remedy="Set REDIS_URL; the files redis/*/server.json in the folder of jobs have"
            " ports and passwords.",
        )
    return found[0]


def _address(place: Path) -> str:
    try:
        address: Any = json.loads(place.read_text(encoding="utf-8"))
        return f"redis://:{address['password']}@127.0.0.1:{int(address['port'])}/0"
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # of a server that was stopped while it wrote the file


async def _answers(url: str) -> bool:
    if not url:
        return False
    redis = connect(url, timeout_s=1)
    try:
        async with asyncio.timeout(1):
            return bool(await redis.ping())  # pyright: ignore[reportGeneralTypeIssues]
    except Exception:  # whatever it says, it is not ours
        return False
    finally:
        await redis.aclose()
