"""A request through a model deployment, without Serve."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from deployments import images
from deployments.admission import Admission
from deployments.contract import ComicRequest, ImageJob, JobProgress
from deployments.engine.engine import Engine
from deployments.engine.pipeline import Work
from deployments.estimate import Estimator, Forecast
from deployments.images import Picture
from deployments.model import ModelDeployment
from deployments.seats import Seats
from deployments.settings import LimitSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Iterator, Sequence

    from deployments.engine.row import Pixels, RowInput

SIDE_PX = 8


class TextToImage:
    """A family that needs no picture: one grey level a seed, after two steps."""

    def fit(self, picture: Picture | None, request: ComicRequest) -> Pixels:
        assert picture is None
        return np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8)

    def work(self, width_px: int, height_px: int, request: ComicRequest) -> Work:
        return Work(2, SIDE_PX**2, SIDE_PX**2)

    def cost_px(self, row: RowInput[ComicRequest]) -> int:
        return SIDE_PX**2

    def begin(self, row: RowInput[ComicRequest]) -> Generator[None, None, Pixels]:
        yield
        return row.pixels + np.uint8(row.seed % 256)

    def steps(self, state: Pixels) -> int:
        return 2

    def key(self, state: Pixels) -> tuple[int, ...]:
        return state.shape

    def step(self, states: Sequence[Pixels]) -> None:
        for state in states:
            state += 1

    def finish(self, state: Pixels) -> Generator[None, None, Pixels]:
        yield
        return state

    def restore(self, output: Pixels, picture: Picture | None, request: ComicRequest) -> Picture:
        assert picture is None
        return Picture(output, None)

    def to(self, device: str) -> None:
        pass


class FakeWork:
    """Metrics, and the outcomes among them."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []

    def count_request(self, outcome: str) -> None:
        self.outcomes.append(outcome)

    def set_in_flight(self, requests: int) -> None:
        pass

    def record_picture(self, timings_s: dict[str, float], gpu_seconds: float) -> None:
        assert set(timings_s) == {"decode", "queue", "denoise", "vae", "encode"}


class FakeHost:
    """Serves one pipeline."""

    def __init__(self, pipeline: Any) -> None:
        self.work = FakeWork()
        engine = Engine(pipeline)
        estimator = Estimator(pipeline, Forecast(engine.pace), scale=1)
        loaded = SimpleNamespace(digest="d" * 16, device="cpu")
        self.served = SimpleNamespace(
            pipeline=pipeline, engine=engine, estimator=estimator, loaded=loaded
        )

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Any]:
        yield self.served

    def close(self) -> None:
        self.served.engine.close()


class Deployment(ModelDeployment):
    """A model deployment of a fake host."""

    def __init__(self, pipeline: Any) -> None:
        self._spec: Any = SimpleNamespace(
            name="text-to-image",
            task=SimpleNamespace(source_type="compositeWithTrainedAlgorithmicMedia"),
            parameters=frozenset({"prompt", "seed", "steps", "strength"}),
            scale=1,
            num_gpus=0,
            buckets=(),
            max_tiles=128,
        )
        self._pool = ThreadPoolExecutor(1)
        self._seats = Seats(8, 2**20)
        self._defaults: dict[str, Any] = {}
        self._in_flight = 0
        self._streams: dict[str, Any] = {}
        self._host: Any = FakeHost(pipeline)
        self._admission = Admission()
        self._signing = None

    async def _admission_window(self, row: Any) -> None:  # Serve's batching needs a replica
        engine, one = row
        engine.put([one])


@pytest.fixture
def deployment() -> Iterator[Deployment]:
    made = Deployment(TextToImage())
    yield made
    made._host.close()


async def test_a_job_without_a_picture_is_carried_through(deployment: Deployment) -> None:
    request = ComicRequest(prompt="a fox", seed=40, steps=2, strength=1.0)
    for _ in range(2):  # the second one is estimated from the first
        job = ImageJob(request, None, "png", timeout_s=60, width_px=0, height_px=0)
        result = await deployment(job)
        picture = images.decode(result.image, LimitSettings())
        assert (picture.rgb == 42).all()
        assert (result.width_px, result.height_px, result.seed) == (SIDE_PX, SIDE_PX, 40)
        assert result.model == "text-to-image@" + "d" * 16
        assert result.batch_size == 1
    assert deployment._host.work.outcomes == ["ok", "ok"]


class HeldUp(TextToImage):
    """The first row waits in front of its steps."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.stepped = 0

    def begin(self, row: RowInput[ComicRequest]) -> Generator[None, None, Pixels]:
        self.may.wait(30)
        yield
        return row.pixels + np.uint8(row.seed)

    def step(self, states: Sequence[Pixels]) -> None:
        self.stepped += len(states)
        super().step(states)


async def test_a_job_that_comes_again_ends_the_run_whose_caller_died() -> None:
    pipeline = HeldUp()
    deployment = Deployment(pipeline)
    request = ComicRequest(prompt="a fox", seed=40, steps=2, strength=1.0)
    job = ImageJob(request, None, "png", timeout_s=60, job_id="a" * 32)
    try:
        orphan, again = deployment.stream(job), deployment.stream(job)
        assert await anext(orphan) == JobProgress(0, 0)
        assert await anext(again) == JobProgress(0, 0)
        pipeline.may.set()
        *_, results = [told async for told in again]
        assert isinstance(results, tuple)
        assert (images.decode(results[0].image, LimitSettings()).rgb == 42).all()
        with pytest.raises(asyncio.CancelledError):
            await anext(orphan)
        assert pipeline.stepped == 2
        assert deployment._streams == {}
    finally:
        pipeline.may.set()
        deployment._host.close()


class Gathered(TextToImage):
    """Takes no step before three rows are there, and keeps how many rows each step had."""

    def __init__(self) -> None:
        self.groups: list[int] = []
        self._all_begun = threading.Barrier(2)
        self._count = 0

    def begin(self, row: RowInput[ComicRequest]) -> Generator[None, None, Pixels]:
        yield
        self._count += 1
        if self._count == 3:
            self._all_begun.wait(30)
        return row.pixels + np.uint8(row.seed)

    def steps(self, state: Pixels) -> int:
        return 8

    def step(self, states: Sequence[Pixels]) -> None:
        if not self.groups:
            self._all_begun.wait(30)
        self.groups.append(len(states))
        super().step(states)


async def test_the_results_of_a_job_are_rows_that_may_share_passes() -> None:
    pipeline = Gathered()
    deployment = Deployment(pipeline)
    request = ComicRequest(prompt="a fox", seed=40, steps=8, strength=1.0)
    try:
        job = ImageJob(request, None, "png", timeout_s=60, n=3)
        *_, results = [told async for told in deployment.stream(job)]
        assert isinstance(results, tuple)
        assert [one.seed for one in results] == [40, 41, 42]
        assert sum(pipeline.groups) == 3 * 8
        assert max(pipeline.groups) > 1  # once the engine has timed rows alone
    finally:
        deployment._host.close()
