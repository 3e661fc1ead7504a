"""ModelDeployment: one Serve class for every model, bound five times."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from deployments import images
from deployments.contract import ImageJob, ImageResult, TaskRequest, complete
from deployments.errors import ConfigError, ServiceError, too_late
from deployments.pipelines.base import Row
from deployments.registry import ModelSpec, check_defaults
from deployments.settings import Settings, Tuning, calm_threads, parse_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.engine import Engine
    from deployments.hosting import Status

_SEATS = 16
"""Requests worked on at a time: each holds a decoded picture, of up to 150 MB."""
logger = logging.getLogger("ray.serve.imagen.model")  # Serve gives its children a handler


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
        calm_threads()
        # Imported here: the Serve controller and the ingress import this module without torch.
        from deployments.hosting import Host

        spec = spec.model_copy(update={"num_gpus": _gpu_share()})
        self._spec = spec
        self._limits = images.Limits(**settings.limits.model_dump())
        self._pool = ThreadPoolExecutor(settings.pixel_threads, thread_name_prefix="pixels")
        self._seats = asyncio.Semaphore(_SEATS)
        self._configured = False
        self._defaults = spec.defaults
        self._host = Host(spec, settings)

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

    async def status(self) -> Status:
        """Which digest is served, which is wanted, and why they differ."""
        return self._host.status

    async def __call__(self, job: ImageJob) -> ImageResult:
        """Process one picture.

        Raises:
            RequestError: the request does not fit this model, or the image is damaged.
            ModelFailed: the model gave no picture for it.
            TooLate: `job.timeout_s` passed.
        """
        try:
            async with asyncio.timeout(job.timeout_s):
                arrived_s = time.monotonic()
                async with self._seats:
                    return await self._process(job, arrived_s)
        except TimeoutError as error:
            raise too_late() from error
        except ServiceError as error:
            logger.warning("Request %s: %s", job.request_id, error)
            raise

    async def _process(self, job: ImageJob, arrived_s: float) -> ImageResult:
        start_s = time.monotonic()
        deadline_s = arrived_s + job.timeout_s
        request = complete(job.request, self._defaults, self._spec.parameters)
        # 1) Bytes to pixels, off the event loop.
        picture = await self._on_pool(images.decode, job.image, self._limits)
        async with self._host.use() as served:
            pixels = await self._on_pool(served.pipeline.fit, picture, request)
            decoded_s = time.monotonic()
            # 2) Pixels through the engine.
            row = Row(request, pixels, _seed(request), deadline_s)
            exact = served.engine.limits.exact
            try:
                await self._admit((served.engine, row))
                output = await asyncio.wrap_future(row.future)
            finally:
                row.cancel()
            result = await self._on_pool(served.pipeline.restore, output, picture, request)
        # 3) Pixels to bytes.
        encode_s = time.monotonic()
        model = f"{self._spec.name}@{served.loaded.digest}"
        metadata = self._metadata(row, model)
        body = await self._on_pool(images.encode, result, job.output_format, metadata)
        on_gpu = served.loaded.device != "cpu"
        return ImageResult(
            image=body,
            media_type=images.media_type(job.output_format),
            width_px=result.width_px,
            height_px=result.height_px,
            model=model,
            seed=self._seed_used(row),
            batch_size=row.batch_size,
            gpu_seconds=row.compute_s * self._spec.num_gpus if on_gpu else 0.0,
            determinism="exact" if exact else "bounded",
            timings_s={"decode": decoded_s - start_s, "encode": time.monotonic() - encode_s}
            | _timings_s(row, start_s - arrived_s),
            notes=result.notes,
        )

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
        self._host.check()

    def __del__(self) -> None:
        """Called by Serve at graceful shutdown, after the last request."""
        if host := getattr(self, "_host", None):
            host.close()
            self._pool.shutdown(wait=False)

    async def _on_pool(self, work: Callable[..., Any], *args: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)


def _gpu_share() -> float:
    """What Ray gave this replica: the Serve config may say otherwise than the registry."""
    return float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0))


def _timings_s(row: Row, waited_s: float) -> dict[str, float]:
    return {"queue": waited_s + row.queue_s, "denoise": row.run_s, "vae": row.vae_s}


def _seed(request: TaskRequest) -> int:
    given = getattr(request, "seed", None)
    return secrets.randbits(32) if given is None else given
