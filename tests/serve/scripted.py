"""A deployment that follows the prompt: how Imagen behaves when a model misbehaves."""

from __future__ import annotations

import asyncio
import os

from deployments.contract import ImageJob, ImageResult
from deployments.errors import ModelFailed


class ScriptedModel:
    """Answers at once, or sleeps, fails, or dies, by the prompt."""

    def __init__(self) -> None:
        self._inside = 0

    async def status(self) -> dict[str, object]:
        return {"requests": self._inside, "start_s": 4.2}

    async def __call__(self, job: ImageJob) -> ImageResult:
        self._inside += 1
        try:
            return await self._act(job)
        finally:
            self._inside -= 1

    async def _act(self, job: ImageJob) -> ImageResult:
        prompt = getattr(job.request, "prompt", "")
        if prompt.startswith("sleep"):
            await asyncio.sleep(float(prompt.split()[1]))
        if prompt == "fail":
            raise ModelFailed("Scripted to fail.", value="fail", remedy="Do not ask for it.")
        if prompt == "break":
            raise ZeroDivisionError("at /srv/secret/path.py")
        if prompt == "die":
            os._exit(1)
        picture = job.image or b"drawn from nothing"
        return ImageResult(picture, "image/png", 1, 1, "scripted@0", 0, 1, 0.0)


class BrokenModel:
    """Never starts."""

    def __init__(self) -> None:
        raise RuntimeError("scripted not to start")
