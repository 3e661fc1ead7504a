"""A request's work in one process, without a server: decode, fit, model, restore, encode.

    python -m benchmarks.http_overhead.direct ours PHOTO

prints `[]` once the model is loaded, and then, for each number on stdin, a JSON list with the
seconds of so many calls. `litserve` in place of `ours` does what the peers do for a request.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from benchmarks.http_overhead.systems import TASK
from benchmarks.server import LOCAL_CONFIG, OUR_BIN, PEERS_BIN, NotStarted
from deployments.settings import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    Call = Callable[[bytes], float]
    """Does one request, and returns its seconds."""


def ours(threads: int | None) -> Call:
    """One request through our engine."""
    from benchmarks.latency import measure
    from deployments.engine.engine import Engine
    from deployments.engine.grouping import GroupLimits
    from deployments.loader import build
    from deployments.registry import load_registry
    from deployments.settings import Settings
    from deployments.store.provider import Provider

    application = yaml.safe_load(LOCAL_CONFIG.read_text(encoding="utf-8"))["applications"][0]
    args = application["args"] | ({"torch_threads": threads} if threads else {})
    settings = Settings.model_validate(args)
    spec = load_registry(settings.models)[TASK]
    deployments = {each["name"]: each for each in application["deployments"]}
    tuning = deployments[TASK.deployment]["user_config"]
    provider = Provider(settings.models, settings.store)
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


def main(
    name: str, photo: Path, threads: Annotated[int | None, typer.Option(help="Of ours")] = None
) -> None:
    """Answer each line of stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark ends this process by closing stdin
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may come between the answers
    call, image = ours(threads) if name == "ours" else peers(), photo.read_bytes()
    print("[]", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps([call(image) for _ in range(int(line))]), file=answers, flush=True)


@contextmanager
def process(name: str, photo: Path, threads: int | None) -> Generator[Callable[[int], list[float]]]:
    """A process of this module, as a function from the number of calls to their seconds."""
    binaries = OUR_BIN if name == "ours" else PEERS_BIN
    command = [str(binaries / "python"), "-m", "benchmarks.http_overhead.direct", name, str(photo)]
    child = subprocess.Popen(
        [*command, *(["--threads", str(threads)] if threads else [])],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdin
    assert child.stdout
    questions, answers = child.stdin, child.stdout

    def answer() -> list[float]:
        if not (line := answers.readline()):
            raise NotStarted(f"{name}: the process of direct calls ended")
        return json.loads(line)

    def ask(calls: int) -> list[float]:
        print(calls, file=questions, flush=True)
        return answer()

    try:
        answer()
        yield ask
    finally:
        questions.close()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()


if __name__ == "__main__":
    typer.run(main)
