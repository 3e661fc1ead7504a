"""Imagen's own application, whose models run `SleepingPass` in place of their networks.

`import_path: benchmarks.growth.sleeping_app:build` in a Serve config.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import serve_app.app
from benchmarks.growth.profiles import refiner_on_h100
from deployments.model import ModelDeployment

if TYPE_CHECKING:
    from ray.serve import Application

    from deployments.loader import Loaded
    from deployments.registry import ModelSpec
    from deployments.settings import Settings


class SleepingModel(ModelDeployment):
    """A replica like any other, but for its passes."""

    def __init__(self, spec: ModelSpec, settings: Settings) -> None:
        from benchmarks.growth.sleeping import SleepingPass
        from deployments import hosting

        load, times = hosting.load, refiner_on_h100()

        def load_sleeping(*args: Any, **options: Any) -> Loaded:
            loaded = load(*args, **options)
            return replace(loaded, pipeline=SleepingPass(loaded.pipeline, times))

        hosting.load = load_sleeping  # in the process of this replica alone
        super().__init__(spec, settings)


def build(args: dict[str, Any]) -> Application:
    """`serve_app.app.build`, with models that sleep."""
    serve_app.app.ModelDeployment = SleepingModel
    return serve_app.app.build(args)
