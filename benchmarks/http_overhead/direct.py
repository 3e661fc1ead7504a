"""A request's work in a process of its own, without a server: decode, fit, model, restore, encode.

Functions import the models, which this process does not need.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import yaml

from benchmarks.http_overhead.systems import TASK
from benchmarks.server import LOCAL_CONFIG

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    Call = Callable[[bytes], float]
    """Does one request, and returns its seconds."""

_calls: list[Call] = []
"""Of a process of direct calls: the only one."""


def ours() -> Call:
    """One request through our engine."""
    from benchmarks.latency import measure
    from deployments.catalogue import load_registry
    from deployments.engine.engine import Engine
    from deployments.engine.grouping import GroupLimits
    from deployments.loader import build
    from deployments.settings import Settings
    from deployments.store.lockfile import load_lock
    from deployments.store.provider import Provider

    application = yaml.safe_load(LOCAL_CONFIG.read_text(encoding="utf-8"))["applications"][0]
    settings = Settings.model_validate(application["args"])
    spec = load_registry(*settings.models)[TASK]
    deployments = {each["name"]: each for each in application["deployments"]}
    tuning = deployments[TASK.deployment]["user_config"]
    provider = Provider(load_lock(*settings.models), settings.store)
    pipeline = build(spec, provider.ensure(spec), settings)
    engine = Engine(pipeline, GroupLimits(tuning["max_batch_size"]))
    return lambda image: measure(spec, pipeline, engine, image)["total"]


def peers() -> Call:
    """One request through what the peers do for it."""
    from benchmarks.peers.work import load

    work = load(TASK)

    def call(image: bytes) -> float:
        start_s = time.perf_counter()
        work.serve([(image, {})])
        return time.perf_counter() - start_s

    return call


def _load(make: Callable[[], Call]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark itself ends this process
    _calls.append(make())


def _repeat(image: bytes, calls: int) -> list[float]:
    return [_calls[0](image) for _ in range(calls)]


@contextmanager
def process(make: Callable[[], Call], image: bytes) -> Generator[Callable[[int], list[float]]]:
    """A process of its own, as a function from the number of calls to their seconds.

    Args:
        make: `ours` or `peers`.
        image: an image file, which every call gets.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=_load, initargs=(make,)) as pool:
        yield lambda calls: pool.submit(_repeat, image, calls).result()
