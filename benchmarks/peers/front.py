"""What the multipart peers have in common before the model: our routes, and a form read whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from deployments.tasks import Task

if TYPE_CHECKING:
    from starlette.requests import Request

    from benchmarks.peers.work import Upload

PREFIX: Final = "/api/v1/images"
TASKS: Final = {
    "upscale": Task.UPSCALE,
    "enhance": Task.ENHANCE,
    "style/comic": Task.COMIC,
    "style/aged": Task.AGED,
    "background/remove": Task.BACKGROUND,
}


def media_type(upload: Upload) -> str:
    """Of the answer to an upload."""
    return f"image/{upload[1].get('output_format', 'png')}"


async def read_upload(request: Request) -> Upload:
    """The file of the field `image`, and every other field."""
    async with request.form() as form:
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        file = form["image"]
        if isinstance(file, str):
            raise ValueError("image must be a file")
        return await file.read(), fields
