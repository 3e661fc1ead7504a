"""Triton's own gRPC client, in a process of its own: its messages have the names of ours.

It is called with an address, a token, the token of a key that may call once, and a picture file,
and prints what it saw as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

if TYPE_CHECKING:
    from collections.abc import Callable


def tensor(data: bytes) -> Any:
    made = triton.InferInput("IMAGE", [1], "BYTES")
    made.set_data_from_numpy(np.array([data], dtype=np.object_))
    return made


def refusal(call: Callable[[], Any]) -> list[str]:
    try:
        call()
    except InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    return ["none", ""]


def trailing(address: str, headers: dict[str, str]) -> dict[str, str]:
    """What an error says behind it, which Triton's client does not show."""
    stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(address))
    try:
        stub.ServerMetadata(service_pb2.ServerMetadataRequest(), metadata=tuple(headers.items()))
    except grpc.RpcError as error:
        return dict(error.trailing_metadata())
    return {}


def main(address: str, token: str, once: str, picture: bytes) -> dict[str, Any]:
    anyone = {"application": "grpc"}
    known = anyone | {"authorization": f"Bearer {token}"}
    off = {"application": "scripted"}
    client = triton.InferenceServerClient(address)
    made = client.infer(
        "enhance", [tensor(picture)], headers=known, parameters={"seed": 7}, request_id="mine"
    )
    found = {
        "live": client.is_server_live(headers=anyone),
        "ready": client.is_server_ready(headers=anyone),
        "model_ready": client.is_model_ready("enhance", headers=known),
        "nobody_ready": client.is_model_ready("nobody", headers=known),
        "platform": client.get_model_metadata("enhance", headers=known).platform,
        "server": client.get_server_metadata(headers=known).name,
        "picture": made.as_numpy("IMAGE")[0].hex(),
        "id": made.get_response().id,
    }

    def infer(model: str, headers: dict[str, str], data: bytes, **parameters: Any) -> list[str]:
        inputs = [tensor(data)]
        return refusal(lambda: client.infer(model, inputs, headers=headers, parameters=parameters))

    found |= {
        "without_key": infer("enhance", anyone, picture),
        "nobody": infer("nobody", known, picture),
        "wrong": infer("enhance", known, picture, steps=0),
        "too_large": infer("enhance", known, picture * 3000),
        "off": infer("enhance", off, picture),
    }
    rare = anyone | {"authorization": f"Bearer {once}"}
    client.get_server_metadata(headers=rare)
    found |= {"busy": infer("enhance", rare, picture), "trailing": trailing(address, rare)}
    channel = grpc.insecure_channel(address)
    reflect = channel.unary_unary("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    try:
        reflect(b"", timeout=10)
        found["reflection"] = "there"
    except grpc.RpcError as error:
        found["reflection"] = str(error.code())
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:4], Path(sys.argv[4]).read_bytes())))
