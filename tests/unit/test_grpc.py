"""Calls over gRPC that no client of Triton makes; tests/serve/test_grpc.py has those it makes."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
import pytest

from cli.config import SERVICER, SIZE_VARIABLE, grpc_environment
from deployments.errors import ConfigError, Full
from deployments.settings import (
    AccessSettings,
    ClientSettings,
    GrpcSettings,
    KeyLimits,
    LimitSettings,
    UploadSettings,
    parse_settings,
)
from serve_app.access.editing import create_key
from serve_app.api import create_app
from serve_app.v2 import kserve_pb2 as pb
from serve_app.v2.door import GrpcDoor, check_message_size
from tests.unit.fakes import OPEN_TO_ALL, REGISTRY, FakeBackends, app_of, picture_file

if TYPE_CHECKING:
    from pathlib import Path

PICTURE = picture_file()
Tensor = pb.ModelInferRequest.InferInputTensor
Contents = pb.InferTensorContents


@dataclass
class Call:
    """What Serve tells of a call, and is told."""

    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""
    metadata: list[tuple[str, str | bytes]] = field(default_factory=list)
    trailing: list[tuple[str, str]] = field(default_factory=list)

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        return self.metadata

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5"

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str]]) -> None:
        self.trailing = trailing_metadata


def door(backends: FakeBackends | None = None) -> GrpcDoor:
    return GrpcDoor(app_of(backends or FakeBackends()), enabled=True)


def image(**changes: object) -> pb.ModelInferRequest.InferInputTensor:
    return Tensor(**{"name": "IMAGE", "datatype": "BYTES", "shape": [1], **changes})


request = pb.ModelInferRequest


async def test_a_picture_may_be_among_the_contents_of_its_input() -> None:
    backends, call = FakeBackends(), Call()
    asked = request(
        model_name="comic", id="mine", inputs=[image(contents=Contents(bytes_contents=[PICTURE]))]
    )
    asked.parameters["strength"].double_param = 0.5
    asked.parameters["seed"].int64_param = 7
    found = await door(backends).call("ModelInfer", asked, call)
    assert call.code is grpc.StatusCode.OK, call.details
    assert list(found.raw_output_contents) == [struct.pack("<I", len(PICTURE)) + PICTURE]
    assert (found.id, found.parameters["seed"].int64_param) == ("mine", 7)
    assert found.parameters["model"].string_param == "comic-starter@0123abcd"
    assert backends.jobs[0].request.strength == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        (request(), "NOT_FOUND", "no such model"),
        (request(model_name="../health"), "NOT_FOUND", "no such model"),
        (request(model_name="comic?a=b"), "NOT_FOUND", "no such model"),
        (
            request(model_name="comic", model_version="2"),
            "NOT_FOUND",
            "no such version",
        ),
        (request(model_name="comic"), "INVALID_ARGUMENT", "needs a picture"),
        (
            request(model_name="comic", inputs=[image()], raw_input_contents=[b""] * 2),
            "INVALID_ARGUMENT",
            "one entry for each input",
        ),
        (
            request(model_name="comic", inputs=[image()], raw_input_contents=[b"\x09ab"]),
            "INVALID_ARGUMENT",
            "not one element",
        ),
        (
            request(
                model_name="comic",
                inputs=[image(contents=Contents(bytes_contents=[PICTURE, PICTURE]), shape=[2])],
            ),
            "INVALID_ARGUMENT",
            "one element",
        ),
        (
            request(
                model_name="comic",
                inputs=[image(contents=Contents(fp32_contents=[1.0]), datatype="FP32")],
            ),
            "INVALID_ARGUMENT",
            "not of type BYTES",
        ),
    ],
)
async def test_what_is_wrong_is_refused(asked: pb.ModelInferRequest, code: str, words: str) -> None:
    backends, call = FakeBackends(), Call()
    await door(backends).call("ModelInfer", asked, call)
    assert call.code is grpc.StatusCode[code], call.details
    assert words in call.details
    assert not backends.jobs


async def test_a_key_of_odd_letters_is_an_unknown_one(tmp_path: Path) -> None:
    clients = ClientSettings(access=AccessSettings(keys=tmp_path / "keys.yaml"))
    (tmp_path / "keys.yaml").write_text("keys: []\n")
    app = create_app(FakeBackends(), REGISTRY, clients)
    for odd in ("Bearer \xe9", "Bearer \ud800", "Bearer a\nb", b"Bearer a"):
        call = Call(metadata=[("authorization", odd)])
        await GrpcDoor(app, enabled=True).call("ServerMetadata", pb.ServerMetadataRequest(), call)
        assert call.code is grpc.StatusCode.UNAUTHENTICATED, call.details


async def test_two_keys_are_none(tmp_path: Path) -> None:
    clients = ClientSettings(access=AccessSettings(keys=tmp_path / "keys.yaml"))
    _, token = create_key(tmp_path / "keys.yaml", "alice", KeyLimits())
    app, mine = create_app(FakeBackends(), REGISTRY, clients), ("authorization", f"Bearer {token}")
    for metadata, code in (([mine], "OK"), ([("authorization", "x"), mine], "UNAUTHENTICATED")):
        call = Call(metadata=metadata)
        await GrpcDoor(app, enabled=True).call("ServerMetadata", pb.ServerMetadataRequest(), call)
        assert call.code is grpc.StatusCode[code], call.details


async def test_metadata_about_jobs_are_not_silently_ignored() -> None:
    backends = FakeBackends()
    call = Call(metadata=[("prefer", "respond-async"), ("idempotency-key", "a")])
    asked = request(model_name="comic", inputs=[image(contents=Contents(bytes_contents=[PICTURE]))])
    await door(backends).call("ModelInfer", asked, call)
    assert [one.text.split()[0] for one in backends.jobs[0].notes] == ["Prefer", "Idempotency-Key"]


async def test_a_busy_service_says_when_to_come_again() -> None:
    full = Full("The queue is full.", value="comic", remedy="Wait.", retry_after_s=2.1)
    call, asked = Call(), request(model_name="comic")
    asked.inputs.append(image(contents=Contents(bytes_contents=[PICTURE])))
    await door(FakeBackends(error=full)).call("ModelInfer", asked, call)
    assert call.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert call.trailing == [("retry-after", "3")]
    assert call.details.endswith("Retry-After: 3.")


@pytest.mark.parametrize(("times", "code"), [(1.5, "RESOURCE_EXHAUSTED"), (3, "OK")])
async def test_a_message_is_held_beside_its_picture(times: float, code: str) -> None:
    size = int(times * len(PICTURE))
    clients = ClientSettings(
        access=OPEN_TO_ALL,
        limits=LimitSettings(max_body_bytes=size),
        uploads=UploadSettings(max_held_bytes=size),
    )
    held = GrpcDoor(create_app(FakeBackends(), REGISTRY, clients), enabled=True)
    for _ in range(2):  # what the first one held is free again
        call, asked = Call(), request(model_name="comic")
        asked.inputs.append(image(contents=Contents(bytes_contents=[PICTURE])))
        await held.call("ModelInfer", asked, call)
        assert call.code is grpc.StatusCode[code], call.details


async def test_what_would_be_ignored_is_refused() -> None:
    def plain() -> pb.ModelInferRequest:
        contents = Contents(bytes_contents=[PICTURE])
        return request(model_name="comic", inputs=[image(contents=contents)])

    of_output, of_input, of_request, mixed = (plain() for _ in range(4))
    of_output.outputs.add(name="IMAGE").parameters["binary_data"].bool_param = False
    of_input.inputs[0].parameters["binary_data_size"].int64_param = 7
    of_request.parameters["stepz"].SetInParent()
    mixed.inputs[0].contents.fp32_contents.append(1.0)
    for asked in (of_output, of_input, of_request, mixed):
        backends, call = FakeBackends(), Call()
        await door(backends).call("ModelInfer", asked, call)
        assert call.code is grpc.StatusCode.INVALID_ARGUMENT, asked
        assert not backends.jobs


async def test_both_raw_and_other_contents_are_refused() -> None:
    call = Call()
    element = struct.pack("<I", len(PICTURE)) + PICTURE
    both = image(contents=Contents(bytes_contents=[PICTURE]))
    asked = request(model_name="comic", inputs=[both], raw_input_contents=[element])
    await door().call("ModelInfer", asked, call)
    assert call.code is grpc.StatusCode.INVALID_ARGUMENT


def test_others_are_never_served_without_a_key() -> None:
    values = {"grpc": {"enabled": True}, "access": {"auth": "off"}}
    with pytest.raises(ConfigError, match=r"needs access\.auth"):
        parse_settings(ClientSettings, values, "The application's args")


@pytest.mark.parametrize("given", [None, "", "2147483647", "1e6"])
def test_a_message_is_no_larger_than_a_body(given: str | None) -> None:
    on = ClientSettings(access=AccessSettings(auth="keys"), grpc=GrpcSettings(enabled=True))
    environment = {} if given is None else {SIZE_VARIABLE: given}
    with pytest.raises(ConfigError, match="larger than"):
        check_message_size(on, environment)
    check_message_size(ClientSettings(), environment)
    check_message_size(on, {SIZE_VARIABLE: str(on.limits.max_body_bytes)})


APPLICATION = """
applications:
  - name: imagen
    import_path: serve_app.app:build
    deployments:
      - name: Ingress
        user_config: {grpc: {enabled: %s}, limits: {max_body_bytes: 4096}}
"""
OPTIONS = "grpc_options: {grpc_servicer_functions: [%s], enable_reflection: %s}\n"


def test_imagen_run_limits_messages_and_wants_reflection_off(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(APPLICATION % "true" + OPTIONS % (f'"{SERVICER}"', "false"))
    assert grpc_environment(config) == {SIZE_VARIABLE: "4096"}
    config.write_text(APPLICATION % "false")
    assert grpc_environment(config) == {}
    for text in (
        APPLICATION % "true",
        APPLICATION % "true" + OPTIONS % (f'"{SERVICER}"', "true"),
        APPLICATION % "true" + OPTIONS % ("other:add", "false"),
        APPLICATION % "false" + OPTIONS % (f'"{SERVICER}"', "false"),
    ):
        config.write_text(text)
        with pytest.raises(ConfigError, match="gRPC"):
            grpc_environment(config)
