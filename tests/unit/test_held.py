"""What a request holds while its model works: no more than the limit of bodies in memory counts."""

from __future__ import annotations

import base64
import gc
import json
import struct
import tracemalloc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from serve_app.v2 import kserve_pb2 as pb
from serve_app.v2.door import GrpcDoor
from tests.unit.fakes import FakeBackend, FakeBackends, app_of, chunks, picture_file, raw, result_of
from tests.unit.test_grpc import Call

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from deployments.contract import ImageJob, ImageResult

PICTURE = picture_file() + bytes(2**22)
SMALL = b"small"
CHUNK_BYTES = 2**16
MOST_BESIDE = 2**20
"""Of everything else, such as what the first request to an application sets up."""


@dataclass
class Measuring(FakeBackends):
    """Notes what is held when the model has the request, and what was at most before."""

    held_bytes: int = 0
    peak_bytes: int = 0

    def __getitem__(self, name: str) -> MeasuringOne:
        return MeasuringOne(self, name)


class MeasuringOne(FakeBackend):
    backends: Measuring

    async def __call__(self, job: ImageJob) -> ImageResult:
        gc.collect()
        self.backends.held_bytes, self.backends.peak_bytes = tracemalloc.get_traced_memory()
        assert job.image == PICTURE
        return result_of(job, self.name, image=SMALL)

    async def stream(self, job: ImageJob) -> AsyncIterator[Any]:
        yield (await self(job),)


def in_form() -> bytes:
    head = b'--cut\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    return head + PICTURE + b"\r\n--cut--\r\n"


def element() -> bytes:
    return struct.pack("<I", len(PICTURE)) + PICTURE


def in_json(before: str = "") -> bytes:
    return json.dumps({"image": before + base64.b64encode(PICTURE).decode()}).encode()


def in_tensor(**data: Any) -> bytes:
    return json.dumps(
        {"inputs": [{"name": "IMAGE", "datatype": "BYTES", "shape": [1], **data}]}
    ).encode()


FORM, JSON = "multipart/form-data; boundary=cut", "application/json"
COMIC, EDITS, INFER = "/api/v1/images/style/comic", "/v1/images/edits", "/v2/models/comic/infer"
HEAD = in_tensor(parameters={"binary_data_size": len(element())})
REQUESTS: dict[str, tuple[str, str, bytes]] = {
    "native form": (COMIC, FORM, in_form()),
    "native json": (COMIC, JSON, in_json()),
    "openai form": (EDITS, FORM, in_form()),
    "openai json": (EDITS, JSON, in_json("data:image/png;base64,")),
    "kserve bytes": (INFER, "application/octet-stream", HEAD + element()),
    "kserve json": (INFER, JSON, in_tensor(data=[base64.b64encode(PICTURE).decode()])),
}


# It collects the garbage of earlier tests too, such as sockets that never connected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("door", REQUESTS)
async def test_a_request_holds_its_picture_and_nothing_else(door: str) -> None:
    path, kind, body = REQUESTS[door]
    headers = {"Content-Type": kind}
    if kind == "application/octet-stream":
        headers["Inference-Header-Content-Length"] = str(len(HEAD))
    backends = Measuring()
    app = app_of(backends)
    parts = [body[at : at + CHUNK_BYTES] for at in range(0, len(body), CHUNK_BYTES)]
    tracemalloc.start()
    try:
        sent = await raw(app, path, chunks(parts), headers)
    finally:
        tracemalloc.stop()
    assert sent[0]["status"] == 200, sent
    assert backends.held_bytes < len(PICTURE) + MOST_BESIDE
    # A body is read in one go, so that only one request is at its peak.
    assert backends.peak_bytes < 3.1 * len(body)


async def test_a_call_over_grpc_holds_its_picture_beside_its_message() -> None:
    backends, call = Measuring(), Call()
    asked = pb.ModelInferRequest(model_name="comic", raw_input_contents=[element()])
    asked.inputs.add(name="IMAGE", datatype="BYTES", shape=[1])
    door = GrpcDoor(app_of(backends), enabled=True)
    tracemalloc.start()
    try:
        found = await door.call("ModelInfer", asked, call)
    finally:
        tracemalloc.stop()
    assert found.raw_output_contents[0].endswith(SMALL), call.details
    assert backends.held_bytes < len(PICTURE) + MOST_BESIDE
