"""What the multipart peers share before the model: our routes, and reading a form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from deployments.tasks import Task

if TYPE_CHECKING:
    from starlette.requests import Request

    from benchmarks.peers.work import Upload

PREFIX: Final = "/api/v1/images"
TASKS: Final = {task.route.removeprefix(f"{PREFIX}/"): task for task in Task if task.needs_picture}
"""The tasks by what follows the prefix in their routes."""


def media_type(upload: Upload) -> str:
    """The media type of the answer to an upload."""
    return f"image/{upload[1].get('output_format', 'png')}"


async def read_upload(request: Request) -> Upload:
    """The file of the field `image`, and every other field.

    Raises:
        ValueError: `image` is text.
    """
    async with request.form() as form:
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        file = form["image"]
        if isinstance(file, str):
            raise ValueError("image must be a file")
        return await file.read(), fields
