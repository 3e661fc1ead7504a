"""ModelDeployment: one Serve class for every model, bound five times."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from deployments import images, tracing
from deployments.admission import Admission, fits
from deployments.contract import ImageJob, ImageRequest, ImageResult, complete
from deployments.engine.row import Row
from deployments.errors import ConfigError, ImagenError, ServiceError, TooMuchWork, too_late
from deployments.registry import ModelSpec, check_defaults
from deployments.settings import SEATS, Settings, Tuning, parse_settings, set_thread_limits

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from deployments.admission import Ticket
    from deployments.contract import OutputFormat
    from deployments.engine.engine import Engine
    from deployments.engine.pipeline import Pipeline
    from deployments.engine.row import Pixels
    from deployments.hosting import Served
    from deployments.images import Picture

_STAGES = ("decode", "engine", "encode")
logger = logging.getLogger("ray.serve.imagen.model")  # Serve gives its children a handler


class Seats:
    """Requests that a replica works on at a time; large pictures take several of the places.

    Without that, hostile uploads could fill its memory with as many pictures of the largest size.

    Args:
        count: of places; four pictures of the largest size take all of them.
        largest_px: width x height of a picture, at most.
    """

    def __init__(self, count: int, largest_px: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._first = asyncio.Lock()
        self._most = max(count // 4, 1)
        self._px = max(largest_px // self._most, 1)

    @asynccontextmanager
    async def taken(self, px: int) -> AsyncGenerator[None]:
        """A context with the places of a picture of so many pixels; first come, first served."""
        async with AsyncExitStack() as stack:
            # Those of one picture in one go, else two could each wait for the other's.
            async with self._first:
                for _ in range(min(max(-(-px // self._px), 1), self._most)):
                    await stack.enter_async_context(self._free)
            yield


class ModelDeployment:
    """Serves one model.

    Guarantees:
        - a replica is ready only after its weights are loaded and a warm-up row ran;
        - a failing, cancelled or late request never fails its batch mates;
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
        self._limits = settings.limits
        self._pool = ThreadPoolExecutor(settings.pixel_threads, thread_name_prefix="pixels")
        self._seats = Seats(SEATS, settings.limits.max_input_px)
        self._configured = False
        self._defaults = spec.defaults
        self._inside = 0
        self._host = Host(spec, settings)
        self._timeout_s = settings.request_timeout_s
        self._admission = Admission(settings.request_timeout_s)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take a new digest, batch window, limits of a pass or defaults, without a restart.

        The first call, before any request, brings the model up: it may raise, and stops the start
        of the replica. A later one never raises, because Serve would replace a working replica by
        a failed one: what is wrong is logged, and what is in force stays. A new digest is recorded
        and exchanged in the background.
        """
        try:
            tuning = parse_settings(Tuning, user_config, f"user_config of {self._spec.name}")
            defaults = {**self._spec.defaults, **tuning.defaults}
            check_defaults(self._spec, defaults)
        except (ConfigError, ValueError) as error:
            if self._configured:
                logger.error("user_config refused, the former one stays: %s", error)
                return
            raise ConfigError(str(error)) from error
        self._defaults = defaults
        self._host.tune(tuning)
        admit: Any = self._admit
        admit.set_max_batch_size(self._host.limits.max_batch_size)
        admit.set_batch_wait_timeout_s(tuning.batch_window_s)
        if self._configured:
            self._host.want(tuning.digest)
        else:
            await asyncio.to_thread(self._host.start, tuning.digest)
            self._configured = True
            self._start_s = time.monotonic() - self._began_s

    async def status(self) -> dict[str, object]:
        """Digest served and wanted, why they differ, requests inside, seconds the start took."""
        start_s = round(self._start_s, 1)
        return {**self._host.status, "requests": self._inside, "start_s": start_s}

    async def __call__(self, job: ImageJob) -> ImageResult:
        """Process one picture.

        Raises:
            RequestError: the request does not fit this model, or the image is damaged.
            TooMuchWork: not even an idle replica could finish it in time.
            Full: too many requests are before it for its deadline.
            ModelFailed: the model gave no picture for it.
            TooLate: `job.timeout_s` passed.
        """
        with self._counted():
            return await self._in_time(job)

    async def _in_time(self, job: ImageJob) -> ImageResult:
        try:
            request = complete(job.request, self._defaults, self._spec.parameters)
            return await self._admitted(job, request)
        except ServiceError as error:
            logger.warning("Request %s: %s", job.request_id, error)
            raise

    async def _admitted(self, job: ImageJob, request: ImageRequest) -> ImageResult:
        seconds, arrived_s = self._estimate(job, request), time.monotonic()
        timeout_s = job.left_s(time.time())
        loop, deadline = asyncio.get_running_loop(), asyncio.timeout(timeout_s)

        def give_up() -> None:
            if not deadline.expired():
                deadline.reschedule(loop.time())

        with self._admission.admit(seconds, timeout_s, give_up) as ticket:
            try:
                async with deadline, self._seats.taken(self._most_px(job)):
                    return await self._process(job, request, ticket, arrived_s)
            except TimeoutError as error:
                raise ticket.refusal or too_late() from error

    @contextmanager
    def _counted(self) -> Generator[None]:
        outcome = "gone"
        self._inside += 1
        self._host.work.holds(self._inside)
        try:
            yield
            outcome = "ok"
        except ImagenError as error:
            outcome = error.code
            raise
        finally:
            self._inside -= 1
            self._host.work.holds(self._inside)
            self._host.work.answered(outcome)

    def _most_px(self, job: ImageJob) -> int:
        """Pixels of the upload or of the result, whichever has more."""
        return job.width_px * job.height_px * self._spec.scale**2

    def _estimate(self, job: ImageJob, request: ImageRequest) -> float | None:
        """Seconds of work on an idle replica; None if passes of this size were not timed yet.

        Raises:
            TooMuchWork: more than a request may take.
        """
        served = self._host.served
        if served is None:
            return None
        pipeline, forecast = served.pipeline, served.forecast

        def seconds_of(request: ImageRequest, width_px: int, height_px: int) -> float | None:
            work = pipeline.work(width_px, height_px, request)
            return forecast.seconds(work, width_px * height_px * self._spec.scale**2)

        seconds = seconds_of(request, job.width_px, job.height_px)
        if not forecast.is_certain(pipeline.work(job.width_px, job.height_px, request)):
            return None
        if seconds is not None and not fits(seconds, self._timeout_s):
            raise TooMuchWork(
                "The model cannot finish this request in time, even with nothing else to do.",
                value=f"about {seconds:.0f} s of work; a request may take {self._timeout_s:g} s",
                remedy=_largest(request, job, self._timeout_s, seconds_of),
            )
        return seconds

    async def _process(
        self, job: ImageJob, request: ImageRequest, ticket: Ticket, arrived_s: float
    ) -> ImageResult:
        start_s = time.monotonic()
        async with self._host.use() as served:
            # 1) Bytes to pixels, off the event loop.
            picture, pixels = await self._on_pool(self._open, job, request, served.pipeline)
            decoded_s = time.monotonic()
            # 2) Pixels through the engine.
            row = Row(request, pixels, _seed(request), ticket.deadline_s, trace=tracing.current())
            ticket.row = row
            exact = served.engine.limits.exact
            output = await self._step(served.engine, row)
            # 3) Pixels to bytes.
            encode_s = time.monotonic()
            model = f"{self._spec.name}@{served.loaded.digest}"
            metadata = self._metadata(row, model)
            result, body = await self._on_pool(
                _close, served.pipeline, output, picture, request, job.output_format, metadata
            )
        end_s = time.monotonic()
        gpu_seconds = self._gpu_seconds(row, served)
        timings_s = {"decode": decoded_s - start_s, "encode": end_s - encode_s}
        timings_s |= _timings_s(row, start_s - arrived_s)
        work = served.pipeline.work(job.width_px, job.height_px, request)
        served.forecast.record(work, self._most_px(job), timings_s)
        self._tell(row, timings_s, gpu_seconds, (start_s, decoded_s, encode_s, end_s))
        return ImageResult(
            image=body,
            media_type=images.media_type(job.output_format),
            width_px=result.width_px,
            height_px=result.height_px,
            model=model,
            seed=self._seed_used(row),
            batch_size=row.batch_size,
            gpu_seconds=gpu_seconds,
            determinism="exact" if exact and row.batch_size == 1 else "bounded",
            timings_s=timings_s,
            notes=result.notes,
        )

    def _gpu_seconds(self, row: Row, served: Served) -> float:
        return row.compute_s * self._spec.num_gpus if served.loaded.device != "cpu" else 0.0

    async def _step(self, engine: Engine, row: Row) -> Pixels:
        try:
            await self._admit((engine, row))
            return await asyncio.wrap_future(row.future)
        finally:
            row.cancel()

    def _open(
        self, job: ImageJob, request: ImageRequest, pipeline: Pipeline
    ) -> tuple[Picture, Pixels]:
        picture = images.decode(job.image, self._limits)
        return picture, pipeline.fit(picture, request)

    def _tell(
        self, row: Row, timings_s: dict[str, float], gpu_seconds: float, ends_s: tuple[float, ...]
    ) -> None:
        self._host.work.pictured(timings_s, gpu_seconds)
        facts = {f"{stage}_s": seconds for stage, seconds in timings_s.items()}
        facts |= {"batch_size": row.batch_size}
        for name, (start_s, end_s) in zip(_STAGES, pairwise(ends_s), strict=True):
            tracing.record(name, start_s, end_s, facts)

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.0)
    async def _admit(self, rows: list[tuple[Engine, Row]]) -> list[None]:
        """The admission window: hand the collected rows to their engine and return at once."""
        for engine, row in rows:
            engine.put([row])
        return [None] * len(rows)

    def _seed_used(self, row: Row) -> int | None:
        return row.seed if "seed" in self._spec.parameters else None

    def _metadata(self, row: Row, model: str) -> dict[str, object] | None:
        if row.request.metadata == "none":
            return None
        parameters = row.request.model_dump(include=set(self._spec.parameters))
        if self._seed_used(row) is not None:
            parameters["seed"] = row.seed
        return {
            "task": str(row.request.task),
            "model": model,
            "parameters": parameters,
        }

    async def check_health(self) -> None:
        """Called by Serve; raising gets this replica replaced."""
        # Again, because Ray's agent forgets a gauge that is not set for a while.
        self._host.work.holds(self._inside)
        self._host.check()

    def __del__(self) -> None:
        """Called by Serve at graceful shutdown, after the last request."""
        if host := getattr(self, "_host", None):
            host.close()
            self._pool.shutdown(wait=False)

    async def _on_pool(self, work: Callable[..., Any], *args: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)


def _close(
    pipeline: Pipeline,
    output: Pixels,
    picture: Picture,
    request: ImageRequest,
    output_format: OutputFormat,
    metadata: dict[str, object] | None,
) -> tuple[Picture, bytes]:
    result = pipeline.restore(output, picture, request)
    return result, images.encode(result, output_format, metadata)


def _largest(
    request: ImageRequest,
    job: ImageJob,
    limit_s: float,
    seconds_of: Callable[[ImageRequest, int, int], float | None],
) -> str:
    """The largest request like one that is too large: of fewer steps, else of a smaller picture."""
    for steps in range(getattr(request, "steps", 1) - 1, 0, -1):
        if steps * getattr(request, "strength", 1.0) < 1:
            break
        fewer = request.model_copy(update={"steps": steps})
        seconds = seconds_of(fewer, job.width_px, job.height_px) or 0.0
        if fits(seconds, limit_s):
            return f"Send steps={steps} at most, which takes about {seconds:.0f} s."
    for percent in range(99, 0, -1):
        width_px, height_px = job.width_px * percent // 100, job.height_px * percent // 100
        if fits(seconds_of(request, max(width_px, 1), max(height_px, 1)) or 0.0, limit_s):
            return f"Send a picture of at most {width_px} x {height_px} px."
    return "Use another model, or a faster machine."


def _gpu_share() -> float:
    """What Ray gave this replica: the Serve config may say otherwise than the registry."""
    return float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0))


def _timings_s(row: Row, waited_s: float) -> dict[str, float]:
    return {"queue": waited_s + row.queue_s, "denoise": row.run_s, "vae": row.vae_s}


def _seed(request: ImageRequest) -> int:
    given = getattr(request, "seed", None)
    return secrets.randbits(32) if given is None else given
