"""Prepared passes: filled up, replayed on static buffers, compiled; and what happens without."""

from __future__ import annotations

import random
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
import torch
from stock import as_row

from deployments.contract import BackgroundRequest, ComicRequest
from deployments.engine import passes as module
from deployments.engine.grouping import GroupLimits
from deployments.engine.passes import Passes, rows_of
from deployments.engine.preparation import Preparation
from deployments.loader import Loaded
from deployments.preparing import prepare, prepare_replica
from deployments.registry import ModelSpec
from deployments.settings import Settings, StoreSettings
from deployments.store.lockfile import Lock
from deployments.store.provider import Provider

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from deployments.engine.passes import Tensors

NAMES = ("sd_ddim", "sd_pndm", "refiner", "isnet")


class RerunsInsteadOfGraph:
    """Stands where a GPU is absent: repeats recorded work into the same output, as a graph would.

    Attributes:
        rows: of each recorded pass.
        room: passes of more rows find no room.
        replays: since the start.
    """

    def __init__(self, room: int = 100) -> None:
        self.rows: list[int] = []
        self.room = room
        self.replays = 0

    def record(self, work: Callable[[], torch.Tensor]) -> Any:
        with torch.inference_mode():
            output = work().clone()
        if len(output) > self.room:
            return None
        self.rows.append(len(output))

        def replay() -> None:
            self.replays += 1
            output.fill_(torch.nan)
            output.copy_(work())

        return replay, output

    def reserve(self, work: Callable[[], torch.Tensor]) -> None:
        work()


@pytest.fixture
def fresh(tiny_folder: Callable[[str], Any]) -> Callable[..., Any]:
    """A pipeline of its own, because preparing changes it."""

    def make(name: str, **changes: Any) -> Any:
        return tiny.pipeline(tiny.spec(name, tiny_folder(name), **changes))

    return make


@pytest.fixture
def prepared_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prepared pass is quicker than a plain one, as on a GPU."""
    times = iter([1.0, 2.0] * 1000)
    monkeypatch.setattr(module, "_seconds", lambda _: next(times))


def request_of(name: str) -> Any:
    if name == "isnet":
        return BackgroundRequest()
    return ComicRequest(steps=6, strength=0.7, guidance_scale=4.0, prompt="ink", seed=1)


def mixed_rows(pipeline: Any, name: str) -> list[Any]:
    rng = random.Random(3)
    requests = [
        request_of(name)
        if name == "isnet"
        else request_of(name).model_copy(
            update={"guidance_scale": rng.choice([1.0, 5.0]), "seed": i, "steps": 4 + i}
        )
        for i in range(5)
    ]
    return [as_row(pipeline, request, tiny.picture(i)) for i, request in enumerate(requests)]


def pictures(pipeline: Any, name: str, run_together: Callable[..., Any]) -> list[np.ndarray]:
    rows = mixed_rows(pipeline, name)
    run_together(pipeline, rows, 8, arrivals=[0, 0, 1, 2, 2])
    return [row.future.result().astype(int) for row in rows]


@pytest.mark.usefixtures("prepared_wins")
@pytest.mark.parametrize("name", NAMES)
def test_recorded_passes_give_the_pictures_of_plain_ones(
    name: str, fresh: Callable[..., Any], run_together: Callable[..., Any]
) -> None:
    """Rows of any parameters, filled up to the recorded numbers, over several passes."""
    pipeline, recorder = fresh(name), RerunsInsteadOfGraph()
    expected = pictures(pipeline, name, run_together)
    count = pipeline.prepare(Preparation(recorder=recorder), request_of(name), GroupLimits(4))
    assert recorder.rows == ([4, 2, 1] if name == "isnet" else [8, 4, 2, 1])
    assert count == max(recorder.rows)  # numbers between the recorded ones are filled up
    recorder.replays = 0
    found = pictures(pipeline, name, run_together)
    assert recorder.replays
    assert max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True)) <= 1


@pytest.mark.usefixtures("prepared_wins")
def test_a_network_sees_rows_and_filling_alike_and_outputs_survive_the_next_pass() -> None:
    seen: list[int] = []

    def network(tensors: Tensors) -> torch.Tensor:
        seen.append(rows_of(tensors))
        return tensors["x"] * 2 + tensors["t"].view(-1, 1)

    passes = Passes(network)
    example = {"x": torch.zeros(1, 3), "t": torch.zeros(1)}
    passes.prepare([example], [2, 4], recorder=RerunsInsteadOfGraph())
    for rows, taken in ((1, 2), (2, 2), (3, 4), (4, 4), (5, 5)):
        tensors = {"x": torch.randn(rows, 3), "t": torch.randn(rows)}
        seen.clear()
        output = passes(tensors)
        assert seen == [taken]
        torch.testing.assert_close(output, tensors["x"] * 2 + tensors["t"].view(-1, 1))


def test_filling_up_must_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows stay plain where a pass of four is slower than a plain one of three."""
    seen: list[int] = []

    def network(tensors: Tensors) -> torch.Tensor:
        seen.append(rows_of(tensors))
        return tensors["x"] + 1

    def seconds(work: Callable[[], Any]) -> float:
        seen.clear()
        work()
        return {1: 1.0, 2: 1.0, 3: 1.5, 4: 1.7}[seen[0]]

    recorder, passes = RerunsInsteadOfGraph(), Passes(network)
    monkeypatch.setattr(module, "_seconds", seconds)
    passes.prepare([{"x": torch.zeros(1, 2)}], [1, 2, 4], recorder=recorder)
    for rows in (1, 2, 3, 4):
        seen.clear()
        passes({"x": torch.zeros(rows, 2)})
        assert seen == [rows]


@pytest.mark.usefixtures("prepared_wins")
def test_without_room_for_a_graph_passes_run_plain(
    fresh: Callable[..., Any], run_together: Callable[..., Any]
) -> None:
    pipeline, recorder = fresh("sd_ddim"), RerunsInsteadOfGraph(room=2)
    expected = pictures(pipeline, "sd_ddim", run_together)
    pipeline.prepare(Preparation(recorder=recorder), request_of("sd_ddim"), GroupLimits(4))
    assert recorder.rows == [2, 1]
    found = pictures(pipeline, "sd_ddim", run_together)
    assert max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True)) <= 1


@pytest.mark.usefixtures("prepared_wins")
def test_a_size_outside_the_list_runs_plain(
    fresh: Callable[..., Any], run_together: Callable[..., Any]
) -> None:
    pipeline, recorder = fresh("sd_ddim", buckets=((64, 64), (128, 64))), RerunsInsteadOfGraph()
    pipeline._usual_sizes = lambda: [(64, 64)]
    pipeline.prepare(Preparation(recorder=recorder), request_of("sd_ddim"), GroupLimits(2))
    recorder.replays = 0
    row = as_row(pipeline, request_of("sd_ddim"), tiny.picture(0, 64, 128))
    run_together(pipeline, [row])
    assert row.future.result().shape == (64, 128, 3)
    assert not recorder.replays


@pytest.mark.usefixtures("prepared_wins")
def test_moving_the_weights_ends_prepared_passes(fresh: Callable[..., Any]) -> None:
    """A graph reads the weights where they were when it was recorded."""
    for name in NAMES:
        pipeline, recorder = fresh(name), RerunsInsteadOfGraph()
        pipeline.prepare(Preparation(recorder=recorder), request_of(name), GroupLimits(2))
        pipeline.to("cpu")
        passes = pipeline.passes if name == "isnet" else pipeline.denoiser.passes
        assert passes.prepared == 0


def test_a_failure_to_prepare_is_logged_and_passes_run_plain(
    tiny_folder: Callable[[str], Any],
    fresh: Callable[..., Any],
    run_together: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipeline = fresh("isnet")

    def fail(*_: object) -> int:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(pipeline, "prepare", fail)
    settings = Settings(device="cpu", store=StoreSettings(root=tmp_path))
    spec = tiny.spec("isnet", tiny_folder("isnet"), compile="full")
    loaded = Loaded(pipeline, "1" * 16, "cpu", None, ExitStack())
    provider = Provider(Lock(), settings.store, lambda _: None)
    prepare_replica(spec, loaded, GroupLimits(2), settings, provider)
    assert "none is locked" in caplog.text  # no compiled artefact either
    assert "could not be prepared" in caplog.text
    row = as_row(pipeline, request_of("isnet"), tiny.picture(0))
    run_together(pipeline, [row])
    assert row.future.result().shape == (64, 64)


@pytest.mark.parametrize(
    ("name", "mode"), [("isnet", "blocks"), ("srvgg", "full"), ("srvgg", "blocks")]
)
def test_a_family_is_not_compiled_in_a_way_it_does_not_have(name: str, mode: str) -> None:
    with pytest.raises(ValueError, match="compile"):
        tiny.spec(name, "/nowhere", compile=mode)


def test_a_bare_off_in_yaml_is_a_mode(tiny_folder: Callable[[str], Any]) -> None:
    assert tiny.spec("isnet", tiny_folder("isnet"), compile=False).compile == "off"
    assert ModelSpec.model_fields["compile"].default == "off"


# --- compiled: by torch's backend `eager`, because making kernels takes minutes on a CPU ---


@pytest.fixture
def compiled_only() -> Iterator[None]:
    """Forget afterwards what was compiled, and let torch compile again."""
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules
@pytest.mark.usefixtures("compiled_only")
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("isnet", "full"),
        ("refiner", "blocks"),
        pytest.param("sd_ddim", "full", marks=pytest.mark.slow),
    ],
)
def test_compiling_changes_no_picture_and_never_runs_in_a_request(
    name: str,
    mode: Any,
    tiny_folder: Callable[[str], Any],
    fresh: Callable[..., Any],
    run_together: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = fresh(name, **({"buckets": ((64, 64), (128, 64))} if name != "isnet" else {}))
    expected = pictures(pipeline, name, run_together)
    monkeypatch.setattr(module, "_GAIN", float("inf"))  # used even if it is slower here
    options: Any = {"mode": mode, "graph_bytes": None, "backend": "eager"}
    prepare(tiny.spec(name, tiny_folder(name)), pipeline, GroupLimits(4), **options)
    compiled = compilations()
    assert compiled
    pipeline_passes = pipeline.passes if name == "isnet" else pipeline.denoiser.passes
    assert pipeline_passes.prepared
    # From here on torch raises where it would compile, instead of running plain.
    torch.compiler.set_stance("fail_on_recompile")
    found = pictures(pipeline, name, run_together)
    assert max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True)) <= 1
    torch.compiler.set_stance("eager_on_recompile")
    if name != "isnet":  # of a size that was not prepared
        monkeypatch.setattr(pipeline, "_buckets", ((192, 64),))
        row = as_row(pipeline, request_of(name), tiny.picture(0, 64, 192))
        run_together(pipeline, [row])
        assert row.future.result().shape == (64, 192, 3)
    assert compilations() == compiled


def compilations() -> int:
    """Graphs that torch has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
