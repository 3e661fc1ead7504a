"""The starter models as plain functions, by the way a request takes through a replica.

Pictures are `H x W x 3`, float32, sRGB in [0, 1]; results are rounded to 8 bits, as a client gets
them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from deployments import images
from deployments.catalogue import load_registry
from deployments.contract import complete
from deployments.engine.engine import Engine
from deployments.engine.row import Row, RowInput
from deployments.loader import build
from deployments.settings import Settings
from deployments.store.folder_bucket import local_folder
from deployments.tasks import Task

if TYPE_CHECKING:
    from deployments.contract import ImageRequest
    from deployments.engine.pipeline import AnyPipeline
    from deployments.registry import ModelSpec
    from starter_models.training.data import Picture

REGISTRY = Path("configs/models/starter.yaml")
PERCEPTUAL = "upscale-perceptual"
"""The upscaler that is not the default."""


def run(
    task: Task, picture: Picture | None, request: ImageRequest | None = None, model: str = ""
) -> Picture:
    """What the service makes of a picture with seed 0.

    Args:
        task: whose starter model runs.
        picture: `H x W x 3` in [0, 1]; None if the task needs none.
        request: None for the model's defaults.
        model: its name, if the task has several; "" for the default.

    Returns:
        `H x W x 3`, or `H x W x 4` if the result has an alpha channel.
    """
    spec, pipeline = _loaded(task, model)
    request = complete(request or task.request(), spec.defaults, spec.parameters)
    source = None if picture is None else images.Picture(np.asarray(to_image(picture)), None)
    row = Row(RowInput(request, pipeline.fit(source, request), seed=0, deadline_s=math.inf))
    engine = Engine(pipeline)
    engine.put([row])
    result = pipeline.restore(row.future.result(), source, request)
    engine.close()
    rgb = from_image(Image.fromarray(result.rgb))
    return rgb if result.alpha is None else np.dstack([rgb, result.alpha / np.float32(255)])


def to_image(picture: Picture) -> Image.Image:
    """`H x W x 3` or `H x W`, clipped and rounded to 8 bits."""
    return Image.fromarray((np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8))


def from_image(image: Image.Image) -> Picture:
    """The inverse of `to_image`."""
    return np.asarray(image, np.float32) / 255


@lru_cache
def _loaded(task: Task, model: str) -> tuple[ModelSpec, AnyPipeline]:
    spec = load_registry(REGISTRY, serve={task: (model,)} if model else None)[task]
    folder = local_folder(spec.origins[0].source)
    return spec, build(spec, folder, Settings(device="cpu", torch_threads=2))
