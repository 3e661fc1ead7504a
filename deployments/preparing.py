"""Prepares a loaded model's passes, and sees to it that nothing is compiled under traffic."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from deployments.engine.device import is_fatal
from deployments.engine.graphs import CudaGraphs
from deployments.engine.preparation import Preparation

if TYPE_CHECKING:
    from collections.abc import Generator

    from deployments.engine.grouping import GroupLimits
    from deployments.engine.pipeline import AnyPipeline
    from deployments.registry import CompileMode

logger = logging.getLogger("ray.serve.imagen.preparing")


def prepare(
    pipeline: AnyPipeline,
    request: Any,
    limits: GroupLimits,
    *,
    mode: CompileMode,
    graph_bytes: int | None,
    backend: str = "inductor",
) -> None:
    """Prepare a pipeline that is on its device and takes no rows yet.

    A failure is logged, and the passes run plain, unless the device itself has failed.

    Args:
        request: complete, with guidance where the family has it.
        limits: of a pass.
        mode: see `Preparation`.
        graph_bytes: what the allocator may reserve of a GPU, graphs included; None records none.
        backend: of torch.compile.
    """
    how = Preparation(mode, None if graph_bytes is None else CudaGraphs(graph_bytes), backend)
    if mode == "off" and how.recorder is None:
        return
    start_s = time.monotonic()
    try:
        with _compiling():
            count = pipeline.prepare(how, request, limits)
    except Exception as error:
        if is_fatal(error):
            raise
        logger.exception("Passes could not be prepared (compile: %s), and run plain.", mode)
        return
    seconds = time.monotonic() - start_s
    logger.info("%d passes prepared in %.1f s (compile: %s)", count, seconds, mode)


@contextmanager
def _compiling() -> Generator[None]:
    """Let torch compile within the context, and never afterwards."""
    torch.compiler.reset()  # what was compiled for a former model
    torch.compiler.set_stance("default")
    try:
        yield
    finally:
        torch.compiler.set_stance("eager_on_recompile")
