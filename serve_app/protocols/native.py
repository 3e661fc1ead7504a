"""Our own protocol: a multipart form in, a picture and headers that describe it out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, get_args

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from deployments.contract import OutputFormat
from deployments.errors import InvalidParameter
from deployments.tasks import Task
from serve_app.intake import Call, Intake
from serve_app.problem import MEDIA_TYPE, Problem
from serve_app.protocols.multipart import read_form

if TYPE_CHECKING:
    from deployments.contract import ImageResult
    from deployments.registry import ModelSpec, Registry

_STATUSES = {
    400: "The body or the image cannot be read",
    406: "No output format fits the Accept header",
    408: "The upload did not end in time",
    413: "Too many bytes or pixels",
    415: "Not an image, or not multipart",
    422: "A parameter is unknown, out of range or contradictory, or asks for too much work",
    429: "Every queue slot is taken; see Retry-After",
    503: "The model is not ready; see Retry-After",
    504: "Not finished by the deadline",
}
_HEADERS = {
    "X-Request-Id": "of this request",
    "X-Imagen-Model": "name@digest",
    "X-Imagen-Seed": "the seed used, where the model uses chance",
    "X-Imagen-Batch-Size": "rows in the forward pass that carried this one",
    "X-Imagen-Gpu-Seconds": "share of a GPU's time",
    "X-Imagen-Determinism": "exact: the bits depend on the request alone; bounded: nearly",
    "X-Imagen-Size": "width x height of the result, px",
    "X-Imagen-Note": "what else to know, such as: first of 12 frames",
    "Server-Timing": "milliseconds by stage",
}
_ONLY_WITH_ANOTHER = {"color"}
"""Fields that a form must not send by default, because they contradict another's default."""
_BINARY = {"type": "string", "format": "binary"}
_PROBLEM = {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The picture",
        "content": {f"image/{name}": {"schema": _BINARY} for name in get_args(OutputFormat)},
        "headers": {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in _HEADERS.items()
        },
    },
    **{status: {"description": text, "content": _PROBLEM} for status, text in _STATUSES.items()},
}


def router(registry: Registry) -> APIRouter:
    """One image route for each task of the table."""
    routes = APIRouter(tags=["images"])
    for task, spec in registry.items():
        routes.add_api_route(
            task.route,
            process_image,
            methods=["POST"],
            name=task,
            operation_id=task,
            summary=task.request.__doc__,
            description=f"The model {spec.name}: {spec.summary}.",
            response_class=Response,
            responses=_RESPONSES,
            openapi_extra=request_body(spec),
        )
    return routes


async def task_of(request: Request) -> Task:
    """The task whose route was asked for."""
    return Task(request.scope["route"].name)


async def intake_of(request: Request) -> Intake:
    """The application's intake."""
    return request.app.state.intake


async def process_image(
    request: Request,
    task: Annotated[Task, Depends(task_of)],
    intake: Annotated[Intake, Depends(intake_of)],
) -> Response:
    """Read the form, run the task, answer with the picture."""
    deadline_s = intake.deadline_s()
    form = await intake.read(read_form(request, needs_image=task.needs_picture), deadline_s)
    _check_query(request)
    call = Call(
        task=task,
        fields=form.fields,
        image=form.image,
        accept=", ".join(request.headers.getlist("accept")),
        request_id=request.scope["state"]["request_id"],
        charge=request.scope["state"]["charge"],
    )
    return image_response(await intake.run(call, deadline_s))


def _check_query(request: Request) -> None:
    if request.url.query:
        raise InvalidParameter(
            "Parameters go into the form, not behind the ? of the address.",
            value=request.url.query,
            remedy="Send them as form fields, as curl -F steps=20 does.",
        )


def image_response(result: ImageResult) -> Response:
    """The picture, and headers that describe it."""
    headers = {
        "X-Imagen-Model": result.model,
        "X-Imagen-Batch-Size": str(result.batch_size),
        "X-Imagen-Gpu-Seconds": f"{result.gpu_seconds:.4f}",
        "X-Imagen-Determinism": result.determinism,
        "X-Imagen-Size": f"{result.width_px}x{result.height_px}",
        "Server-Timing": ", ".join(
            f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in result.timings_s.items()
        ),
        "Vary": "Accept",
        "Cache-Control": "no-store",
    }
    if result.seed is not None:
        headers["X-Imagen-Seed"] = str(result.seed)
    if result.notes:
        headers["X-Imagen-Note"] = "; ".join(result.notes)
    return Response(result.image, media_type=result.media_type, headers=headers)


def request_body(spec: ModelSpec) -> dict[str, Any]:
    """The form of a route, for `/docs`: the fields its model reads, with the model's defaults."""
    schema = spec.task.request.model_json_schema()["properties"]
    fields = {name: dict(schema[name]) for name in schema if name in spec.parameters}
    for name, value in spec.defaults.items():
        fields[name]["default"] = value
    for name in _ONLY_WITH_ANOTHER & fields.keys():
        del fields[name]["default"]
    required: list[str] = []
    if spec.task.needs_picture:
        fields = {"image": {**_BINARY, "description": "The picture, a file."}, **fields}
        required.append("image")
    body = {
        "type": "object",
        "required": required,
        "additionalProperties": False,
        "properties": fields,
    }
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": body}}}}
