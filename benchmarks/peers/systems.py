"""The systems that are compared: how each is started, and how it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benchmarks.server import PEERS_BIN, System, imagen, ray_environment, serve_run
from deployments.settings import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OURS: Final = "g"
# BentoML and Triton need other versions of a few packages.
BENTOML_BIN: Final = ROOT / ".venv-peers/bentoml/bin"
TRITON_BIN: Final = ROOT / ".venv-peers/triton/bin"


def _module(name: str, port: int, binaries: Path = PEERS_BIN) -> list[str]:
    return [str(binaries / "python"), "-m", f"benchmarks.peers.{name}", str(port)]


def _bentoml(port: int, _: Path) -> list[str]:
    return [
        str(BENTOML_BIN / "bentoml"),
        "serve",
        "benchmarks.peers.bentoml_server:Gateway",
        "--host=127.0.0.1",
        f"--port={port}",
        f"--working-dir={ROOT}",
    ]


def _bentoml_environment(folder: Path) -> dict[str, str]:
    return {"BENTOML_HOME": str(folder), "BENTOML_DO_NOT_TRACK": "True"}


def _ray_peer(module: str) -> Callable[[int, Path], list[str]]:
    def command(port: int, folder: Path) -> list[str]:
        application = {"name": module, "import_path": f"benchmarks.peers.{module}:app"}
        return serve_run(PEERS_BIN / "serve", [application], port, folder)

    return command


SYSTEMS: Final = {
    "a": System("old worker loop", lambda port, _: _module("old_worker", port)),
    "b": System("Ray Serve, as its example", _ray_peer("ray_example"), environment=ray_environment),
    "c": System("Ray @serve.batch", _ray_peer("ray_batch"), environment=ray_environment),
    "d": System("LitServe", lambda port, _: _module("litserve_server", port), ready="/health"),
    "e": System("BentoML", _bentoml, warm_up_rounds=12, environment=_bentoml_environment),
    "f": System(
        "Triton",
        lambda port, folder: [*_module("triton_server", port, TRITON_BIN), str(folder)],
        ready="/v2/health/ready",
        target={"protocol": "kserve", "shape": [1, 1]},
    ),
    "h": imagen("Imagen, one thread", args={"torch_threads": 1}),
    "i": imagen("Imagen, exact", user_config={"determinism": "exact"}),
    OURS: imagen(),
}
