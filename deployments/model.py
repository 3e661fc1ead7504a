"""ModelDeployment: one Serve class for every model, bound once for each model."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray import serve

from deployments import images, tracing
from deployments.admission import Admission
from deployments.contract import (
    MOST_SEEDS,
    ImageJob,
    ImageRequest,
    ImageResult,
    JobProgress,
    complete,
    draw_seed,
    scale_notes,
    unused_notes,
)
from deployments.credentials import Origin, Signing
from deployments.cutout import laid_on
from deployments.detail import settled, tiled_note
from deployments.engine.row import Row, RowInput, Whole
from deployments.errors import ConfigError, ImagenError, ServiceError, TooMuchWork, too_late
from deployments.estimate import Size, file_px, fits
from deployments.making import Making, left_s
from deployments.masks import kept
from deployments.notes import documents
from deployments.opening import open_job
from deployments.registry import ModelSpec, check_defaults
from deployments.seats import Seats
from deployments.settings import (
    SEAT_PX,
    SEATS,
    Settings,
    Tuning,
    parse_settings,
    set_thread_limits,
)
from deployments.tiling import tiles_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Generator

    from deployments.admission import Ticket
    from deployments.engine.engine import Engine
    from deployments.engine.pipeline import AnyPipeline
    from deployments.engine.row import Pixels
    from deployments.hosting import Served
    from deployments.images import Picture
    from deployments.notes import Note
    from deployments.opening import Opened
    from deployments.tiling import Grid

_PROGRESS_S = 0.2
"""How often `stream` tells how far a request is."""
logger = logging.getLogger("ray.serve.imagen.model")  # Serve gives its children a handler


class _Times(NamedTuple):
    """When the stages of a request began and ended, on the clock of `time.monotonic`."""

    start_s: float
    decoded_s: float
    stepped_s: float
    end_s: float

    def stages_s(self, making: Making, arrived_s: float) -> dict[str, float]:
        """Seconds by stage, see `ImageResult.timings_s`."""
        stages_s = making.stages_s(self.stepped_s - self.decoded_s)
        stages_s["queue"] += self.start_s - arrived_s
        return {
            "queue": stages_s.pop("queue"),
            "decode": self.decoded_s - self.start_s,
            **stages_s,
            "encode": self.end_s - self.stepped_s,
        }


class ModelDeployment:
    """Serves one model.

    Guarantees:
        - a replica is ready only after its weights are loaded and a warm-up row ran;
        - a failing, cancelled or late request never fails another one of its batch;
        - pixels never leave the replica: bytes come in, bytes go out.

    Args:
        spec: which model, and how.
        settings: what all models share.
    """

    def __init__(self, spec: ModelSpec, settings: Settings) -> None:
        self._began_s = time.monotonic()
        self._start_s = 0.0
        set_thread_limits()
        # Imported here: the Serve controller and the ingress import this module without torch.
        from deployments.hosting import Host

        spec = spec.model_copy(update={"num_gpus": _gpu_share()})
        self._spec = spec
        self._pool = ThreadPoolExecutor(settings.pixel_threads, thread_name_prefix="pixels")
        self._seats = Seats(SEATS, SEAT_PX)
        self._configured = False
        self._defaults = spec.defaults
        self._in_flight = 0
        self._streams: dict[str, asyncio.Future[tuple[ImageResult, ...]]] = {}
        self._host = Host(spec, settings)
        self._admission = Admission()
        self._signing = None if settings.c2pa is None else Signing(settings.c2pa)

    # --- what Serve calls ---

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take a new digest, batch window, limits of a pass or defaults, without a restart.

        The first call comes before any request and brings the model up. It may raise, which stops
        the start of the replica. A later call never raises, because Serve would replace a working
        replica by a failed one: errors are logged, and the configuration in force stays. A new
        digest is recorded and swapped in in the background.
        """
        try:
            tuning = parse_settings(Tuning, user_config, f"user_config of {self._spec.name}")
            defaults = {**self._spec.defaults, **tuning.defaults}
            check_defaults(self._spec, defaults)
        except (ConfigError, ValueError) as error:
            if self._configured:
                logger.error("user_config refused, the former one stays in force: %s", error)
                return
            raise ConfigError(str(error)) from error
        self._defaults = defaults
        self._host.tune(tuning)
        window: Any = self._admission_window
        window.set_max_batch_size(self._host.limits.max_batch_size)
        window.set_batch_wait_timeout_s(tuning.batch_window_s)
        if self._configured:
            self._host.switch_to(tuning.digest)
        else:
            await asyncio.to_thread(self._host.start, tuning.digest)
            self._configured = True
            self._start_s = time.monotonic() - self._began_s

    async def check_health(self) -> None:
        """Called by Serve, which replaces this replica if it raises."""
        # Set again, because Ray's agent forgets a gauge that is not set for a while.
        self._host.work.set_in_flight(self._in_flight)
        self._host.check()

    def __del__(self) -> None:
        """Called by Serve at graceful shutdown, after the last request."""
        if host := getattr(self, "_host", None):
            host.close()
            self._pool.shutdown(wait=False)

    # --- what the ingress calls ---

    async def status(self) -> dict[str, object]:
        """Digests served and wanted, the last error, requests inside, seconds the start took."""
        start_s = round(self._start_s, 1)
        return {**self._host.status, "requests": self._in_flight, "start_s": start_s}

    async def __call__(self, job: ImageJob) -> ImageResult:
        """Process one request.

        Raises:
            RequestError: the request does not fit this model, or the image is damaged.
            TooMuchWork: not even an idle replica could finish it in time.
            Full: the requests before it leave it too little time.
            ModelFailed: the model gave no picture for it.
            TooLate: `job.timeout_s` passed.
        """
        (result,) = await self._run(job, [])
        return result

    async def stream(self, job: ImageJob) -> AsyncGenerator[JobProgress | tuple[ImageResult, ...]]:
        """Process a request of `job.n` results, and tell how far it is; the results come last.

        The first word comes at once, so that the caller knows that a replica has the request. A
        job that comes again ends its former run: Ray does not, if the caller died meanwhile.

        Raises as `__call__`. A caller who stops reading gives the request up.
        """
        makings: list[Making] = []
        told = JobProgress(0, 0)
        if former := self._streams.pop(job.job_id, None):
            former.cancel()
        work = asyncio.ensure_future(self._run(job, makings))
        if job.job_id:
            self._streams[job.job_id] = work
        try:
            yield told
            while not (await asyncio.wait({work}, timeout=_PROGRESS_S))[0]:
                if makings:
                    told = await self._progress(job, makings, told)
                    yield told
            yield work.result()
        finally:
            work.cancel()
            if self._streams.get(job.job_id) is work:
                del self._streams[job.job_id]

    # --- one request, from admission to its result ---

    async def _run(self, job: ImageJob, makings: list[Making]) -> tuple[ImageResult, ...]:
        """The results; `makings` gets what is on its way to them once that is known."""
        with self._counted():
            try:
                request = complete(job.request, self._defaults, self._spec.parameters)
                if "detail" not in job.request.model_fields_set:
                    request, notes = self._settled(job, request)
                    job = replace(job, notes=(*job.notes, *notes))
                return await self._admitted(job, request, makings)
            except ServiceError as error:
                logger.warning("Request %s: %s", job.request_id, error)
                raise

    def _settled(
        self, job: ImageJob, request: ImageRequest
    ) -> tuple[ImageRequest, tuple[Note, ...]]:
        def why_late(request: ImageRequest) -> str:
            """By what the replica has to do at present, because a refusal would help nobody."""
            try:
                idle_s = self._estimate_s(job, request) or 0.0
            except TooMuchWork as error:
                return error.value
            seconds, left_s = idle_s * max(self._admission.slowdown, 1), job.left_s(time.time())
            if not fits(seconds, left_s):
                return f"about {seconds:.0f} s at present, with {left_s:.0f} s left"
            if not self._admission.takes(idle_s, left_s):
                return f"about {seconds:.0f} s behind other requests, with {left_s:.0f} s left"
            return ""

        return settled(request, _size(job), self._spec, why_late)

    @contextmanager
    def _counted(self) -> Generator[None]:
        outcome = "disconnected"
        self._in_flight += 1
        self._host.work.set_in_flight(self._in_flight)
        try:
            yield
            outcome = "ok"
        except ImagenError as error:
            outcome = error.code
            raise
        finally:
            self._in_flight -= 1
            self._host.work.set_in_flight(self._in_flight)
            self._host.work.count_request(outcome)

    async def _admitted(
        self, job: ImageJob, request: ImageRequest, makings: list[Making]
    ) -> tuple[ImageResult, ...]:
        """Process a request if it can end in time, as long as it can."""
        arrived_s, timeout_s = time.monotonic(), job.left_s(time.time())
        loop, deadline = asyncio.get_running_loop(), asyncio.timeout(timeout_s)

        def give_up() -> None:
            if not deadline.expired():
                deadline.reschedule(loop.time())

        seconds = self._estimate_s(job, request)
        with self._admission.admit(seconds, timeout_s, give_up, job.limit_s) as ticket:
            try:
                async with deadline, self._taken(job, request) as most:
                    return await self._process(job, request, ticket, makings, arrived_s, most)
            except TimeoutError as error:
                raise ticket.refusal or too_late() from error

    def _taken(self, job: ImageJob, request: ImageRequest) -> AbstractAsyncContextManager[int]:
        # A background and a mask are pictures in memory, too. Tiles reach beyond a thin picture.
        grid = self._grid(job, request)
        work_px = 0 if grid is None else grid.work_px
        px = max(file_px(request, _size(job), self._spec.scale), job.background_px, work_px)
        others = (job.background is not None) + (job.mask is not None)
        return self._seats.taken(px, job.n, others)

    def _estimate_s(self, job: ImageJob, request: ImageRequest) -> float | None:
        served = self._host.served
        if served is None:
            return None
        return served.estimator.seconds(
            request, _size(job), job.limit_s, job.n, is_job=bool(job.job_id)
        )

    async def _process(
        self,
        job: ImageJob,
        request: ImageRequest,
        ticket: Ticket,
        makings: list[Making],
        arrived_s: float,
        at_a_time: int,
    ) -> tuple[ImageResult, ...]:
        start_s, turns = time.monotonic(), asyncio.Semaphore(at_a_time)
        async with self._host.use() as served:
            # 1) Bytes to pixels, off the event loop.
            opened = await self._on_pool(self._open, job, request, served.pipeline)
            decoded_s = time.monotonic()
            makings += self._makings(job, request, opened, ticket.deadline_s, served)
            ticket.rows = [row for making in makings for row in making.rows]

            async def made(one: Making) -> ImageResult:
                async with turns:
                    # 2) Pixels through the engine.
                    output = await self._step(served.engine, one)
                    stepped_s = time.monotonic()
                    # 3) Pixels to bytes.
                    picture, body = await self._on_pool(
                        self._close, job, one, output, opened, served
                    )
                    one.forget()
                times = _Times(start_s, decoded_s, stepped_s, time.monotonic())
                timings_s = times.stages_s(one, arrived_s)
                result = self._result(job, one, served, picture, body, timings_s)
                self._report(one, times, timings_s, result.gpu_seconds)
                return result

            results = await _all(made, makings)
            if job.n == 1 and opened.mask is None:  # which leaves tiles out
                served.estimator.record(request, _size(job), results[0].timings_s)
        return tuple(results)

    def _makings(
        self,
        job: ImageJob,
        request: ImageRequest,
        opened: Opened,
        deadline_s: float,
        served: Served,
    ) -> list[Making]:
        """What becomes of each result, with the notes that all of them share."""
        parameters, grid = self._spec.parameters, self._grid(job, request)
        notes = [*job.notes, *unused_notes(job.request, parameters)]
        notes += scale_notes(job.request, _size(job), self._spec.scale)
        first, steps = getattr(request, "seed", None), 0
        if first is None:
            first, drawn = draw_seed()
            notes += [drawn] if "seed" in parameters else []
        if grid is not None or job.n > 1:
            steps = served.pipeline.work(*_size(job), request).steps
            steps //= 1 if grid is None else grid.count
        trace = tracing.current()
        whole, mask = Whole(time.monotonic()), opened.seen_mask
        one = RowInput(
            request, opened.pixels, first, deadline_s, trace, notes, whole=whole, mask=mask
        )
        seeds = [(first + k) % MOST_SEEDS for k in range(job.n)]
        makings = [Making(replace(one, seed=seed, notes=[*notes]), grid, steps) for seed in seeds]
        if grid is not None:
            for making in makings:
                making.input.notes.append(tiled_note(grid, len(making.rows)))
        return makings

    def _grid(self, job: ImageJob, request: ImageRequest) -> Grid | None:
        return tiles_of(request, *_size(job), self._spec.buckets)

    def _result(
        self,
        job: ImageJob,
        making: Making,
        served: Served,
        picture: Picture,
        body: bytes,
        timings_s: dict[str, float],
    ) -> ImageResult:
        batch_size = making.batch_size
        is_exact = served.engine.limits.exact and batch_size == 1
        return ImageResult(
            image=body,
            media_type=images.media_type(job.output_format),
            width_px=picture.width_px,
            height_px=picture.height_px,
            model=self._model_name(served),
            seed=self._seed_used(making),
            batch_size=batch_size,
            gpu_seconds=self._gpu_seconds(making, served),
            determinism="exact" if is_exact else "bounded",
            timings_s=timings_s,
            notes=picture.notes,
        )

    def _open(self, job: ImageJob, request: ImageRequest, pipeline: AnyPipeline) -> Opened:
        in_tiles = self._grid(job, request) is not None
        return open_job(job, request, pipeline, in_tiles=in_tiles)

    async def _step(self, engine: Engine, making: Making) -> Pixels:
        async def put(row: Row) -> None:
            window: Any = self._admission_window
            await window((engine, row))

        # Tiles for one pass, and for the next while those begin and finish.
        return await making.output(put, 2 * engine.limits.max_batch_size, self._on_pool)

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.0)
    async def _admission_window(self, rows: list[tuple[Engine, Row]]) -> list[None]:
        """Hand the rows that were collected to their engine, and return at once."""
        for engine, row in rows:
            engine.put([row])
        return [None] * len(rows)

    def _close(
        self, job: ImageJob, making: Making, output: Pixels, opened: Opened, served: Served
    ) -> tuple[Picture, bytes]:
        restored = served.pipeline.restore(output, opened.picture, making.input.request)
        if opened.picture is not None and opened.mask is not None:
            restored = kept(restored, opened.picture, opened.mask)
        if opened.background is not None:
            restored = laid_on(restored, opened.background)
        # A row that began twice may have said the same twice.
        notes = tuple(dict.fromkeys((*making.input.notes, *restored.notes)))
        result = images.fitted(replace(restored, notes=notes), job.output_format)
        metadata = self._metadata(making, served, result.notes)
        source_type, quality = self._spec.task.source_type, making.input.request.output_compression
        body = images.encode(result, job.output_format, metadata, source_type, quality)
        return result, self._signed(job, making.input.request, body, served)

    def _signed(self, job: ImageJob, request: ImageRequest, body: bytes, served: Served) -> bytes:
        """The file with Content Credentials, where the operator has a certificate."""
        if self._signing is None:
            return body
        origin = Origin(
            task=request.task,
            model=self._model_name(served),
            source_type=self._spec.task.source_type,
            picture=job.image,
            media_type="" if job.image is None else images.media_type_of(job.image),
            carried=request.metadata != "none",
        )
        return self._signing.sign(body, images.media_type(job.output_format), origin)

    async def _progress(
        self, job: ImageJob, makings: list[Making], told: JobProgress
    ) -> JobProgress:
        """How far results are; with a picture of the first at work, if they moved since `told`."""
        steps = sum(one.steps for one in makings)
        done = steps - sum(one.steps_left for one in makings)
        preview = None
        if job.preview and done > told.steps_done and (served := self._host.served):
            preview = await self._on_pool(_preview, served.pipeline, makings)
        rows = [row for one in makings for row in one.rows]
        return JobProgress(done, steps, left_s(rows, done, steps), preview)

    # --- what a result says of itself ---

    def _model_name(self, served: Served) -> str:
        return f"{self._spec.name}@{served.loaded.digest}"

    def _seed_used(self, making: Making) -> int | None:
        return making.input.seed if "seed" in self._spec.parameters else None

    def _metadata(
        self, making: Making, served: Served, notes: tuple[Note, ...]
    ) -> dict[str, object] | None:
        request = making.input.request
        if request.metadata == "none":
            return None
        parameters = request.model_dump(include=set(self._spec.parameters))
        if self._seed_used(making) is not None:
            parameters["seed"] = making.input.seed
        return {
            "task": str(request.task),
            "model": self._model_name(served),
            "parameters": parameters,
            "notes": documents(notes),
        }

    def _gpu_seconds(self, making: Making, served: Served) -> float:
        on_gpu = served.loaded.device != "cpu"
        return making.compute_s * self._spec.num_gpus if on_gpu else 0.0

    def _report(
        self, making: Making, times: _Times, timings_s: dict[str, float], gpu_seconds: float
    ) -> None:
        """Metrics and spans of a request that is done."""
        self._host.work.record_picture(timings_s, gpu_seconds)
        attributes = {f"{stage}_s": seconds for stage, seconds in timings_s.items()}
        attributes["batch_size"] = making.batch_size
        for name, ends_s in zip(("decode", "engine", "encode"), pairwise(times), strict=True):
            tracing.record(name, *ends_s, attributes)

    async def _on_pool(self, work: Callable[..., Any], *args: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)


async def _all(
    made: Callable[[Making], Coroutine[None, None, ImageResult]], makings: list[Making]
) -> list[ImageResult]:
    """All results; once one of them fails, the others are given up."""
    tasks = [asyncio.create_task(made(one)) for one in makings]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task, making in zip(tasks, makings, strict=True):
            task.cancel()
            making.cancel()


def _preview(pipeline: AnyPipeline, makings: list[Making]) -> bytes | None:
    shown = (making.preview(pipeline) for making in makings)
    pixels = next((one for one in shown if one is not None), None)
    return None if pixels is None else images.thumbnail(pixels)


def _size(job: ImageJob) -> Size:
    return Size(job.width_px, job.height_px)


def _gpu_share() -> float:
    """What Ray gave this replica: the Serve config may differ from the registry."""
    return float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0))
