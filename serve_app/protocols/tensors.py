"""Requests and answers of the KServe V2 protocol, as JSON with tensors of one element.

https://github.com/kserve/kserve/blob/master/docs/predict-api/v2/required_api.md, and the binary
extension: https://github.com/triton-inference-server/server/blob/main/docs/protocol/
extension_binary_data.md. A tensor of type BYTES is its elements, each behind its length in four
bytes, little-endian.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field, StrictBool, StrictInt

from deployments.contract import validated
from deployments.errors import InvalidParameter, MalformedRequest, about
from deployments.settings import Strict
from serve_app.protocols.inline import base64_of, object_of, picture_of
from serve_app.protocols.multipart import MAY_BE_FILES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

JSON_LENGTH = "Inference-Header-Content-Length"
IMAGE, PARAMETERS = "IMAGE", "PARAMETERS"
FILES = {name.upper(): name for name in MAY_BE_FILES}
"""Inputs that are further pictures, and the fields that they stand for."""
_INPUTS = (IMAGE, *FILES, PARAMETERS)
_LENGTH = struct.Struct("<I")
_MOST_TENSORS = 10
_MOST_DIMENSIONS = 8


class Head(Strict):
    """The JSON of a request."""

    id: str = Field(default="", max_length=200, description="of the request; the answer has it")
    parameters: dict[str, Any] = Field(default={}, description="of the model, by name")
    inputs: list[dict[str, Any]] = Field(default=[], max_length=_MOST_TENSORS)
    outputs: list[dict[str, Any]] = Field(default=[], max_length=_MOST_TENSORS)


class _Tensor(Strict):
    """An input."""

    name: str = Field(max_length=100)
    shape: list[StrictInt] = Field(max_length=_MOST_DIMENSIONS)
    datatype: str = Field(max_length=20)
    parameters: dict[str, Any] = Field(default={})
    data: list[Any] | None = None


class _TensorParameters(Strict):
    """What an input may say of its data."""

    binary_data_size: StrictInt | None = Field(default=None, ge=0)
    content_type: str = Field(default="base64", pattern="^base64$")


class _Output(Strict):
    """An output that is asked for."""

    name: str = Field(max_length=100)
    parameters: dict[str, Any] = Field(default={})


class _OutputParameters(Strict):
    """How an output is asked for."""

    binary_data: StrictBool = False


class _Format(Strict):
    """What a request's parameters say of the answer rather than to the model."""

    binary_data_output: StrictBool = False


@dataclass(frozen=True, slots=True)
class Infer:
    """A request.

    Attributes:
        request_id: the client's own; empty if it has none.
        parameters: of the model, as JSON has them.
        files: the elements of the inputs that are pictures, by name.
        shape: of the answer's IMAGE: that of the request's.
        binary: whether the answer has it as bytes behind its JSON.
    """

    request_id: str
    parameters: Mapping[str, Any]
    files: Mapping[str, bytes]
    shape: Sequence[int]
    binary: bool


def read_infer(body: bytes, json_length: str | None) -> Infer:
    """A request from its body.

    Args:
        body: JSON, and the bytes of tensors behind it.
        json_length: the header that says where the JSON ends; None if all of it is JSON.

    Raises:
        MalformedRequest: it is no JSON object, or a length is wrong.
        InvalidParameter: a tensor or a parameter is unknown, of another kind, or comes twice.
    """
    size = _json_size(body, json_length)
    given = {name: value for name, value in object_of(body[:size]).items() if value is not None}
    head = validated(Head, given, "an inference request")
    tensors = [validated(_Tensor, tensor, "an input") for tensor in head.inputs]
    elements = _elements(tensors, memoryview(body)[size:])
    own = {name: head.parameters[name] for name in _Format.model_fields if name in head.parameters}
    by_default = validated(_Format, own, "an inference request").binary_data_output
    shapes = [tensor.shape for tensor in tensors if tensor.name == IMAGE]
    return Infer(
        request_id=head.id,
        parameters=_joined(
            {name: value for name, value in head.parameters.items() if name not in own},
            _parameters(elements.pop(PARAMETERS)) if PARAMETERS in elements else {},
        ),
        files=elements,
        shape=shapes[0] if shapes else [1],
        binary=_is_binary(head.outputs, by_default=by_default),
    )


def _json_size(body: bytes, json_length: str | None) -> int:
    if json_length is None:
        return len(body)
    digits = json_length if json_length.isascii() and json_length.isdigit() else ""
    if len(digits) in range(1, 12) and int(digits) <= len(body):
        return int(digits)
    raise MalformedRequest(
        f"{JSON_LENGTH} must be the size of the JSON at the beginning of the body.",
        value=f"{json_length[:40]}, for {len(body)} bytes",
        remedy="Send the number of bytes before the tensors.",
    )


def _elements(tensors: Sequence[_Tensor], rest: memoryview) -> dict[str, bytes]:
    """The element of each input, by name."""
    found: dict[str, bytes] = {}
    for tensor in tensors:
        _check_tensor(tensor, found)
        size = validated(
            _TensorParameters, tensor.parameters, f"the input {tensor.name}"
        ).binary_data_size
        if size is None:
            found[tensor.name] = _element_of_json(tensor)
        elif tensor.data is not None:
            raise _wrong(
                tensor.name, "has both data and binary_data_size", "both", "Send one of them."
            )
        else:
            found[tensor.name] = _element_of_bytes(tensor.name, rest[:size], size)
            rest = rest[size:]
    if rest:
        raise MalformedRequest(
            "The body has bytes behind its last tensor.",
            value=f"{len(rest)} bytes",
            remedy="Let the sizes in binary_data_size add up to what follows the JSON.",
        )
    return found


def _check_tensor(tensor: _Tensor, found: Mapping[str, bytes]) -> None:
    if tensor.name not in _INPUTS:
        raise InvalidParameter(
            "There is no such input.", value=tensor.name, remedy=f"Inputs: {', '.join(_INPUTS)}."
        )
    if tensor.name in found:
        raise _wrong(tensor.name, "comes more than once", "another one", "Send it once.")
    if tensor.datatype != "BYTES":
        raise _wrong(tensor.name, "is not of type BYTES", tensor.datatype, "Send BYTES.")
    if tensor.shape not in ([1], [1, 1]):
        raise _wrong(
            tensor.name,
            "must have one element, of shape [1] or [1, 1]",
            tensor.shape,
            "Send one request for each picture; requests share passes here.",
        )


def _element_of_json(tensor: _Tensor) -> bytes:
    value: Any = tensor.data
    while isinstance(value, list) and len(cast("list[Any]", value)) == 1:
        value = cast("list[Any]", value)[0]
    if not isinstance(value, str):
        raise _wrong(
            tensor.name,
            "must have one text as data",
            "no data" if tensor.data is None else json.dumps(tensor.data),
            'Send "data": ["…"], or binary_data_size and the bytes behind the JSON.',
        )
    if tensor.name == PARAMETERS:
        return value.encode("utf-8", "surrogatepass")  # object_of refuses lone surrogates
    return picture_of(tensor.name, value)


def _element_of_bytes(name: str, data: memoryview, size: int) -> bytes:
    length = _LENGTH.unpack_from(data)[0] if len(data) >= _LENGTH.size else None
    if len(data) != size or length != size - _LENGTH.size:
        says = "no length" if length is None else f"an element of {length} bytes"
        raise MalformedRequest(
            f"The bytes of {name} are not one element.",
            value=f"binary_data_size {size}, {len(data)} bytes there, {says}",
            remedy="Send the element's length in four bytes, little-endian, and the element;"
            " binary_data_size counts both.",
        )
    return bytes(data[_LENGTH.size :])


def _parameters(element: bytes) -> dict[str, Any]:
    with about(f"input {PARAMETERS}"):
        return object_of(element)


def _joined(parameters: Mapping[str, Any], of_tensor: Mapping[str, Any]) -> dict[str, Any]:
    for name in parameters.keys() & of_tensor.keys():
        raise _wrong(
            name, f"is in the request's parameters and in {PARAMETERS}", "both", "Send one."
        )
    return {**parameters, **of_tensor}


def _is_binary(outputs: Sequence[Mapping[str, Any]], *, by_default: bool) -> bool:
    binary = by_default
    if len(outputs) > 1:
        raise InvalidParameter(
            "There is one output.", value=f"{len(outputs)} outputs", remedy="Ask for it once."
        )
    for given in outputs:
        output = validated(_Output, given, "an output")
        if output.name != IMAGE:
            raise InvalidParameter(
                "There is no such output.", value=output.name, remedy=f"The output is {IMAGE}."
            )
        parameters = validated(_OutputParameters, output.parameters, f"the output {IMAGE}")
        if "binary_data" in parameters.model_fields_set:
            binary = parameters.binary_data
    return binary


def _wrong(name: str, what: str, value: object, remedy: str) -> InvalidParameter:
    return InvalidParameter(f"{name[:100]} {what}.", value=value, remedy=remedy)


def write_infer(
    infer: Infer, model: str, picture: bytes, parameters: Mapping[str, Any]
) -> tuple[bytes, int | None]:
    """An answer's body, and the size of its JSON if bytes follow it.

    Args:
        infer: the request.
        model: its name, as the request has it.
        picture: the result.
        parameters: what the answer says of it.
    """
    output: dict[str, Any] = {"name": IMAGE, "datatype": "BYTES", "shape": infer.shape}
    element = _LENGTH.pack(len(picture)) + picture if infer.binary else b""
    if infer.binary:
        output["parameters"] = {"binary_data_size": len(element)}
    else:
        output |= {"parameters": {"content_type": "base64"}, "data": [base64_of(picture)]}
    document = {"model_name": model, "model_version": "1", "outputs": [output]}
    document |= {"id": infer.request_id} if infer.request_id else {}
    head = json.dumps(document | {"parameters": dict(parameters)}).encode()
    return head + element, len(head) if infer.binary else None
