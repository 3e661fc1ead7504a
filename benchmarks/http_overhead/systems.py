"""The servers of the benchmark: Imagen in each way Serve can carry a request, and LitServe.

    python -m benchmarks.http_overhead.systems litserve PORT

runs LitServe in the peers' environment, with the background model alone.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Final

import typer

from benchmarks.server import PEERS_BIN, System, imagen
from deployments.tasks import Task

TASK: Final = Task.BACKGROUND
LITSERVE: Final = ("litserve", "litserve unbatched")
_ASLEEP: Final = tuple(task.deployment for task in Task if task.needs_picture and task is not TASK)
_GRPC: Final = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**28),  # Ray's own limit is 4 MiB
}
VARIANTS: Final[dict[str, dict[str, str]]] = {
    "default": {},
    "grpc handles": _GRPC | {"RAY_SERVE_PROXY_USE_GRPC": "0"},
    "grpc everywhere": _GRPC,
}
"""The environment of `serve run` by variant. Imagen itself sets none of it."""


def ours(variant: str) -> System:
    """Imagen as in configs/local.yaml, with the other four models asleep.

    Args:
        variant: a key of `VARIANTS`.
    """
    return imagen(f"Imagen, {variant}", asleep=_ASLEEP, environment=VARIANTS[variant])


def litserve(name: str) -> System:
    """LitServe with the background model; `name` is one of `LITSERVE`."""
    command = [str(PEERS_BIN / "python"), "-m", "benchmarks.http_overhead.systems", name]
    return System(name, lambda port, _: [*command, str(port)], ready="/health")


if find_spec("litserve"):  # only in the peers' environment
    from benchmarks.peers import litserve_server

    class Unbatched(litserve_server.Api):
        """LitServe at its quickest for one client: it forms no batches and waits for no window."""

        def __init__(self, path: str, task: Task) -> None:
            super().__init__(path, task)
            self.max_batch_size = 1
            self.batch_timeout = 0.0

        # Without batches LitServe passes one upload rather than a list.
        def predict(self, uploads: Any) -> Any:
            return super().predict([uploads])[0]

    def main(name: str, port: int) -> None:
        """Serve until stopped."""
        server: Any = litserve_server
        if name == LITSERVE[1]:
            server.Api = Unbatched
        server.TASKS = {path: task for path, task in server.TASKS.items() if task is TASK}
        server.main(port)

    if __name__ == "__main__":
        typer.run(main)
