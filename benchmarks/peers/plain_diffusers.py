"""A plain FastAPI server around a stock diffusers pipeline, as tutorials write it.

For the torture set (docs/notes.md): Pillow opens the upload, and nothing else is done for it.

    .venv/bin/python -m uvicorn benchmarks.peers.plain_diffusers:app --port 8001
"""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from fastapi import FastAPI, Response, UploadFile
from PIL import Image

_MODEL = "starter_models/enhance"
_SIDE_PX = 64
"""Small, because colours are judged, not detail."""
app = FastAPI()


@cache
def pipeline() -> Any:
    return StableDiffusionXLImg2ImgPipeline.from_pretrained(
        _MODEL, dtype=torch.float32, local_files_only=True, add_watermarker=False
    )


@app.post("/img2img")
def img2img(image: UploadFile) -> Response:
    """The picture, a little changed, as PNG."""
    picture = Image.open(io.BytesIO(image.file.read())).convert("RGB")
    picture = picture.resize((_SIDE_PX, _SIDE_PX))
    result = pipeline()(
        prompt="", image=picture, strength=0.1, num_inference_steps=10, guidance_scale=1.0
    ).images[0]
    file = io.BytesIO()
    result.save(file, "PNG")
    return Response(file.getvalue(), media_type="image/png")
