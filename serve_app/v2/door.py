"""gRPC calls as requests to the same application as every other door's.

A call becomes the HTTP request that means the same, with its tensors as bytes, and the answer a
message: keys, limits, notes, metrics and errors are those of HTTP.
"""

from __future__ import annotations

import json
import re
import struct
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import httpx

from deployments.errors import ConfigError, InvalidParameter, NotFound
from serve_app.doors import KSERVE_HEALTH, KSERVE_ROOT
from serve_app.protocols.tensors import JSON_LENGTH
from serve_app.v2 import kserve_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from starlette.types import ASGIApp, Receive, Scope, Send

    from deployments.settings import ClientSettings

SIZE_VARIABLE = "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"
"""Limits the messages of Serve's gRPC proxy; read where Ray is started."""
_SERVICE = "inference.GRPCInferenceService"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_READ = ("authorization", "x-request-id", "prefer", "idempotency-key")
"""Metadata that become headers: those that are read, or that a note says are not."""
_KINDS: dict[str, tuple[Any, Any]] = {
    "ServerLive": (pb.ServerLiveRequest, pb.ServerLiveResponse),
    "ServerReady": (pb.ServerReadyRequest, pb.ServerReadyResponse),
    "ModelReady": (pb.ModelReadyRequest, pb.ModelReadyResponse),
    "ServerMetadata": (pb.ServerMetadataRequest, pb.ServerMetadataResponse),
    "ModelMetadata": (pb.ModelMetadataRequest, pb.ModelMetadataResponse),
    "ModelInfer": (pb.ModelInferRequest, pb.ModelInferResponse),
}
_CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""By HTTP status; any other refusal is INVALID_ARGUMENT."""


class Context(Protocol):
    """What Serve tells of a call, and is told of its end."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]: ...

    def peer(self) -> str: ...

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str]]) -> None: ...


def add_to_server(servicer: Any, server: Any) -> None:
    """Register the calls; `grpc_servicer_functions` of a Serve config names this function."""
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, name),
            request_deserializer=asked.FromString,
            response_serializer=answered.SerializeToString,
        )
        for name, (asked, answered) in _KINDS.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))


def check_message_size(clients: ClientSettings, environment: Mapping[str, str]) -> None:
    """Whether a message may be no larger than a body.

    Raises:
        ConfigError: it may.
    """
    limit = clients.limits.max_body_bytes
    given = environment.get(SIZE_VARIABLE, "")
    if clients.grpc.enabled and (not given.isdecimal() or int(given) > limit):
        raise ConfigError(
            "Messages over gRPC may be larger than limits.max_body_bytes.",
            value=given or "2 GiB",
            remedy=f"Start Ray with {SIZE_VARIABLE}={limit} in its environment; `imagen run` does.",
        )


class GrpcDoor:
    """Answers calls by way of an application.

    Args:
        app: of HTTP.
        enabled: whether calls are taken at all.
    """

    def __init__(self, app: ASGIApp, *, enabled: bool) -> None:
        self._app = app
        self._enabled = enabled

    async def call(self, name: str, asked: Any, context: Context) -> Any:
        """The answer to a call; an empty one, with a status, if it is refused."""
        answered = _KINDS[name][1]
        if not self._enabled:
            return _refused(answered, context, grpc.StatusCode.UNIMPLEMENTED, "gRPC is off.")
        try:
            found = await self._send(name, asked, context)
        except (InvalidParameter, NotFound) as error:  # before any request was made of it
            code = _CODES.get(error.status, grpc.StatusCode.INVALID_ARGUMENT)
            return _refused(answered, context, code, str(error))
        if name.endswith("Ready") and found.status_code in (404, 503):
            return answered(ready=False)
        if found.status_code != HTTPStatus.OK:
            code = _CODES.get(found.status_code, grpc.StatusCode.INVALID_ARGUMENT)
            details = found.json()["error"]
            if wait_s := found.headers.get("retry-after"):
                context.set_trailing_metadata([("retry-after", wait_s)])
                # Triton's clients show nothing of an error but its text.
                details = f"{details} Retry-After: {wait_s}."
            return _refused(answered, context, code, details)
        return _inferred(found) if name == "ModelInfer" else _message(answered, found.json())

    async def _send(self, name: str, asked: Any, context: Context) -> httpx.Response:
        # Those of the proxy's own, such as content-type and te, are none of HTTP's.
        # As bytes: only those of gRPC's own clients are ASCII.
        headers = [
            (key.encode(), str(value).encode("utf-8", "replace"))
            for key, value in context.invocation_metadata()
            if key in _READ
        ]
        app = self._counting(asked.ByteSize())
        transport = httpx.ASGITransport(app, client=(context.peer(), 0))
        async with httpx.AsyncClient(transport=transport, base_url="http://grpc") as client:
            if name != "ModelInfer":
                return await client.get(_path(name, asked), headers=headers)
            head, tensors = _parts(asked)
            headers.append((JSON_LENGTH.encode(), b"%d" % len(head)))
            path = f"{_model(asked.model_name, asked.model_version)}/infer"
            return await client.post(path, content=_let_go(head, tensors), headers=headers)

    def _counting(self, message_bytes: int) -> ASGIApp:
        """The application, which is told of the message: Serve keeps it until the call's end."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await self._app({**scope, "state": {"beside_bytes": message_bytes}}, receive, send)

        return app


async def _let_go(head: bytes, tensors: list[bytes]) -> AsyncGenerator[bytes]:
    """The parts of a body; none is kept here once it is sent."""
    yield head
    while tensors:
        yield tensors.pop(0)


def _path(name: str, asked: Any) -> str:
    server = {"ServerLive": KSERVE_HEALTH[0], "ServerReady": KSERVE_HEALTH[1]}
    if name == "ServerMetadata":
        return KSERVE_ROOT
    if name in server:
        return server[name]
    return _model(asked.name, asked.version) + ("/ready" if name == "ModelReady" else "")


def _model(name: str, version: str) -> str:
    # A name with a slash or a question mark would be another address.
    for part in (name, version or "1"):
        if not _NAME.fullmatch(part):
            raise NotFound("There is no such model.", value=part, remedy="Name one that is served.")
    return f"{KSERVE_ROOT}/models/{name}" + (f"/versions/{version}" if version else "")


def _parts(asked: pb.ModelInferRequest) -> tuple[bytes, list[bytes]]:
    """The request's JSON, and the tensors behind it."""
    raw = list(asked.raw_input_contents)
    if raw and len(raw) != len(asked.inputs):
        raise InvalidParameter(
            "raw_input_contents must have one entry for each input.",
            value=f"{len(raw)} for {len(asked.inputs)} inputs",
            remedy="Send the contents of all inputs there, or of none.",
        )
    if raw and any(one.HasField("contents") for one in asked.inputs):
        raise InvalidParameter(
            "An input has contents although there are raw_input_contents.",
            value="both",
            remedy="Send one of them.",
        )
    data = raw or [_elements(one.contents) for one in asked.inputs]
    inputs = [
        {
            "name": one.name,
            "datatype": one.datatype,
            "shape": list(one.shape),
            "parameters": _values(one.parameters) | {"binary_data_size": len(content)},
        }
        for one, content in zip(asked.inputs, data, strict=True)
    ]
    outputs = [{"name": o.name, "parameters": _values(o.parameters)} for o in asked.outputs]
    parameters = _values(asked.parameters) | {"binary_data_output": True}
    head = {"id": asked.id, "inputs": inputs, "outputs": outputs, "parameters": parameters}
    return json.dumps(head).encode(), data


def _elements(contents: pb.InferTensorContents) -> bytes:
    others = [field.name for field, _ in contents.ListFields() if field.name != "bytes_contents"]
    if others:
        raise InvalidParameter(
            "An input is not of type BYTES.",
            value=", ".join(others),
            remedy="Send bytes_contents, or raw_input_contents.",
        )
    return b"".join(struct.pack("<I", len(one)) + one for one in contents.bytes_contents)


def _values(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, parameter in parameters.items():
        which = parameter.WhichOneof("parameter_choice")
        if which is None or name.startswith("binary_data"):
            raise InvalidParameter(
                f"The parameter {name} has no value, or none over gRPC.",
                value=name,
                remedy="Leave it out.",
            )
        found[name] = getattr(parameter, which)
    return found


def _parameter(value: object) -> pb.InferParameter:
    if isinstance(value, bool):
        return pb.InferParameter(bool_param=value)
    if isinstance(value, int):
        return pb.InferParameter(int64_param=value)
    if isinstance(value, float):
        return pb.InferParameter(double_param=value)
    return pb.InferParameter(string_param=str(value))


def _inferred(found: httpx.Response) -> pb.ModelInferResponse:
    size = int(found.headers[JSON_LENGTH])
    said = json.loads(found.content[:size])
    (output,) = said["outputs"]
    answer = pb.ModelInferResponse(
        model_name=said["model_name"], model_version=said["model_version"], id=said.get("id", "")
    )
    for name, value in said["parameters"].items():
        answer.parameters[name].CopyFrom(_parameter(value))
    answer.outputs.add(name=output["name"], datatype=output["datatype"], shape=output["shape"])
    answer.raw_output_contents.append(found.content[size:])
    return answer


def _message(kind: Any, said: dict[str, Any]) -> Any:
    """The document of the same fields as a message."""
    tensors = {"inputs", "outputs"} & said.keys()
    made = kind(**{name: value for name, value in said.items() if name not in tensors})
    for name in tensors:
        for tensor in said[name]:
            getattr(made, name).add(**tensor)
    return made


def _refused(kind: Any, context: Context, code: grpc.StatusCode, details: str) -> Any:
    context.set_code(code)
    context.set_details(details)
    return kind()
