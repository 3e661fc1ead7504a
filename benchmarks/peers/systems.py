"""The systems that are compared: how each is started, and how it wants to be asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import yaml

from deployments.settings import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OURS: Final = "g"
PEERS_BIN: Final = ROOT / ".venv-peers/bin"
# Each has a few packages that do not go with those of the others.
BENTOML_BIN: Final = ROOT / ".venv-peers/bentoml/bin"
TRITON_BIN: Final = ROOT / ".venv-peers/triton/bin"
OUR_BIN: Final = ROOT / ".venv/bin"
# Torch's threads otherwise spin while they wait for each other: several models on a few cores then
# take ten times as long, in every system alike.
CALM: Final = {"OMP_WAIT_POLICY": "PASSIVE"}
Values = dict[str, Any]
_LOCAL: Final = ROOT / "configs/local.yaml"


@dataclass(frozen=True)
class System:
    """A server to compare.

    Attributes:
        title: in tables.
        command: from the port and an empty folder of its own.
        ready: path that answers 200 once every model is loaded.
        target: of a load plan, beside the URL.
        warm_up_rounds: requests of each model before anything is measured.
        environment: variables beside ours, from its folder.
    """

    title: str
    command: Callable[[int, Path], list[str]]
    ready: str = "/readyz"
    target: dict[str, Any] = field(default_factory=dict[str, Any])
    warm_up_rounds: int = 3
    environment: Callable[[Path], dict[str, str]] = lambda _: {}


def _module(name: str, port: int, binaries: Path = PEERS_BIN) -> list[str]:
    return [str(binaries / "python"), "-m", f"benchmarks.peers.{name}", str(port)]


def _old_worker(port: int, _: Path) -> list[str]:
    return _module("old_worker", port)


def _litserve(port: int, _: Path) -> list[str]:
    return _module("litserve_server", port)


def _triton(port: int, folder: Path) -> list[str]:
    return [*_module("triton_server", port, TRITON_BIN), str(folder)]


def _bentoml(port: int, _: Path) -> list[str]:
    return [
        str(BENTOML_BIN / "bentoml"),
        "serve",
        "benchmarks.peers.bentoml_server:Gateway",
        "--host=127.0.0.1",
        f"--port={port}",
        f"--working-dir={ROOT}",
    ]


def _ray_peer(module: str) -> Callable[[int, Path], list[str]]:
    def command(port: int, folder: Path) -> list[str]:
        application = {"name": module, "import_path": f"benchmarks.peers.{module}:app"}
        return _serve_run(PEERS_BIN / "serve", [application], port, folder)

    return command


def _ours(
    settings: Values | None = None, tuning: Values | None = None
) -> Callable[[int, Path], list[str]]:
    """`imagen run` does the same, but would join a Ray that runs on this machine already.

    Args:
        settings: over the `args` of configs/local.yaml.
        tuning: over the `user_config` of every model.
    """

    def command(port: int, folder: Path) -> list[str]:
        applications = yaml.safe_load(_LOCAL.read_text(encoding="utf-8"))["applications"]
        applications[0]["args"] |= settings or {}
        for deployment in applications[0]["deployments"]:
            if "user_config" in deployment:
                deployment["user_config"] |= tuning or {}
        return _serve_run(OUR_BIN / "serve", applications, port, folder)

    return command


def _serve_run(
    serve: Path, applications: list[dict[str, Any]], port: int, folder: Path
) -> list[str]:
    """`serve run` with a Ray of its own, as configs/local.yaml but for port and applications."""
    config = yaml.safe_load(_LOCAL.read_text(encoding="utf-8"))
    config["http_options"]["port"] = port
    config["applications"] = applications
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [str(serve), "run", "--address=local", f"--app-dir={ROOT}", str(file)]


def ray_environment(folder: Path) -> dict[str, str]:
    """A Ray and a model store of its own."""
    return {
        "RAY_TMPDIR": str(folder / "ray"),
        "RAY_ADDRESS": "local",
        "IMAGEN_MODELS": str(folder / "models"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _our_environment(folder: Path) -> dict[str, str]:
    return ray_environment(folder) | {"MALLOC_ARENA_MAX": "1"}  # as `imagen run`


def _bentoml_environment(folder: Path) -> dict[str, str]:
    return {"BENTOML_HOME": str(folder), "BENTOML_DO_NOT_TRACK": "True"}


SYSTEMS: Final = {
    "a": System("old worker loop", _old_worker),
    "b": System("Ray Serve, as its example", _ray_peer("ray_example"), environment=ray_environment),
    "c": System("Ray @serve.batch", _ray_peer("ray_batch"), environment=ray_environment),
    "d": System("LitServe", _litserve, ready="/health"),
    "e": System("BentoML", _bentoml, warm_up_rounds=12, environment=_bentoml_environment),
    "f": System(
        "Triton",
        _triton,
        ready="/v2/health/ready",
        target={"protocol": "kserve", "shape": [1, 1]},
    ),
    "h": System("Imagen, one thread", _ours({"torch_threads": 1}), environment=_our_environment),
    "i": System(
        "Imagen, exact", _ours(tuning={"determinism": "exact"}), environment=_our_environment
    ),
    OURS: System("Imagen", _ours(), environment=_our_environment),
}
