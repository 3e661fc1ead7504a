"""ModelDeployment: one Serve class for every model, bound five times."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from ray import serve

from deployments import images
from deployments.contract import REQUESTS, ImageJob, ImageResult, TaskRequest, complete
from deployments.errors import ConfigError, NotReady, ServiceError, too_late
from deployments.pipelines.base import Row
from deployments.registry import ModelSpec, check_defaults
from deployments.settings import Settings, Tuning, parse_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.images import Picture

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
        # Imported here: the Serve controller and the ingress import this module without torch.
        from deployments.engine import Engine
        from deployments.loader import load

        self._spec = spec
        self._limits = images.Limits(**settings.limits.model_dump())
        self._pool = ThreadPoolExecutor(settings.pixel_threads, thread_name_prefix="pixels")
        self._configured = False
        self._defaults = spec.defaults
        start_s = time.monotonic()
        loaded = load(spec, settings)
        self._pipeline = loaded.pipeline
        self._model = f"{spec.name}@{loaded.digest}"
        self._on_gpu = loaded.device != "cpu"
        self._engine = Engine(loaded.pipeline, max_batch_size=spec.max_batch_size)
        self._warm_up()
        logger.info(
            "%s ready on %s in %.1f s", self._model, loaded.device, time.monotonic() - start_s
        )

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take a new batch window, batch size or defaults, without a restart.

        A wrong config stops the first start of a replica. Later it is logged and the one in force
        stays, because Serve would otherwise replace a working replica by a failed one.
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
        self._configured = True
        self._defaults = defaults
        self._engine.max_batch_size = tuning.max_batch_size or self._spec.max_batch_size
        admit: Any = self._admit
        admit.set_max_batch_size(self._engine.max_batch_size)
        admit.set_batch_wait_timeout_s(tuning.batch_window_s)

    async def __call__(self, job: ImageJob) -> ImageResult:
        """Process one picture.

        Raises:
            RequestError: the request does not fit this model, or the image is damaged.
            ModelFailed: the model gave no picture for it.
            TooLate: `job.timeout_s` passed.
        """
        try:
            async with asyncio.timeout(job.timeout_s):
                return await self._process(job, time.monotonic() + job.timeout_s)
        except TimeoutError as error:
            raise too_late() from error
        except ServiceError as error:
            logger.warning("Request %s: %s", job.request_id, error)
            raise

    async def _process(self, job: ImageJob, deadline_s: float) -> ImageResult:
        # 1) Bytes to pixels, off the event loop.
        start_s = time.monotonic()
        request = complete(job.request, self._defaults, self._spec.parameters)
        picture = await self._on_pool(images.decode, job.image, self._limits)
        pixels = await self._on_pool(self._pipeline.fit, picture, request)
        decoded_s = time.monotonic()
        # 2) Pixels through the engine.
        row = Row(request, pixels, _seed(request), deadline_s)
        try:
            await self._admit(row)
            output = await asyncio.wrap_future(row.future)
        finally:
            row.cancel()
        # 3) Pixels to bytes.
        encode_s = time.monotonic()
        result = await self._on_pool(self._pipeline.restore, output, picture, request)
        body = await self._on_pool(images.encode, result, job.output_format, self._metadata(row))
        timings_s = {
            "decode": decoded_s - start_s,
            "queue": row.queue_s,
            "denoise": row.run_s,
            "encode": time.monotonic() - encode_s,
        }
        return self._result(job, result, body, row, timings_s)

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.0)
    async def _admit(self, rows: list[Row]) -> list[None]:
        """The admission window: hand the collected rows to the engine and return at once."""
        self._engine.put(rows)
        return [None] * len(rows)

    def _result(
        self,
        job: ImageJob,
        picture: Picture,
        body: bytes,
        row: Row,
        timings_s: dict[str, float],
    ) -> ImageResult:
        return ImageResult(
            image=body,
            media_type=images.media_type(job.output_format),
            width_px=picture.width_px,
            height_px=picture.height_px,
            model=self._model,
            seed=self._seed_used(row),
            batch_size=row.batch_size,
            gpu_seconds=row.compute_s * self._spec.num_gpus if self._on_gpu else 0.0,
            timings_s=timings_s,
            notes=picture.notes,
        )

    def _seed_used(self, row: Row) -> int | None:
        return row.seed if "seed" in self._spec.parameters else None

    def _metadata(self, row: Row) -> dict[str, object] | None:
        if row.request.metadata == "none":
            return None
        parameters = row.request.model_dump(include=set(self._spec.parameters))
        if self._seed_used(row) is not None:
            parameters["seed"] = row.seed
        return {
            "task": str(row.request.task),
            "model": self._model,
            "parameters": parameters,
        }

    async def check_health(self) -> None:
        """Called by Serve; raising gets this replica replaced."""
        if not self._engine.alive:
            raise NotReady(f"The engine of {self._model} has stopped.")

    def __del__(self) -> None:
        """Called by Serve at graceful shutdown, after the last request."""
        if engine := getattr(self, "_engine", None):
            engine.close()
            self._pool.shutdown(wait=False)

    def _warm_up(self) -> None:
        """Run one grey picture through the whole model, so that the first client does not wait."""
        grey = images.Picture(np.full((64, 64, 3), 127, np.uint8), None)
        request = complete(REQUESTS[self._spec.task](), self._spec.defaults, self._spec.parameters)
        row = Row(request, self._pipeline.fit(grey, request), 0, time.monotonic() + 600)
        self._engine.put([row])
        self._pipeline.restore(row.future.result(600), grey, request)

    async def _on_pool(self, work: Callable[..., Any], *args: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)


def _seed(request: TaskRequest) -> int:
    given = getattr(request, "seed", None)
    return secrets.randbits(32) if given is None else given
