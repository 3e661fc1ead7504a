"""What Serve's controller takes of a core, by the number of replicas that it looks after."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from benchmarks.server import (
    OUR_BIN,
    System,
    cpu_s,
    process_title,
    ray_environment,
    running,
    serve_run,
)

if TYPE_CHECKING:
    from pathlib import Path

    import psutil

COUNTS: Final = (1, 12, 24)
_SETTLE_S: Final = 10
_WATCH_S: Final = 30
_START_S: Final = 240


def system(replicas: int) -> System:
    """Serve with so many replicas that do nothing."""

    def command(port: int, folder: Path) -> list[str]:
        made: dict[str, Any] = {
            "name": "idle",
            "route_prefix": "/",
            "import_path": "benchmarks.growth.idle_app:build",
            "args": {"replicas": replicas},
        }
        return serve_run(OUR_BIN / "serve", [made], port, folder)

    return System(f"{replicas} idle replicas", command, ready="/", environment=ray_environment)


def measure(replicas: int) -> float:
    """The controller's share of a core while nothing happens."""
    with running(system(replicas)) as server:
        end_s = time.monotonic() + _START_S
        while len(_found(server.process, "ServeReplica:idle:Idle")) < replicas:
            if time.monotonic() > end_s:
                raise TimeoutError(f"{replicas} replicas did not start.")
            time.sleep(1)
        time.sleep(_SETTLE_S)
        (controller,) = _found(server.process, "ServeController")
        before_s = cpu_s(controller)
        time.sleep(_WATCH_S)
        return (cpu_s(controller) - before_s) / _WATCH_S


def _found(process: psutil.Process, title: str) -> list[psutil.Process]:
    children = process.children(recursive=True)
    return [child for child in children if process_title(child).startswith(title)]
