"""Tiny models on disk, loaded once; a network that is not there; rows that arrive together."""

from __future__ import annotations

import shutil
import socket
from typing import TYPE_CHECKING, Any

import pytest

from deployments.settings import enforce_offline

enforce_offline()  # Before the first import of a hub library.

import tiny  # noqa: E402
import torch  # noqa: E402
from gathering import Gathering  # noqa: E402
from stock import as_row  # noqa: E402

from deployments.engine.grouping import GroupLimits  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from deployments.engine.pipeline import AnyPipeline
    from deployments.engine.row import Row
    from deployments.images import Picture

# An engine's two threads with a pool of threads each would wait for each other most of the time.
torch.set_num_threads(1)


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
def tiny_pipeline(tiny_folder: Callable[[str], Path]) -> Callable[..., AnyPipeline]:
    """Our pipeline over a tiny model, loaded once for each spec."""
    loaded: dict[str, AnyPipeline] = {}

    def pipeline(name: str, **changes: Any) -> AnyPipeline:
        spec = tiny.spec(name, tiny_folder(name), **changes)
        key = spec.model_dump_json()
        if key not in loaded:
            loaded[key] = tiny.pipeline(spec)
        return loaded[key]

    return pipeline


@pytest.fixture(scope="session")
def stock(tiny_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """The stock pipeline over a tiny model, loaded as its documentation says."""
    loaded: dict[str, Any] = {}

    def pipeline(name: str) -> Any:
        if name not in loaded:
            loaded[name] = tiny.STOCK[name].from_pretrained(tiny_folder(name))
            loaded[name].set_progress_bar_config(disable=True)
        return loaded[name]

    return pipeline


@pytest.fixture
def run_together() -> Callable[..., list[list[Row]]]:
    """Run rows through an engine, by default as if all arrived at one moment; returns the groups.

    `arrivals` says after how many steps each row comes. All futures are done afterwards.
    """

    def run(
        pipeline: AnyPipeline,
        rows: Sequence[Row],
        max_batch_size: int = 4,
        *,
        arrivals: Sequence[int] | None = None,
        exact: bool = False,
    ) -> list[list[Row]]:
        gathering = Gathering(pipeline, GroupLimits(max_batch_size, exact=exact))
        gathering.run(rows, [0] * len(rows) if arrivals is None else arrivals)
        return gathering.groups

    return run


@pytest.fixture
def process(run_together: Callable[..., Any]) -> Callable[..., Picture]:
    """From a picture to the result, as a model replica does it."""

    def run(pipeline: AnyPipeline, picture: Picture, request: Any) -> Picture:
        row = as_row(pipeline, request, picture)
        run_together(pipeline, [row])
        return pipeline.restore(row.future.result(), picture, request)

    return run
