"""What clients sent comes back in errors as plain text, through every door."""

from __future__ import annotations

import base64
import json
import re
import struct
from typing import Any

import pytest

from deployments.errors import InvalidParameter, RequestError, plain
from serve_app.v2 import kserve_pb2 as pb
from serve_app.v2.door import GrpcDoor
from tests.unit.fakes import app_of, picture_file, send
from tests.unit.test_grpc import Call

ROUTE, EDITS, INFER = "/api/v1/images/style/comic", "/v1/images/edits", "/v2/models/comic/infer"
PICTURE = picture_file()
PDF = b"%PDF-1.7\n%\xe2\xe3\x00"
PDF_SHOWN = r"a file that starts with %PDF-1.7\n%\xe2\xe3\x00"
APP = app_of()


async def by_form(image: bytes, fields: dict[str, str], route: str = ROUTE) -> str:
    answer = await send(APP, "POST", route, files={"image": ("a.jpg", image)}, data=fields)
    return message_of(answer.status_code, answer.json())


async def by_json(image: bytes, fields: dict[str, str], route: str = ROUTE) -> str:
    body = {"image": base64.b64encode(image).decode(), **fields}
    text, kind = json.dumps(body), {"Content-Type": "application/json"}
    answer = await send(APP, "POST", route, content=text, headers=kind)
    return message_of(answer.status_code, answer.json())


async def by_openai(image: bytes, fields: dict[str, str]) -> str:
    return await by_form(image, {"model": "comic", **fields}, EDITS)


async def by_openai_in_json(image: bytes, fields: dict[str, str]) -> str:
    return await by_json(image, {"model": "comic", **fields}, EDITS)


async def by_kserve(image: bytes, fields: dict[str, str]) -> str:
    size = {"binary_data_size": len(image) + 4}
    head = {
        "inputs": [{"name": "IMAGE", "shape": [1], "datatype": "BYTES", "parameters": size}],
        "parameters": fields,
    }
    text = json.dumps(head).encode()
    answer = await send(
        APP,
        "POST",
        INFER,
        content=text + struct.pack("<I", len(image)) + image,
        headers={"Inference-Header-Content-Length": str(len(text))},
    )
    return message_of(answer.status_code, answer.json())


async def by_grpc(image: bytes, fields: dict[str, str]) -> str:
    asked = pb.ModelInferRequest(model_name="comic")
    asked.inputs.add(name="IMAGE", datatype="BYTES", shape=[1]).contents.bytes_contents.append(
        image
    )
    given = json.dumps(fields).encode()  # in a tensor, because it may hold what no text does
    tensor = asked.inputs.add(name="PARAMETERS", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(given)
    call = Call()
    await GrpcDoor(APP, enabled=True).call("ModelInfer", asked, call)
    assert call.code.name == "INVALID_ARGUMENT", call.details
    return call.details


DOORS = [by_form, by_json, by_openai, by_openai_in_json, by_kserve, by_grpc]


def message_of(status: int, document: dict[str, Any]) -> str:
    """The one text of an error, whatever its protocol."""
    assert 400 <= status < 500, document
    error = document.get("error")
    if isinstance(error, dict):
        return error["message"]
    return error or document["detail"]


@pytest.mark.parametrize("ask", DOORS)
async def test_a_file_that_is_no_picture_is_shown_as_text(ask: Any) -> None:
    assert PDF_SHOWN in await ask(PDF, {})


@pytest.mark.parametrize("ask", DOORS)
async def test_a_name_in_the_place_of_a_file_is_shown_as_it_is(ask: Any) -> None:
    told = await ask("Größe.jpg".encode(), {})
    assert "starts with Größe.jpg)" in told
    told = await ask(b"holiday/photo.jpg", {})
    assert "starts with holiday/photo.jpg)" in told
    assert "Send the file itself, not its name" in told


@pytest.mark.parametrize("ask", [by_json, by_openai_in_json, by_kserve, by_grpc])
@pytest.mark.parametrize("name", ["steps\ud800", "a\x1b[31m", "\ud800" * 300])
async def test_odd_names_and_values_are_escaped(ask: Any, name: str) -> None:
    told = await ask(PICTURE, {name: name})
    assert told.isprintable(), ascii(told)
    assert len(told) < 1_500
    assert re.search(r"\\ud800|\\x1b", told)


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        (b"photo.jpg", "photo.jpg"),
        ("größe".encode(), "größe"),
        (b"\xff\xd8\x00\n", r"\xff\xd8\x00\n"),
        (bytearray(b"\x1b[2J"), r"\x1b[2J"),
        ("a\ud800\tb", r"a\ud800\tb"),
        (b"\xf0\x9f\x98\x80" * 500, "\U0001f600" * 200),
        (b"\x00" * 500, r"\x00" * 50),
        ([7, 8], "[7, 8]"),
        (None, "None"),
    ],
)
def test_a_value_is_plain_text_of_a_sensible_length(sent: object, shown: str) -> None:
    assert plain(sent) == shown
    assert RequestError("No.", value=sent).value == shown


def test_a_fact_is_plain_text_too() -> None:
    assert str(InvalidParameter("The field a\ud800\n is odd.")) == r"The field a\ud800\n is odd."
