"""`make bench-detail`: large kept-out photographs at full detail, beside the working size.

Runs the work of a replica in this process (fit, tiles, engine, restore), without a server. The
shipped photographs have 0.1 to 0.3 MP. `fine` ones repeat a photograph, mirrored, until the size is
reached, so that every pixel has detail of its own; `soft` ones are enlarged, as from a weak lens.
"""

from __future__ import annotations

import asyncio
import math
import resource
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from PIL import Image

from benchmarks import machine
from benchmarks.output import console, make_table
from deployments.catalogue import load_registry
from deployments.contract import EnhanceRequest, UpscaleRequest, complete
from deployments.engine.engine import Engine
from deployments.engine.grouping import GroupLimits
from deployments.engine.row import RowInput
from deployments.images import Picture
from deployments.loader import build
from deployments.making import Making
from deployments.registry import ModelSpec
from deployments.settings import Settings
from deployments.store.lockfile import load_lock
from deployments.store.provider import Provider
from deployments.tasks import Task
from deployments.tiling import tiles_of
from starter_models import measures
from starter_models.training.data import KEPT_OUT, photo

if TYPE_CHECKING:
    from deployments.contract import ImageRequest
    from deployments.engine.grouping import Pass
    from deployments.engine.pipeline import AnyPipeline
    from deployments.engine.row import Pixels, Row

_MAX_LEVEL = 255


@dataclass
class Model:
    """A model, and what its latest picture took."""

    spec: ModelSpec
    pipeline: AnyPipeline
    seconds: float = 0.0
    passes: Counter[int] = field(default_factory=Counter[int])

    def run(self, pixels: Pixels, request: ImageRequest) -> Pixels:
        """The result of a picture, with seed 0."""
        self.passes.clear()
        engine = Engine(self.pipeline, GroupLimits(self.spec.max_batch_size), on_pass=self._on_pass)
        start_s = time.perf_counter()
        try:
            return asyncio.run(self._result(engine, Picture(pixels, None), request))
        finally:
            self.seconds = time.perf_counter() - start_s
            engine.close()

    async def _result(self, engine: Engine, picture: Picture, given: ImageRequest) -> Pixels:
        async def put(row: Row) -> None:
            engine.put([row])

        async def on_pool(work: Any, *args: Any) -> Any:
            return await asyncio.to_thread(work, *args)

        request = complete(given, self.spec.defaults, self.spec.parameters)
        size = picture.width_px, picture.height_px
        grid = tiles_of(request, *size, self.spec.buckets)
        pixels = picture.rgb if grid else self.pipeline.fit(picture, request)
        making = Making(RowInput(request, pixels, 0, math.inf), grid)
        output = await making.output(put, 2 * self.spec.max_batch_size, on_pool)
        return self.pipeline.restore(output, picture, request).rgb

    def _on_pass(self, done: Pass) -> None:
        self.passes[len(done.rows)] += 1


def load(task: Task, models: Path) -> Model:
    """The model that a registry serves for a task."""
    settings = Settings(models=(models,), device="cpu", torch_threads=2)
    spec = load_registry(models)[task]
    pipeline = build(spec, Provider(load_lock(models), settings.store).ensure(spec), settings)
    return Model(spec, pipeline)


def fine(name: str, width_px: int, height_px: int) -> Pixels:
    """A photograph repeated, mirrored, so that every pixel has detail of its own."""
    pixels = _levels(photo(name))
    pad = (0, height_px - pixels.shape[0]), (0, width_px - pixels.shape[1]), (0, 0)
    return np.pad(pixels, [(0, max(after, 0)) for _, after in pad], mode="symmetric")[
        :height_px, :width_px
    ]


def soft(name: str, width_px: int, height_px: int) -> Pixels:
    """A photograph enlarged: no detail as fine as its pixels."""
    image = Image.fromarray(_levels(photo(name)))
    return np.array(image.resize((width_px, height_px), Image.Resampling.LANCZOS))


def spoiled(clean: Pixels) -> Pixels:
    """With noise, and then JPEG artefacts."""
    return _levels(measures.spoiled(clean.astype(np.float32) / np.float32(_MAX_LEVEL)))


def _levels(values: Any) -> Pixels:
    return (np.clip(values, 0, 1) * _MAX_LEVEL + 0.5).astype(np.uint8)


def _measured(pixels: Pixels, clean: Pixels) -> list[str]:
    db = measures.decibel(pixels, clean, white=_MAX_LEVEL)
    return [f"{db:.2f}", f"{measures.sharpness(Image.fromarray(pixels)):.0f}"]


def _rows(passes: Counter[int]) -> str:
    return ", ".join(f"{count} of {rows}" for rows, count in sorted(passes.items()))


def compare(model: Model, clean: Pixels, title: str, keep: Path | None) -> None:
    """Print how a photograph comes back, clean and spoiled, at full detail and working size."""
    table = make_table(
        title, ("input", "result"), ("dB", "Laplacian", "seconds", "passes by number of rows")
    )
    for kind, given in (("clean", clean), ("spoiled", spoiled(clean))):
        row = _measured(given, clean)
        table.add_row(kind, "the input itself", *row, "", "")
        for detail in ("working", "full"):
            result = model.run(given, EnhanceRequest(detail=detail))
            row = _measured(result, clean)
            table.add_row(kind, detail, *row, f"{model.seconds:.1f}", _rows(model.passes))
            if keep is not None:
                Image.fromarray(result).save(
                    keep / f"{title}-{kind}-{detail}.png".replace(" ", "-")
                )
        if keep is not None:
            Image.fromarray(given).save(keep / f"{title}-{kind}.png".replace(" ", "-"))
    console.print(table)


def main(
    models: Annotated[Path, typer.Option(help="Model registry")] = Path(
        "configs/models/starter.yaml"
    ),
    width: Annotated[int, typer.Option(help="Of the photographs, px")] = 4000,
    height: Annotated[int, typer.Option(help="Of the photographs, px")] = 3000,
    photos: Annotated[list[str] | None, typer.Option(help="Default: all kept-out ones")] = None,
    keep: Annotated[Path | None, typer.Option(help="Folder for the pictures")] = None,
) -> None:
    """Print dB and sharpness of full detail and working size, and what 2x of such a photo takes."""
    model = load(Task.ENHANCE, models)
    for name in photos or KEPT_OUT:
        short = name.split(":")[1].split(".")[0]
        for kind, make in (("fine", fine), ("soft", soft)):
            compare(model, make(name, width, height), f"{short} {kind}", keep)
    console.print(f"peak memory {_peak_mib()} MiB, enhance alone")
    upscaler = load(Task.UPSCALE, models)
    result = upscaler.run(fine(KEPT_OUT[1], width, height), UpscaleRequest(scale=2))
    console.print(
        f"upscale scale=2: {result.shape[1]} x {result.shape[0]} px in {upscaler.seconds:.1f} s; "
        f"peak memory {_peak_mib()} MiB"
    )
    console.print(f"{machine.processor()}, load {machine.load_average():.1f}, float32, 2 threads")


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    typer.run(main)
