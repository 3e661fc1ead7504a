"""The KServe V2 protocol, which clients of Triton speak, over HTTP.

A model is named by its own name, or by its task. It has the inputs IMAGE, BACKGROUND, MASK and
PARAMETERS, as far as its task takes them, and the output IMAGE, each a BYTES tensor of one element.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from deployments.contract import PICTURE
from deployments.errors import InvalidParameter, NotFound
from serve_app.doors import JSON, KSERVE_HEALTH, KSERVE_ROOT
from serve_app.intake import Backends, Call, Intake, not_ready
from serve_app.protocols.inline import read_body, text_of
from serve_app.protocols.naming import check_plain, named, names_of, unread_headers
from serve_app.protocols.picture import image_headers
from serve_app.protocols.tensors import (
    FILES,
    IMAGE,
    JSON_LENGTH,
    PARAMETERS,
    Head,
    Infer,
    read_infer,
    write_infer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.catalogue import Registry
    from deployments.contract import ImageResult
    from deployments.registry import ModelSpec

VERSION = "1"
"""Of every model. Which content a model serves is told by its digest."""
_BYTES = "application/octet-stream"
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_MODEL = f"{KSERVE_ROOT}/models/{{name}}"
_VERSION = f"{_MODEL}/versions/{{version}}"
ROUTES = (f"{_MODEL}/infer", f"{_VERSION}/infer")
"""Those that make pictures."""
router = APIRouter(tags=["KServe V2"])


class Refused(BaseModel):
    """Every answer of 400 and above."""

    error: str
    code: str
    request_id: str


class Server(BaseModel):
    """This service."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """An input or the output."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """A model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class Inferred(BaseModel):
    """A result."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, Any] = Field(description="model and digest, seed, batch_size, notes, …")
    outputs: list[dict[str, Any]] = Field(description="IMAGE: base64, or bytes behind this JSON")


class Live(BaseModel):
    """The process answers."""

    live: bool


class Ready(BaseModel):
    """Every model, or the one that was asked for, is ready or idle."""

    ready: bool


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Refused} for status in statuses}


def _described(*names: str) -> dict[str, Any]:
    """The parameters of a path, for the reference."""
    texts = {"name": "of a model or a task", "version": f"of the model: {VERSION}"}
    schema = {"type": "string"}
    return {
        "parameters": [
            {"name": n, "in": "path", "required": True, "description": texts[n], "schema": schema}
            for n in names
        ]
    }


_BODY = {
    "required": True,
    "content": {JSON: {"schema": Head.model_json_schema()}, _BYTES: _BINARY},
}
_LENGTH_HEADER = {
    "name": JSON_LENGTH,
    "in": "header",
    "description": "bytes of the JSON, where tensors follow it as bytes",
    "schema": {"type": "string"},
}


async def backends_of(request: Request) -> Backends:
    """The application's models."""
    return request.app.state.backends


async def spec_of(request: Request) -> ModelSpec:
    """The model that a path names.

    Raises:
        NotFound: there is no such model or version.
    """
    wanted = request.path_params.get("version", VERSION)
    if wanted != VERSION:
        raise NotFound(
            "The model has no such version.", value=wanted, remedy=f"Every model has {VERSION}."
        )
    return named(request.path_params["name"], request.app.state.registry)


AnyBackends = Annotated[Backends, Depends(backends_of)]


@router.get(KSERVE_ROOT, summary="The service, as clients of Triton ask for it")
async def describe_server() -> Server:
    """Its name, version, and extensions of the protocol."""
    return Server(name="imagen", version=version("imagen"), extensions=["binary_tensor_data"])


@router.get(KSERVE_HEALTH[0], summary="The process lives")
async def live() -> Live:
    """For liveness probes."""
    return Live(live=True)


@router.get(KSERVE_HEALTH[1], summary="Every model is ready or idle", responses=_refusals(503))
async def ready(request: Request, backends: AnyBackends) -> Ready:
    """For readiness probes."""
    for spec in request.app.state.registry.models:
        await _check_ready(spec, backends)
    return Ready(ready=True)


@router.get(
    f"{_VERSION}/ready",
    summary="A version of a model is ready or idle",
    responses=_refusals(404, 503),
    openapi_extra=_described("name", "version"),
)
@router.get(
    f"{_MODEL}/ready",
    summary="A model is ready or idle",
    responses=_refusals(404, 503),
    openapi_extra=_described("name"),
)
async def model_ready(request: Request, backends: AnyBackends) -> Ready:
    """Whether a request would be taken."""
    await _check_ready(await spec_of(request), backends)
    return Ready(ready=True)


@router.get(
    _VERSION,
    summary="A version of a model",
    responses=_refusals(404),
    openapi_extra=_described("name", "version"),
)
@router.get(
    _MODEL,
    summary="A model's inputs and output",
    responses=_refusals(404),
    openapi_extra=_described("name"),
)
async def describe_model(request: Request) -> ModelMetadata:
    """Its tensors."""
    spec = await spec_of(request)
    inputs = [IMAGE] if spec.task.needs_picture else []
    inputs += [name for name, field in FILES.items() if field in spec.parameters]
    return ModelMetadata(
        name=request.path_params["name"],
        versions=[VERSION],
        platform="imagen",
        inputs=[_tensor(name) for name in (*inputs, PARAMETERS)],
        outputs=[_tensor(IMAGE)],
    )


def _tensor(name: str) -> TensorMetadata:
    return TensorMetadata(name=name, datatype="BYTES", shape=[1])


_INFER: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {"content": {JSON: {"schema": Inferred.model_json_schema()}, _BYTES: _BINARY}},
        **_refusals(400, 401, 404, 406, 408, 413, 415, 429, 503, 504),
    },
}


def _infer_extra(*names: str) -> dict[str, Any]:
    described = _described(*names)["parameters"]
    return {"requestBody": _BODY, "parameters": [*described, _LENGTH_HEADER]}


@router.post(
    f"{_VERSION}/infer",
    summary="A picture by a version of a model",
    openapi_extra=_infer_extra("name", "version"),
    **_INFER,
)
@router.post(
    f"{_MODEL}/infer",
    summary="A picture, as clients of Triton ask for it",
    openapi_extra=_infer_extra("name"),
    **_INFER,
)
async def infer(request: Request) -> Response:
    """JSON in and out, or JSON with the tensors as bytes behind it."""
    intake: Intake = request.app.state.intake
    deadline_s = intake.deadline_s()
    spec = await spec_of(request)
    check_plain(request)
    asked = await intake.read(_read(request), deadline_s)
    result = await intake.run(_call(request, spec, asked), deadline_s)
    return _answer(request.path_params["name"], asked, result)


async def _read(request: Request) -> Infer:
    # Several lengths are none: a proxy in front may have gone by another one.
    lengths = request.headers.getlist(JSON_LENGTH)
    return read_infer(await read_body(request), ", ".join(lengths) if lengths else None)


def infer_paths(served: Registry) -> Iterator[str]:
    """The path of each model's route, by each of its names."""
    for spec in served.models:
        for name in names_of(spec, served):
            yield f"{KSERVE_ROOT}/models/{name}/infer"
            yield f"{KSERVE_ROOT}/models/{name}/versions/{VERSION}/infer"


async def _check_ready(spec: ModelSpec, backends: Backends) -> None:
    state = (await backends.states()).get(spec.name, "starting")
    if state not in ("ready", "idle"):
        raise not_ready(spec.name, state, backends.recovery_s(spec.name))


def _call(request: Request, spec: ModelSpec, asked: Infer) -> Call:
    fields = {
        name: text_of(name, value) for name, value in asked.parameters.items() if value is not None
    }
    if "model" in fields:
        raise InvalidParameter(
            "The address names the model.", value=fields["model"], remedy="Leave model out."
        )
    files = {field: asked.files[name] for name, field in FILES.items() if name in asked.files}
    if twice := sorted(files.keys() & fields.keys()):
        raise InvalidParameter(
            f"{twice[0]} is an input and a parameter.",
            value=f"{twice[0]}={fields[twice[0]]}, and the input {twice[0].upper()}",
            remedy="Send one of them.",
        )
    state = request.scope["state"]
    return Call(
        task=spec.task,
        fields={**fields, **dict.fromkeys(files, PICTURE), "model": spec.name},
        image=asked.files.get(IMAGE),
        background=files.get("background"),
        mask=files.get("mask"),
        request_id=state["request_id"],
        charge=state["charge"],
        notes=tuple(unread_headers(request)),
    )


def _answer(name: str, asked: Infer, result: ImageResult) -> Response:
    body, json_size = write_infer(asked, name, result.image, _facts(result))
    response = Response(body, media_type=JSON if json_size is None else _BYTES)
    if json_size is not None:
        response.headers[JSON_LENGTH] = str(json_size)
    for header, text in image_headers(result):
        response.headers.append(header, text)
    return response


def _facts(result: ImageResult) -> dict[str, Any]:
    """What a result says of itself. The protocol knows texts, numbers, true and false."""
    facts: dict[str, Any] = {
        "model": result.model,
        "batch_size": result.batch_size,
        "gpu_seconds": result.gpu_seconds,
        "determinism": result.determinism,
        "media_type": result.media_type,
        "width_px": result.width_px,
        "height_px": result.height_px,
        "notes": "\n".join(f"{one.code}: {one.text}" for one in result.notes),
    }
    return facts if result.seed is None else {**facts, "seed": result.seed}
