"""One Ray with everything that is measured over HTTP, behind one proxy.

| prefix | application |
|---|---|
| / | Imagen with the background model awake, for the overhead of a job |
| /accepting | Imagen without a worker and with every model asleep, for the rate of accepted jobs |
| /baseline | reads and checks uploads, and throws them away |
| /celery | the same jobs by Celery |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import yaml

from benchmarks.jobs.clients import TASK
from benchmarks.server import LOCAL_CONFIG, OUR_BIN, System, ray_environment, serve_run
from deployments.settings import ROOT
from deployments.tasks import Task

if TYPE_CHECKING:
    from pathlib import Path

CELERY_BIN: Final = ROOT / ".venv-celery/bin"
"""Its packages are those of .venv, and Celery."""
_ASLEEP: Final = {"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1}


def system(redis: str, *, celery: bool) -> System:
    """All applications, with this Redis.

    Args:
        redis: URL of the Redis that they share.
        celery: whether Celery is installed, and measured.
    """

    def command(port: int, folder: Path) -> list[str]:
        every = {task.deployment for task in Task if task.needs_picture}
        applications = [
            _imagen("imagen", "/", every - {TASK.deployment}),
            _imagen("accepting", "/accepting", every | {"JobWorker"}),
            _other("baseline"),
        ]
        if celery:
            applications.append(_other("celery"))
        python = (CELERY_BIN if celery else OUR_BIN) / "python"
        _, *words = serve_run(OUR_BIN / "serve", applications, port, folder)
        return [str(python), "-m", "ray.serve.scripts", *words]

    def variables(folder: Path) -> dict[str, str]:
        # As `imagen run` sets it, with a folder of jobs of its own.
        return ray_environment(folder) | {
            "MALLOC_ARENA_MAX": "1",
            "REDIS_URL": redis,
            "IMAGEN_JOBS": str(folder / "jobs"),
        }

    return System("Imagen with jobs", command, environment=variables)


def _imagen(name: str, prefix: str, asleep: set[str]) -> dict[str, Any]:
    made = yaml.safe_load(LOCAL_CONFIG.read_text(encoding="utf-8"))["applications"][0]
    made |= {"name": name, "route_prefix": prefix}
    made["args"]["jobs"] = {"namespace": name}
    for deployment in made["deployments"]:
        if deployment["name"] == "Ingress":
            deployment["user_config"]["jobs"] = {"max_queued": 1_000_000}
        deployment |= {"autoscaling_config": _ASLEEP} if deployment["name"] in asleep else {}
    worker = _ASLEEP if "JobWorker" in asleep else {"min_replicas": 1, "max_replicas": 1}
    made["deployments"].append({"name": "JobWorker", "autoscaling_config": worker})
    return made


def _other(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": f"benchmarks.jobs.{name}_app:build",
    }
