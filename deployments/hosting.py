"""The model a replica serves, and its exchange for other content while requests keep coming."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from deployments.contract import complete
from deployments.engine.engine import Engine
from deployments.engine.grouping import GroupLimits
from deployments.engine.row import Row, RowInput
from deployments.errors import NotReady, SetupError
from deployments.estimate import Estimator, Forecast
from deployments.gpu.cap import memory_bytes
from deployments.images import Picture
from deployments.loader import load
from deployments.preparing import prepare_replica
from deployments.store.lockfile import load_lock
from deployments.store.manifest import SHORT
from deployments.store.node_init import ensure_on_node
from deployments.store.provider import Provider
from deployments.telemetry import ModelMetrics, WorkMetrics
from deployments.tracing import BatchSpans

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from deployments.engine.grouping import Pass
    from deployments.engine.pipeline import AnyPipeline
    from deployments.loader import Loaded
    from deployments.registry import ModelSpec
    from deployments.settings import Settings, Tuning

_WARM_UP_TIMEOUT_S = 600
_WARM_UP_ROWS = 3
_WARM_UP_PX = 64
_IDLE_TIMEOUT_S = 60
logger = logging.getLogger("ray.serve.imagen.hosting")


class Status(TypedDict):
    """A replica's model.

    Attributes:
        serving: its digest, 16 hex digits.
        wanted: the configured digest.
        error: why they differ, or nothing.
    """

    serving: str
    wanted: str
    error: str


@dataclass(frozen=True, slots=True)
class Served:
    """A warm model, its engine, and what its requests take."""

    loaded: Loaded
    engine: Engine
    estimator: Estimator

    @property
    def pipeline(self) -> AnyPipeline:
        return self.loaded.pipeline

    def close(self) -> None:
        """End the engine after the rows it has, and release the model's folder."""
        self.engine.close()
        self.loaded.lease.close()


class Gate:
    """Lets requests in together and an exchange alone. For one event loop."""

    def __init__(self) -> None:
        self._inside = 0
        self._open = asyncio.Event()
        self._open.set()
        self._empty = asyncio.Event()
        self._empty.set()

    @asynccontextmanager
    async def request(self) -> AsyncGenerator[None]:
        """Wait until the gate is open; no exchange starts before the end of the context."""
        while not self._open.is_set():
            await self._open.wait()
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @asynccontextmanager
    async def exchange(self) -> AsyncGenerator[None]:
        """Let no request in, and wait until the last one has left; deadlines bound that wait."""
        self._open.clear()
        try:
            await self._empty.wait()
            yield
        finally:
            self._open.set()


class Host:
    """Holds one model and swaps its content on demand.

    Guarantees:
        - `start` returns only when the model is verified, loaded and warm;
        - a swap that fails anywhere leaves the former content serving;
        - each request sees one content from its first pixel to its last.

    Args:
        spec: which model, and how.
        settings: what all models share.

    Attributes:
        limits: of a pass.
        work: metrics; the host records passes and memory, its user records requests.
    """

    def __init__(self, spec: ModelSpec, settings: Settings) -> None:
        self.limits = GroupLimits(spec.max_batch_size)
        self._spec = spec
        self._settings = settings
        self._metrics = ModelMetrics()
        self.work = WorkMetrics(spec.name)
        lock = load_lock(*settings.models)
        self._provider = Provider(lock, settings.store, self._metrics.count_event)
        self._gate = Gate()
        self._served: Served | None = None
        self._target = ""
        self._error = ""
        self._broken = ""
        self._swapping: asyncio.Task[None] | None = None

    def start(self, digest: str | None) -> None:
        """Bring up a digest or, if that fails, the lock file's.

        Args:
            digest: at least 16 hex digits; None takes the lock file's.

        Raises:
            SetupError: neither could be brought up.
        """
        if digest is None:
            locked = self._provider.digest(self._spec)
            self._served, self._target = self._bring_up(locked), locked[:SHORT]
            return
        self._target = digest[:SHORT]
        try:
            self._served = self._bring_up(digest)
        except Exception as error:
            locked = self._provider.digest(self._spec)
            if locked.startswith(self._target):
                raise
            self._error = _describe(error)
            logger.error(
                "%s@%s cannot be served: %s The lock file's digest is served instead.",
                self._spec.name,
                self._target,
                self._error,
            )
            self._served = self._bring_up(locked)

    def switch_to(self, digest: str | None) -> None:
        """Swap to another digest in the background; None takes the lock file's. Never raises."""
        try:
            self._target = (digest or self._provider.digest(self._spec))[:SHORT]
        except SetupError as error:
            self._error = str(error)
            return
        if self._swapping is None or self._swapping.done():
            self._swapping = asyncio.create_task(self._swap())

    @asynccontextmanager
    async def use(self) -> AsyncGenerator[Served]:
        """The model, which no exchange replaces before the end of the context.

        Raises:
            NotReady: there is none yet.
        """
        async with self._gate.request():
            yield self._ready()

    @property
    def served(self) -> Served | None:
        """The model at this moment, which an exchange may replace; None before `start`."""
        return self._served

    @property
    def status(self) -> Status:
        serving = self._served.loaded.digest if self._served else ""
        return Status(serving=serving, wanted=self._target, error=self._error)

    def check(self) -> None:
        """Keep the replica's gauges alive, and see whether it works.

        Raises:
            NotReady: this replica must be replaced.
        """
        with suppress(OSError):
            self._metrics.refresh(self._provider.store.free_bytes)
        if self._served:
            loaded = self._served.loaded
            self.work.set_memory(memory_bytes(loaded.device, loaded.cap_bytes))
            self._metrics.set_differs(self._spec.name, differs=loaded.digest != self._target)
        if self._broken or not self._ready().engine.alive:
            raise NotReady(f"The engine of {self._spec.name} has stopped. {self._broken}".strip())

    def tune(self, tuning: Tuning) -> None:
        """Change what a pass may hold."""
        size = tuning.max_batch_size or self._spec.max_batch_size
        self.limits = GroupLimits(size, tuning.budget_px, tuning.determinism == "exact")
        if self._served:
            self._served.engine.limits = self.limits

    def close(self) -> None:
        """End the engine and release the model's folder."""
        if self._served:
            self._served.close()

    def _ready(self) -> Served:
        if self._served is None:
            raise NotReady(
                f"{self._spec.name} was never configured.",
                remedy="Give its deployment a user_config, at least {}.",
            )
        return self._served

    def _bring_up(self, digest: str) -> Served:
        start_s = time.monotonic()
        served = self._warm(self._load(digest, on_host=False))
        self._announce(served, start_s)
        return served

    def _load(self, digest: str, *, on_host: bool) -> Loaded:
        store = self._provider.store
        try:
            with store.lease(digest):  # before the pull, so that nothing collects it meanwhile
                ensure_on_node(self._spec.name, digest, self._settings, self._metrics.count_totals)
                return load(self._spec, digest, store, self._settings, on_host=on_host)
        except SetupError:
            # Set aside, so that the next try pulls it anew; a read-only store stays as it is.
            self._set_aside(digest)
            raise

    def _set_aside(self, digest: str) -> None:
        try:
            self._provider.store.find(self._spec.name, digest, "crc32c")
        except SetupError as error:
            logger.error("%s", error)

    def _warm(self, loaded: Loaded) -> Served:
        """Run grey pictures through the whole model, a small one and one of its largest size.

        So the first client does not wait, and admission knows how long passes take.
        """
        spans = BatchSpans(self._spec.name)

        def on_pass(done: Pass) -> None:
            self.work.record_pass(done)
            spans.add(done)

        self._prepare(loaded)
        engine = Engine(loaded.pipeline, self.limits, on_pass=on_pass)
        served = Served(loaded, engine, self._estimator(loaded.pipeline, engine))
        try:
            for width_px, height_px in _warm_up_sizes(self._spec):
                self._warm_size(served, width_px, height_px)
        except BaseException:
            if engine.fatal:
                self._broken = f"Its device failed: {engine.fatal!r}"
            served.close()
            raise
        return served

    def _prepare(self, loaded: Loaded) -> None:
        prepare_replica(self._spec, loaded, self.limits, self._settings, self._provider)

    def _estimator(self, pipeline: AnyPipeline, engine: Engine) -> Estimator:
        return Estimator(pipeline, Forecast(engine.pace), self._spec.scale)

    def _warm_size(self, served: Served, width_px: int, height_px: int) -> None:
        """Run pictures of one size until its passes are timed: three for a model of few steps."""
        spec, pipeline = self._spec, served.pipeline
        grey = np.full((height_px, width_px, 3), 127, np.uint8)
        picture = Picture(grey, None) if spec.task.needs_picture else None
        request = complete(spec.task.request(), spec.defaults, spec.parameters)
        pixels = pipeline.fit(picture, request)
        for _ in range(_WARM_UP_ROWS):
            row = Row(RowInput(request, pixels, 0, time.monotonic() + _WARM_UP_TIMEOUT_S))
            served.engine.put([row])
            pipeline.restore(row.future.result(_WARM_UP_TIMEOUT_S), picture, request)
            if served.engine.pace.has_timed(row.progress.cost_px):
                return

    async def _swap(self) -> None:
        """Exchange until the configured digest is served, or an attempt to serve it has failed."""
        while (target := self._target) != self._ready().loaded.digest:
            old = self._ready().loaded.digest
            try:
                await self._swap_to(target)
            except Exception as error:
                self._error = _describe(error)
                self._metrics.count_swap(self._spec.name, old, failed=True)
                logger.error(
                    "%s@%s cannot be served, so %s is still served: %s",
                    self._spec.name,
                    target,
                    old,
                    self._error,
                )
                if target == self._target:
                    return
            else:
                self._error = ""
                self._metrics.count_swap(self._spec.name, old, failed=False)
        self._error = ""

    async def _swap_to(self, digest: str) -> None:
        # 1) Verify it and load it into host memory, beside the traffic.
        start_s = time.monotonic()
        staged = await asyncio.to_thread(self._load, digest, on_host=True)
        # 2) Exchange it while no request is inside.
        async with self._gate.exchange():
            served = await asyncio.to_thread(self._exchange, self._ready(), staged)
            old, self._served = self._ready(), served
        await asyncio.to_thread(old.close)
        # Engine and pipeline are in reference cycles, which keep gigabytes of weights alive.
        del old
        await asyncio.to_thread(gc.collect)
        self._announce(served, start_s)

    def _exchange(self, old: Served, staged: Loaded) -> Served:
        try:
            # A cancelled request leaves the gate before its row leaves the engine.
            if not old.engine.wait_idle(_IDLE_TIMEOUT_S):
                raise NotReady("The former model did not finish its rows.")
            old.pipeline.to("cpu")
            staged.pipeline.to(staged.device)
            return self._warm(staged)
        except BaseException:
            self._restore(old, staged)
            raise

    def _restore(self, old: Served, staged: Loaded) -> None:
        """Bring the former model back. If that fails, this replica must be replaced."""
        try:
            with suppress(Exception):
                staged.pipeline.to("cpu")
            staged.lease.close()
            old.pipeline.to(old.loaded.device)
            self._prepare(old.loaded)
        except BaseException as error:
            self._broken = f"The former model could not be restored: {error!r}"
            raise

    def _announce(self, served: Served, start_s: float) -> None:
        seconds = time.monotonic() - start_s
        digest, device = served.loaded.digest, served.loaded.device
        self._metrics.set_serving(self._spec.name, digest, seconds)
        logger.info("%s@%s ready on %s in %.1f s", self._spec.name, digest, device, seconds)


def _warm_up_sizes(spec: ModelSpec) -> list[tuple[int, int]]:
    """Width and height, px: a thumbnail, and the largest size that the network works at.

    A task without pictures has one size, which its request decides.
    """
    if not spec.task.needs_picture:
        return [(0, 0)]
    small = (_WARM_UP_PX, _WARM_UP_PX)
    if spec.scale > 1 and "steps" not in spec.parameters:  # a network that works in tiles
        return [small, (spec.tile_px, spec.tile_px)]
    return [small, *sorted(spec.buckets, key=lambda bucket: bucket[0] * bucket[1])[-1:]]


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, SetupError) else f"{type(error).__name__}: {error}"
