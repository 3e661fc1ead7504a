"""Prepares a loaded model's passes, and sees to it that nothing is compiled under traffic."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from deployments.contract import complete
from deployments.engine.device import is_fatal
from deployments.engine.graphs import CudaGraphs
from deployments.engine.preparation import Preparation, compiling
from deployments.gpu.target import this_target
from deployments.store import compiled

if TYPE_CHECKING:
    from deployments.engine.grouping import GroupLimits
    from deployments.engine.pipeline import AnyPipeline
    from deployments.loader import Loaded
    from deployments.registry import CompileMode, ModelSpec
    from deployments.settings import Settings
    from deployments.store.provider import Provider

logger = logging.getLogger("ray.serve.imagen.preparing")


def prepare_replica(
    spec: ModelSpec, loaded: Loaded, limits: GroupLimits, settings: Settings, provider: Provider
) -> None:
    """Prepare what the registry's entry asks for, with the artefact of this device if there is one.

    What fails is logged, and runs plain, unless the device itself has failed.
    """
    if spec.compile != "off":
        target = this_target(settings.device)
        key = compiled.CompiledKey(spec.name, loaded.digest, target, spec.compile, shapes_of(spec))
        into = torch.compiler.load_cache_artifacts
        compiled.load(provider.store, provider.lock, key, into)
    try:
        prepare(
            spec,
            loaded.pipeline,
            limits,
            mode=spec.compile,
            graph_bytes=loaded.cap_bytes if spec.graphs else None,
        )
    except Exception as error:
        if is_fatal(error):
            logger.error(
                "The device failed while passes of %s were prepared: %r. If that repeats, set"
                " `graphs: false` in its registry entry.",
                spec.name,
                error,
            )
            raise
        logger.exception("Passes of %s could not be prepared, and run plain.", spec.name)


def shapes_of(spec: ModelSpec) -> str:
    """Fingerprint of what is compiled of a model, for the key of its artefact."""
    sizes = spec.buckets[: spec.compiled_buckets] or ((spec.tile_px, spec.tile_px),)
    return ",".join(f"{width}x{height}" for width, height in sizes)


def prepare(
    spec: ModelSpec,
    pipeline: AnyPipeline,
    limits: GroupLimits,
    *,
    mode: CompileMode,
    graph_bytes: int | None,
    backend: str = "inductor",
) -> None:
    """Prepare a pipeline that is on its device and takes no rows yet.

    Args:
        spec: of the model.
        pipeline: its pipeline.
        limits: of a pass.
        mode: what is compiled, see `Preparation`.
        graph_bytes: what the allocator may reserve of a GPU, graphs included; None records none.
        backend: of torch.compile.

    Raises:
        Exception: whatever torch raises where it cannot compile or record.
    """
    recorder = None if graph_bytes is None else CudaGraphs(graph_bytes)
    how = Preparation(mode, spec.compiled_buckets, recorder, backend)
    if mode == "off" and how.recorder is None:
        return
    request = complete(spec.task.request(), spec.defaults, spec.parameters)
    start_s = time.monotonic()
    try:
        with compiling() if mode != "off" else nullcontext():
            count = pipeline.prepare(how, request, limits)
    except Exception as error:
        if not is_fatal(error):
            how.undo()
        raise
    seconds = time.monotonic() - start_s
    logger.info("%d passes of %s prepared in %.1f s (compile: %s)", count, spec.name, seconds, mode)
