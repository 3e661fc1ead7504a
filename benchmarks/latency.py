"""`make bench`: seconds of each task for one photo, with the model's defaults.

Runs the work of a replica in this process (decode, fit, engine, restore, encode), without a server.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks import machine
from benchmarks.output import console, make_table
from deployments import images
from deployments.catalogue import load_registry
from deployments.contract import complete
from deployments.engine.engine import Engine
from deployments.engine.grouping import GroupLimits
from deployments.engine.row import Row, RowInput
from deployments.loader import build
from deployments.registry import ModelSpec
from deployments.settings import LimitSettings, Settings
from deployments.store.lockfile import load_lock
from deployments.store.provider import Provider
from starter_models.training.data import photo_bytes

if TYPE_CHECKING:
    from deployments.engine.pipeline import AnyPipeline

TARGET_S = 1.5
STAGES = ("decode", "model", "encode", "total")


def measure(
    spec: ModelSpec, pipeline: AnyPipeline, engine: Engine, image: bytes
) -> dict[str, float]:
    """Seconds of each of `STAGES` for one request."""
    request = complete(spec.task.request(), spec.defaults, spec.parameters)
    start_s = time.perf_counter()
    picture = images.decode(image, LimitSettings())
    pixels = pipeline.fit(picture, request)
    decoded_s = time.perf_counter()
    row = Row(RowInput(request, pixels, seed=0, deadline_s=time.monotonic() + 600))
    engine.put([row])
    output = row.future.result()
    done_s = time.perf_counter()
    images.encode(pipeline.restore(output, picture, request), "png", {"seed": 0})
    end_s = time.perf_counter()
    stages = (decoded_s - start_s, done_s - decoded_s, end_s - done_s, end_s - start_s)
    return dict(zip(STAGES, stages, strict=True))


def main(
    models: Annotated[Path, typer.Option(help="Model registry")] = Path(
        "configs/models/starter.yaml"
    ),
    image: Annotated[
        Path | None, typer.Option(help="A photo; default: an astronaut, 512x512")
    ] = None,
    runs: Annotated[int, typer.Option(help="Timed runs of each task")] = 7,
    threads: Annotated[int, typer.Option(help="Torch threads")] = 2,
) -> None:
    """Print seconds by task and stage: median, and the range of the total."""
    data = image.read_bytes() if image else photo_bytes("skimage:astronaut.png")
    header = images.read_header(data, LimitSettings())
    settings = Settings(models=(models,), device="cpu", torch_threads=threads)
    provider = Provider(load_lock(models), settings.store)
    title = f"{header.width_px}x{header.height_px} photo, defaults, {threads} threads"
    figures = (*(f"{stage} s" for stage in STAGES), "min", "max")
    table = make_table(title, ("task", "model"), figures)
    late: list[str] = []
    for spec in load_registry(models).values():
        pipeline = build(spec, provider.ensure(spec), settings)
        engine = Engine(pipeline, GroupLimits(1))
        measure(spec, pipeline, engine, data)
        samples = [measure(spec, pipeline, engine, data) for _ in range(runs)]
        engine.close()
        medians = [statistics.median(s[stage] for s in samples) for stage in STAGES]
        totals = [s["total"] for s in samples]
        cells = [f"{v:.3f}" for v in (*medians, min(totals), max(totals))]
        table.add_row(str(spec.task), spec.name, *cells)
        if medians[-1] > TARGET_S:
            late.append(str(spec.task))
    console.print(table)
    console.print(
        f"{machine.processor()}, load {machine.load_average():.1f}, "
        f"float32 on {settings.device}; {runs} runs after one warm-up; target {TARGET_S} s: "
        + (f"missed by {', '.join(late)}" if late else "met")
    )


if __name__ == "__main__":
    typer.run(main)
