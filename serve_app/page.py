"""Serves the playground (docs/playground.md): the files below `playground/`, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import RedirectResponse
from starlette.staticfiles import StaticFiles

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from starlette.responses import Response
    from starlette.types import Scope

PATH = "/playground"
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' blob: data:",
    "connect-src": "'self'",
    "form-action": "'none'",
    "base-uri": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
}
"""Pictures are blobs, and previews of steps are data; nothing else comes from elsewhere."""
_HEADERS = {
    "Content-Security-Policy": "; ".join(f"{what} {where}" for what, where in _POLICY.items()),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Asked for anew each time, and answered with 304, so that a new version is whole at once.
    "Cache-Control": "no-cache",
    "Vary": "Accept",
}


class Files(StaticFiles):
    """The page's files, with an ETag each. They may only load what lies beside them."""

    def __init__(self) -> None:
        super().__init__(directory=Path(__file__).parent / "playground")

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


def add_page(app: FastAPI) -> None:
    """The page's files below `PATH`. The page itself is at the root, where `PATH` leads."""

    async def to_root(request: Request) -> Response:
        return RedirectResponse(f"{request.scope.get('root_path', '')}/")

    for path in (PATH, f"{PATH}/"):
        app.add_route(path, to_root, methods=["GET"], include_in_schema=False)
    add_files(app, PATH, Files())


def add_files(app: FastAPI, path: str, files: StaticFiles) -> None:
    """Serve files below a path, by a route.

    A mount would write its path into the request's `root_path`. Middleware and errors read that
    afterwards, to tell the application's prefix from the path below it.
    """

    async def file(request: Request) -> Response:
        return await files.get_response(request.path_params["path"], request.scope)

    app.add_route(f"{path}/{{path:path}}", file, methods=["GET"], include_in_schema=False)
