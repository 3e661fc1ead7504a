"""LitServe: five LitAPIs behind one server, each with its own worker process and batching.

Configured with Imagen's batch limits and request timeout, one API process, and a batch timeout of
10 ms: with its default of 0, idle workers spin and take the cores from the others. In its favour, a
batch is decoded and encoded on two threads, as in Imagen.
"""

# No `from __future__ import annotations`: LitServe reads the annotations as objects.
from typing import Annotated

import litserve
import typer
from fastapi import Depends, Request, Response

from benchmarks.peers.front import PREFIX, TASKS, media_type, read_upload
from benchmarks.peers.work import MAX_BATCH, TIMEOUT_S, Upload, Work, load
from deployments.tasks import Task


async def _upload(request: Request) -> Upload:
    return await read_upload(request)


class Api(litserve.LitAPI):
    """One model."""

    def __init__(self, path: str, task: Task) -> None:
        super().__init__(
            max_batch_size=MAX_BATCH[task], batch_timeout=0.01, api_path=f"{PREFIX}/{path}"
        )
        self._task = task
        self._work: Work | None = None

    def setup(self, device: str) -> None:
        self._work = load(self._task)

    # LitServe itself would read the upload as a form with an open file, which cannot be pickled.
    def decode_request(self, request: Annotated[tuple, Depends(_upload)]) -> Upload:
        return request

    def batch(self, inputs: list[Upload]) -> list[Upload]:
        return inputs

    def predict(self, uploads: list[Upload]) -> list[tuple[Upload, bytes]]:
        assert self._work
        return list(zip(uploads, self._work.serve(uploads), strict=True))

    def unbatch(self, output: list[tuple[Upload, bytes]]) -> list[tuple[Upload, bytes]]:
        return output

    def encode_response(self, output: tuple[Upload, bytes]) -> Response:
        upload, picture = output
        return Response(picture, media_type=media_type(upload))


def main(port: int) -> None:
    """Serve until stopped."""
    apis = [Api(path, task) for path, task in TASKS.items()]
    server = litserve.LitServer(apis, accelerator="cpu", devices=1, timeout=TIMEOUT_S)
    server.run(
        host="127.0.0.1",
        port=port,
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
    )


if __name__ == "__main__":
    typer.run(main)
