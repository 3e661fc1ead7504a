"""A result as a response: the picture, and headers that describe it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import JSONResponse, Response

from deployments.notes import documents
from serve_app.protocols.inline import base64_of

if TYPE_CHECKING:
    from deployments.contract import ImageResult


def image_headers(result: ImageResult) -> list[tuple[str, str]]:
    """What the headers of an answer say of its picture; one for each note."""
    headers = {
        "X-Imagen-Model": result.model,
        "X-Imagen-Batch-Size": str(result.batch_size),
        "X-Imagen-Gpu-Seconds": f"{result.gpu_seconds:.4f}",
        "X-Imagen-Determinism": result.determinism,
        "X-Imagen-Size": f"{result.width_px}x{result.height_px}",
        "Server-Timing": ", ".join(
            f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in result.timings_s.items()
        ),
        "Vary": "Accept",
        "Cache-Control": "no-store",
    }
    if result.seed is not None:
        headers["X-Imagen-Seed"] = str(result.seed)
    notes = [("X-Imagen-Note", f"{one.code}: {one.text}") for one in result.notes]
    return [*headers.items(), *notes]


def image_response(result: ImageResult) -> Response:
    """The picture, and headers that describe it."""
    response = Response(result.image, media_type=result.media_type)
    for name, value in image_headers(result):
        response.headers.append(name, value)
    return response


def json_response(result: ImageResult) -> Response:
    """The picture as base64, with what the headers of `image_response` say."""
    document = {
        "image": base64_of(result.image),
        "media_type": result.media_type,
        "width_px": result.width_px,
        "height_px": result.height_px,
        "model": result.model,
        "seed": result.seed,
        "batch_size": result.batch_size,
        "gpu_seconds": result.gpu_seconds,
        "determinism": result.determinism,
        "timings_s": result.timings_s,
        "notes": documents(result.notes),
    }
    return JSONResponse(document, headers={"Vary": "Accept", "Cache-Control": "no-store"})
