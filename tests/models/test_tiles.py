"""Large pictures at full detail: tiles that are rows like any other, and one picture of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
import torch
from gathering import Together
from test_model import Deployment

from deployments import images
from deployments.catalogue import load_registry
from deployments.contract import ComicRequest, EnhanceRequest, ImageJob, JobProgress
from deployments.engine.engine import Engine
from deployments.engine.grouping import GroupLimits
from deployments.engine.row import RowInput
from deployments.images import Picture
from deployments.loader import build
from deployments.making import Making
from deployments.pipelines.noise import NoiseField
from deployments.seats import Seats
from deployments.settings import LimitSettings, Settings
from deployments.store.folder_bucket import local_folder
from deployments.tasks import Task
from deployments.tiling import Grid, tiles_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deployments.engine.grouping import Pass
    from deployments.engine.pipeline import AnyPipeline
    from deployments.engine.row import Pixels, Row

BUCKETS = ((64, 64), (128, 64))
FULL = ComicRequest(steps=2, strength=1.0, guidance_scale=1.0, seed=7, detail="full")
FIELDS: dict[str, Any] = {"steps": 4, "guidance_scale": 1.0, "seed": 1}
SINGLE = FULL.model_copy(update={"detail": "working", "seed": 8})


class Run:
    """An engine that takes rows together, whether that gains or not."""

    def __init__(self, pipeline: AnyPipeline, most: int = 4) -> None:
        self.passes: list[list[Row]] = []
        self.most_inside = 0
        limits = GroupLimits(most)
        self._engine: Any = None
        self._engine = self.engine = Engine(
            pipeline, limits, pace=Together(), on_pass=self._on_pass
        )
        self._pipeline: Any = pipeline
        self._ahead = 2 * most

    def _on_pass(self, done: Pass) -> None:
        self.passes.append(list(done.rows))
        self.most_inside = max(self.most_inside, len(self._engine._unresolved))

    def making(self, picture: Picture, request: Any) -> Making:
        size = picture.width_px, picture.height_px
        grid = tiles_of(request, *size, self._pipeline._buckets)
        pixels = picture.rgb if grid else self._pipeline.fit(picture, request)
        return Making(RowInput(request, pixels, request.seed, time.monotonic() + 60), grid, 2)

    async def outputs(self, makings: Sequence[Making]) -> list[Pixels]:
        tiled = len(makings[0].rows) > 1

        async def put(row: Row) -> None:
            while tiled and row.input.place is None and not self.passes:
                await asyncio.sleep(0.001)  # others come once tiles have begun
            self.engine.put([row])

        async def on_pool(work: Any, *args: Any) -> Any:
            return await asyncio.to_thread(work, *args)

        return await asyncio.gather(*(m.output(put, self._ahead, on_pool) for m in makings))

    def results(self, pictures: Sequence[Picture], requests: Sequence[Any]) -> list[Pixels]:
        makings = [self.making(*pair) for pair in zip(pictures, requests, strict=True)]
        try:
            outputs = asyncio.run(self.outputs(makings))
        finally:
            self.engine.close()
        trio = zip(outputs, pictures, requests, strict=True)
        return [self._pipeline.restore(*one).rgb for one in trio]


@pytest.fixture
def comic(tiny_pipeline: Callable[..., AnyPipeline]) -> AnyPipeline:
    return tiny_pipeline("sd_ddim", buckets=BUCKETS)


# --- one tile, and many ---


@pytest.mark.parametrize("size", [(64, 64), (40, 60), (64, 128), (17, 90)])
def test_a_picture_that_fits_a_bucket_is_the_same_to_the_bit(
    size: tuple[int, int], comic: AnyPipeline
) -> None:
    picture = tiny.picture(1, *size)
    working = FULL.model_copy(update={"detail": "working"})
    one, other = (Run(comic).results([picture], [request])[0] for request in (FULL, working))
    assert (one == other).all()


def test_tiles_share_passes_with_each_other_and_with_other_requests(comic: AnyPipeline) -> None:
    run = Run(comic)
    long = SINGLE.model_copy(update={"steps": 60})  # so that tiles begin meanwhile
    run.results([tiny.picture(1, 200, 260), tiny.picture(2)], [FULL, long])
    sizes = Counter(map(len, run.passes))
    rows = sum(rows * passes for rows, passes in sizes.items())
    assert rows == 20 * 2 + 60
    assert sizes[4] >= 3
    mixed = [{row.input.place is None for row in group} for group in run.passes]
    assert {True, False} in mixed


def test_few_tiles_are_in_the_engine_at_a_time(comic: AnyPipeline) -> None:
    run = Run(comic, most=2)
    making = run.making(tiny.picture(1, 300, 300), FULL)
    assert len(making.rows) > 12
    asyncio.run(run.outputs([making]))
    run.engine.close()
    assert run.most_inside <= 2 * 2 + 2  # the engine may not have let go of one that is done
    assert all(row.state is None for row in making.rows)


def test_a_seed_gives_the_same_picture_in_any_company(comic: AnyPipeline) -> None:
    """However the tiles and the others come together."""
    picture, others = tiny.picture(1, 110, 150), [tiny.picture(n) for n in range(4)]
    alone = Run(comic, most=1).results([picture], [FULL])[0].astype(int)
    for most in (3, 4):
        mixed = Run(comic, most).results([picture, *others], [FULL] + [SINGLE] * 4)[0]
        assert np.abs(mixed - alone).max() <= 1
    other_seed = FULL.model_copy(update={"seed": 9})
    assert (Run(comic).results([picture], [other_seed])[0] != alone).mean() > 0.5


def test_a_picture_that_is_given_up_leaves_the_engine(comic: AnyPipeline) -> None:
    run = Run(comic, most=1)
    making = run.making(tiny.picture(1, 500, 500), FULL)

    async def give_up() -> None:
        work = asyncio.ensure_future(run.outputs([making]))
        while len(run.passes) < 3:
            await asyncio.sleep(0.001)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        making.cancel()

    asyncio.run(give_up())
    assert run.engine.wait_idle(30)
    run.engine.close()
    assert len(run.passes) < 20 < making.steps


def test_the_work_of_tiles_is_estimated_as_what_it_is(comic: AnyPipeline) -> None:
    run = Run(comic)
    run.results([tiny.picture(1, 200, 260)], [FULL])
    work = comic.work(260, 200, FULL)
    assert work.steps == sum(map(len, run.passes)) == 20 * 2
    assert (work.step_px, work.stage_px) == (64 * 64, 20 * 64 * 64)


# --- what tiles agree on ---


@pytest.mark.parametrize(("left", "top"), [(0, 0), (40, 8), (64, 128), (100, 63)])
def test_the_noise_of_a_tile_is_a_part_of_one_field(left: int, top: int) -> None:
    def draws(left: int, top: int, height: int, width: int) -> list[torch.Tensor]:
        field = NoiseField(3, "float32", left, top)
        return [field.draw((1, 4, height, width), torch.float32, "cpu") for _ in range(2)]

    whole, tile = draws(0, 0, 220, 200), draws(left, top, 80, 90)
    for field, part in zip(whole, tile, strict=True):
        assert torch.equal(part, field[:, :, top : top + 80, left : left + 90])
        assert abs(field.mean()) < 0.02
        assert abs(field.std() - 1) < 0.02
    assert not torch.equal(*whole)
    other = NoiseField(4, "float32", left, top).draw((1, 4, 80, 90), torch.float32, "cpu")
    assert abs(float((other * tile[0]).mean())) < 0.05


def starter(task: Task, side_px: int) -> AnyPipeline:
    spec = load_registry(Path("configs/models/starter.yaml"))[task]
    spec = spec.model_copy(update={"buckets": ((side_px, side_px),)})
    return build(spec, local_folder(spec.origins[0].source), Settings(device="cpu"))


@pytest.mark.parametrize(
    ("task", "request_"),
    [
        (Task.ENHANCE, EnhanceRequest(strength=0.5, **FIELDS)),
        (Task.COMIC, ComicRequest(strength=0.75, detail="full", **FIELDS)),
    ],
)
def test_no_seam_at_the_border_of_tiles(task: Task, request_: Any) -> None:
    """A smooth gradient stays as smooth where tiles meet as it is within them."""
    side_px, width, height = 128, 340, 230
    y, x = np.mgrid[:height, :width]
    levels = np.stack([40 + 0.4 * x, 60 + 0.5 * y, 200 - 0.3 * x - 0.2 * y], axis=-1)
    picture = Picture(levels.round().astype(np.uint8), None)
    grid = tiles_of(request_, width, height, ((side_px, side_px),))
    assert isinstance(grid, Grid)
    result = Run(starter(task, side_px)).results([picture], [request_])[0].astype(float)
    # Means along the border: a seam is a line, noise is not.
    steps = np.abs(np.diff(result.mean(axis=0), axis=0)).max(axis=1)
    inside = np.ones(width - 1, bool)
    for left in grid.lefts[1:]:
        inside[left - 2 : left + side_px // 2] = False
    borders = ~inside
    assert steps[borders].max() <= steps[inside].max() + 0.5


# --- through a replica ---


@pytest.fixture
def deployment(comic: AnyPipeline, tiny_folder: Callable[[str], Path]) -> Any:
    deployment: Any = Deployment(comic)
    spec = tiny.spec("sd_ddim", tiny_folder("sd_ddim"), buckets=BUCKETS, max_tiles=20)
    deployment._spec = spec
    yield deployment
    deployment._host.close()


def job_of(width: int, height: int, request: Any, **options: Any) -> ImageJob:
    picture = tiny.picture(1, height, width)
    image = images.encode(picture, "png", None)
    return ImageJob(request, image, "png", 60, width_px=width, height_px=height, **options)


async def test_a_result_says_how_many_tiles_it_took_and_what_they_cost(deployment: Any) -> None:
    result = await deployment(job_of(260, 200, FULL))
    assert (result.width_px, result.height_px) == (260, 200)
    assert dict(result.notes) == {
        "tiled": "The model worked on every pixel, in 20 tiles of 64 x 64 px."
    }
    assert images.read_metadata(result.image)["parameters"]["detail"] == "full"  # type: ignore[index]
    assert result.timings_s["denoise"] > 0
    assert result.timings_s["vae"] > 0
    assert result.seed == 7


async def test_progress_counts_the_steps_of_all_tiles(deployment: Any) -> None:
    job = job_of(260, 200, FULL, preview=True, n=2)
    *told, results = [one async for one in deployment.stream(job)]
    assert [result.seed for result in results] == [7, 8]
    counts = [(one.steps_done, one.steps) for one in told if isinstance(one, JobProgress)]
    assert {steps for _, steps in counts} <= {0, 2 * 2 * 20}
    assert counts == sorted(counts)
    one, other = (images.decode(result.image, LimitSettings()).rgb for result in results)
    assert (one != other).any()


async def test_eight_results_at_full_detail_leave_seats_and_turns_to_a_small_request(
    deployment: Any,
) -> None:
    deployment._seats = Seats(4, 20 * 64 * 64)
    makings: list[Making] = []
    eight = asyncio.create_task(deployment._run(job_of(260, 200, FULL, n=8), makings))
    while not any(0 < one.steps_left < one.steps for one in makings):
        await asyncio.sleep(0.001)
    left = sum(one.steps_left for one in makings)
    await deployment(job_of(64, 64, SINGLE))
    assert sum(one.steps_left for one in makings) > left / 2
    at_work: set[int] = set()
    while not eight.done():
        at_work.add(sum(one._blend is not None for one in makings))
        await asyncio.sleep(0.001)
    assert max(at_work) == 2  # what two of four seats hold
    assert [one.seed for one in await eight] == list(range(7, 15))


async def test_a_picture_of_too_many_tiles_gets_the_working_size_unless_asked_for(
    deployment: Any,
) -> None:
    deployment._defaults = {"detail": "full"}
    asked = FULL.model_fields_set - {"detail"}
    request = ComicRequest.model_validate(FULL.model_dump(include=asked))
    result = await deployment(job_of(400, 500, request))
    assert [one.code for one in result.notes] == ["detail_reduced", "working_size"]
    assert "more than the 20 allowed" in result.notes[0].text
