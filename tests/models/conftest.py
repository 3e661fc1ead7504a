"""Tiny models on disk, loaded once; a network that is not there; rows that arrive together."""

from __future__ import annotations

import shutil
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from deployments.settings import enforce_offline

enforce_offline()  # Before the first import of a hub library.

import tiny  # noqa: E402

from deployments.engine import Engine  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence
    from pathlib import Path

    from deployments.pipelines.base import Pipeline, Pixels, Row


class GatedPipeline:
    """A pipeline whose rows begin only once the gate opens, so that they arrive together."""

    def __init__(self, pipeline: Pipeline, gate: threading.Event) -> None:
        self._pipeline = pipeline
        self._gate = gate

    def begin(self, row: Row) -> None:
        assert self._gate.wait(60)
        self._pipeline.begin(row)

    def key(self, row: Row) -> Hashable:
        return self._pipeline.key(row)

    def step(self, rows: Sequence[Row]) -> None:
        self._pipeline.step(rows)

    def finish(self, row: Row) -> Pixels:
        return self._pipeline.finish(row)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("The network was touched.")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model, made when first asked for. Not to be changed."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("tiny") / name
            tiny.save(name, made[name])
        return made[name]

    return folder


@pytest.fixture
def own_folder(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny model's folder, to be damaged."""

    def folder(name: str) -> Path:
        return shutil.copytree(tiny_folder(name), tmp_path / name)

    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_folder: Callable[[str], Path]) -> Callable[..., Pipeline]:
    """Our pipeline over a tiny model, loaded once for each spec."""
    loaded: dict[str, Pipeline] = {}

    def pipeline(name: str, **changes: Any) -> Pipeline:
        spec = tiny.spec(name, tiny_folder(name), **changes)
        key = spec.model_dump_json()
        if key not in loaded:
            loaded[key] = tiny.pipeline(spec)
        return loaded[key]

    return pipeline


@pytest.fixture
def run_together() -> Callable[..., None]:
    """Run rows through an engine as if all had arrived at one moment; their futures are done."""

    def run(pipeline: Pipeline, rows: Sequence[Row], max_batch_size: int = 4) -> None:
        gate = threading.Event()
        engine = Engine(GatedPipeline(pipeline, gate), max_batch_size=max_batch_size)
        engine.put(rows)
        gate.set()
        engine.close(timeout_s=120)
        assert all(row.future.done() for row in rows)

    return run
