"""CONTRIBUTING's example of a new task, applied to a copy of the project, serves a picture."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from deployments.settings import ROOT

if TYPE_CHECKING:
    from pathlib import Path

SERVED = """
import asyncio, io, httpx, numpy as np
from PIL import Image
from deployments import images
from deployments.contract import ImageResult, complete
from deployments.catalogue import load_registry
from deployments.settings import ClientSettings, LimitSettings, Settings
from deployments.tasks import Task
from serve_app.api import create_app
from serve_app.app import build
from starter_models import running

class Backends:
    def __getitem__(self, name):
        async def answer(job):
            picture = images.decode(job.image, LimitSettings())
            made = running.run(Task("posterize"), picture.rgb / np.float32(255), job.request)
            image = images.encode(images.Picture(
                (made * 255).round().astype(np.uint8), None), job.output_format, None)
            size = made.shape[1], made.shape[0]
            return ImageResult(image, "image/png", *size, "posterize", None, 1, 0.0)
        return answer

async def main():
    settings, clients = Settings(), ClientSettings(access={"auth": "off"})
    app = create_app(Backends(), load_registry(*settings.models), clients)
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(file, "PNG")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        url = Task("posterize").route
        answer = await client.post(url, files={"image": file.getvalue()}, data={"tones": "3"})
        assert answer.status_code == 200, answer.text
        with Image.open(io.BytesIO(answer.content)) as picture:
            assert sorted({level for _, level in picture.convert("L").getcolors()}) == [0, 127, 255]
        refused = await client.post(url, files={"image": file.getvalue()}, data={"tones": "1"})
        assert refused.status_code == 422
        described = (await client.get("/openapi.json")).json()
        assert url in described["paths"]

asyncio.run(main())
build({})
"""


def test_a_new_task_is_a_row_a_request_a_family_and_an_entry(tmp_path: Path) -> None:
    project = tmp_path / "project"
    for name in ("cli", "serve_app", "deployments", "benchmarks", "kuberay", "starter_models"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", project / "configs")
    apply_example(project)
    environment = {**os.environ, "PYTHONPATH": str(project), "IMAGEN_MODELS": str(tmp_path / "m")}
    for command in (["-m", "cli.main", "models", "resolve", "posterize"], ["-c", SERVED]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=project,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def apply_example(project: Path) -> None:
    """Edit the copy as the section says."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Add a task\n")[2]
    section = section.partition("\n## ")[0]
    blocks = dict(re.findall(r"\*\*`([^`]+)`\*\*.*?```\w+\n(.*?)```", section, re.DOTALL))
    assert len(blocks) == 4
    for path, block in blocks.items():
        file = project / path
        text = file.read_text() if file.exists() else ""
        if path.endswith("tasks.py"):
            known = "    ImageRequest,\n"
            text = text.replace(known, f"{known}    PosterizeRequest,\n", 1)
            rows, attribute, rest = text.rpartition("\n    request: type[ImageRequest]\n")
            file.write_text(rows + block + attribute + rest)
        elif path.endswith("contract.py"):
            before, marker, after = text.partition("R = TypeVar")
            file.write_text(before + block + "\n\n" + marker + after)
        else:
            file.write_text(text + ("\n" if text else "") + block)
    config = project / "starter_models/posterize/config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"white": 255}))
