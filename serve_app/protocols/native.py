"""Our own protocol: a form or JSON in, a picture and headers that describe it out; or JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, get_args

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from deployments.contract import PICTURE, OutputFormat
from deployments.tasks import Task
from serve_app.doors import JSON, is_json
from serve_app.intake import Call, Intake, accepted
from serve_app.jobs.options import JobOptions, split
from serve_app.problem import MEDIA_TYPE, Problem
from serve_app.protocols import inline, jobs, multipart
from serve_app.protocols.hints import UNSENT, hints
from serve_app.protocols.jobs import AcceptedJob
from serve_app.protocols.naming import check_plain
from serve_app.protocols.parameters import header_parameters
from serve_app.protocols.picture import image_response, json_response

if TYPE_CHECKING:
    from collections.abc import Sequence, Set

    from deployments.catalogue import Registry
    from deployments.registry import ModelSpec
    from serve_app.jobs.service import Accepted

_STATUSES = {
    400: "The body or the image cannot be read",
    406: "No output format fits the Accept header",
    408: "The upload did not end in time",
    409: "The Idempotency-Key came before with another request",
    413: "Too many bytes or pixels",
    415: "Not an image, neither a form nor JSON, or a compressed body",
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
    "X-Imagen-Note": "what was lost or chosen, as code: sentence; one header for each note",
    "Server-Timing": "milliseconds by stage",
}
_JOB_HEADERS = {
    "Location": "of the job, where one was made",
    "Preference-Applied": "the preference that was honoured",
}
_FILE_IN_JSON = "In JSON, a file is base64 or a data URL."
_BINARY = {"type": "string", "format": "binary"}
_PROBLEM = {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The picture. With Prefer: wait, the job instead if it was canceled, or has"
        " more than one result",
        "content": {f"image/{name}": {"schema": _BINARY} for name in get_args(OutputFormat)}
        | {"application/json": {"schema": {"$ref": "#/components/schemas/JobDocument"}}},
        "headers": {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in (_HEADERS | _JOB_HEADERS).items()
        },
    },
    202: {
        "model": AcceptedJob,
        "description": "A job was made: see the header Prefer",
        "headers": {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in _JOB_HEADERS.items()
        },
    },
    **{status: {"description": text, "content": _PROBLEM} for status, text in _STATUSES.items()},
}
_REQUEST_HEADERS = {
    "Prefer": "respond-async makes a job of the request and answers 202; wait=10 waits for its end "
    "for so many seconds first",
    "Idempotency-Key": "with Prefer: a repeated request with the same key finds the first job",
}


def router(registry: Registry, *, with_jobs: bool) -> APIRouter:
    """One image route for each task that is served; its description has jobs if there are any."""
    routes = APIRouter(tags=["images"])
    for task in registry:
        routes.add_api_route(
            task.route,
            process_image,
            methods=["POST"],
            name=task,
            operation_id=task,
            summary=task.request.__doc__,
            description="\n".join(f"- {m.name}: {m.summary}." for m in registry.of(task)),
            response_class=Response,
            responses=_RESPONSES,
            openapi_extra=request_body(registry.of(task), with_jobs=with_jobs),
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
    """Read the form, run the task, answer with the picture; or with a job."""
    preference = jobs.preference_of(request, request.app.state.jobs)
    if preference is None:
        deadline_s = intake.deadline_s()
        call, options = await _read(request, task, intake, deadline_s)
        jobs.check_sync(request, options)
        result = await intake.run(call, deadline_s)
        return json_response(result) if _wants_json(request) else image_response(result)
    jobs.check_kept(preference, request.app.state.jobs)
    accepted = await _submit(request, task, intake)
    # What follows may take a minute, in which the upload must not stand in anybody's way.
    request.scope["state"]["leave_upload"]()
    return await jobs.answer(request, accepted, preference)


async def _submit(request: Request, task: Task, intake: Intake) -> Accepted:
    call, options = await _read(request, task, intake, intake.deadline_s())
    return await jobs.submit(request, call, intake, options)


async def _read(
    request: Request, task: Task, intake: Intake, deadline_s: float
) -> tuple[Call, dict[str, str]]:
    """The request, and those of its fields that belong to a job."""
    check_plain(request)
    read = inline.read_form if is_json(request.headers) else multipart.read_form
    form = await intake.read(read(request, needs_image=task.needs_picture), deadline_s)
    fields, options = split(form.fields)
    call = Call(
        task=task,
        fields=fields,
        image=form.image,
        background=form.background,
        mask=form.mask,
        accept="" if _wants_json(request) else _accept(request),
        request_id=request.scope["state"]["request_id"],
        charge=request.scope["state"]["charge"],
    )
    return call, options


def _accept(request: Request) -> str:
    return ", ".join(request.headers.getlist("accept"))


def _wants_json(request: Request) -> bool:
    """Whether the client accepts JSON, and neither a picture nor anything."""
    wanted = {kind for kind, quality in accepted(_accept(request)).items() if quality}
    others = any(kind == "*/*" or kind.startswith("image/") for kind in wanted)
    return JSON in wanted and not others


def request_body(models: Sequence[ModelSpec], *, with_jobs: bool) -> dict[str, Any]:
    """The form of a route, for pages: the fields its models read, with the first one's defaults.

    A field that the first one does not read has none, so that the form does not send it.
    """
    spec = models[0]
    schema = spec.task.request.model_json_schema()["properties"]
    read = frozenset[str]().union(*(model.parameters for model in models))
    fields = {name: dict(schema[name]) for name in schema if name in read}
    for name in fields.keys() & spec.defaults.keys():
        fields[name]["default"] = spec.defaults[name]
    fields |= _model_field(models) | (_job_fields(read) if with_jobs else {})
    fields = {name: field | hints(name, field) for name, field in fields.items()}
    for name in (UNSENT & fields.keys()) | (read - spec.parameters):
        fields[name].pop("default", None)
    for name in fields.keys() & set(multipart.MAY_BE_FILES):
        fields[name] = _text_or_file(fields[name])
    required: list[str] = []
    if spec.task.needs_picture:
        fields = {"image": {**_BINARY, "description": "The picture, a file."}, **fields}
        required.append("image")
    elif not spec.defaults.get("prompt"):  # see intake.check_prompt
        required.append("prompt")
        fields["prompt"].pop("default")
    body = {
        "type": "object",
        "required": required,
        "additionalProperties": False,
        "properties": fields,
    }
    content = {
        "multipart/form-data": {"schema": body},
        JSON: {"schema": _in_json(body)},
    }
    return {
        "parameters": header_parameters(_REQUEST_HEADERS if with_jobs else {}),
        "requestBody": {"required": True, "content": content},
    }


def _text_or_file(field: dict[str, Any]) -> dict[str, Any]:
    """A field that a form sends as a text, or as a file.

    Its own format is that of the file where the texts are a few words: /docs shows one control for
    a field, and goes by that.
    """
    texts: list[dict[str, Any]] = [one for one in field["anyOf"] if one["type"] != "null"]
    words = [word for one in texts for word in one.get("enum", ()) if word != PICTURE]
    described = {name: value for name, value in field.items() if name not in ("anyOf", "default")}
    if not words:
        return described | {"anyOf": [*texts, _BINARY]}
    return described | _BINARY | {"anyOf": [_BINARY, {"type": "string", "enum": words}]}


def _model_field(models: Sequence[ModelSpec]) -> dict[str, Any]:
    names = [model.name for model in models]
    text = "Which model makes the picture. Unset: the first one."
    return {"model": {"type": "string", "enum": names, "default": names[0], "description": text}}


def _in_json(form: dict[str, Any]) -> dict[str, Any]:
    """The same fields in JSON, where pictures are texts."""
    fields = dict(form["properties"])
    if "image" in fields:
        fields["image"] = _text(
            "The picture: base64, a data URL, or an address where the operator allows it."
        )
    if mask := fields.get("mask"):
        fields["mask"] = _text(f"{mask['description']} {_FILE_IN_JSON}")
    if background := fields.get("background"):
        told = f"{background['description']} {_FILE_IN_JSON}"
        fields["background"] = _text(told)
    return {**form, "properties": fields}


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


def _job_fields(read: Set[str]) -> dict[str, Any]:
    """Fields that belong to a job. /docs sends their defaults, which a sync call may have too."""
    fields: dict[str, Any] = JobOptions.model_json_schema()["properties"]
    if "seed" not in read:
        del fields["n"]
    if "steps" not in read:
        del fields["preview"]
    return fields
