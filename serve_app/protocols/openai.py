"""OpenAI's images API: https://platform.openai.com/docs/api-reference/images

A model is named as OpenAI's are: by its own name, or by its task. Every other parameter of the
model, such as `steps`, `strength` or `seed`, may stand beside OpenAI's.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response, StreamingResponse

from deployments.contract import ImageResult, validated
from deployments.errors import ImagenError, InvalidParameter, MalformedRequest, UnsupportedMedia
from deployments.notes import Code, Note, documents, no_steps, note
from deployments.settings import Strict
from deployments.tasks import Task
from serve_app.doors import is_json
from serve_app.intake import Call, Intake
from serve_app.jobs.options import MAX_N
from serve_app.problem import openai_document
from serve_app.protocols.inline import base64_of, picture_at, read_object, take_files, text_of
from serve_app.protocols.multipart import read_form
from serve_app.protocols.naming import (
    check_plain,
    known_models,
    named,
    unread_headers,
    unserved,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from deployments.catalogue import Registry
    from deployments.contract import JobProgress
    from deployments.registry import ModelSpec
    from serve_app.intake import Answers
    from serve_app.jobs.kept import Kept
    from serve_app.jobs.service import Jobs

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
IMAGE_ROUTES = (GENERATIONS, EDITS)
router = APIRouter(tags=["OpenAI"])

_MOST_PARTIAL_IMAGES = 3
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
_UNREAD = ("quality", "style", "user", "moderation", "input_fidelity")
"""What OpenAI's clients send, and no model here reads."""
_PICTURES = ("image", "images", "mask")


class Wishes(Strict):
    """The fields that are OpenAI's alone."""

    model: str = Field(default="", max_length=100)
    n: int = Field(default=1, ge=1, le=MAX_N)
    size: str = Field(default="auto", max_length=20)
    background: Literal["auto", "opaque", "transparent"] = "auto"
    response_format: Literal["b64_json", "url"] = "b64_json"
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=_MOST_PARTIAL_IMAGES)


class Refusal(BaseModel):
    """An error as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: str
    request_id: str


class Refused(BaseModel):
    """Every answer of 400 and above."""

    error: Refusal


class Picture(BaseModel):
    """One result."""

    b64_json: str | None = Field(default=None, description="the file; not with url")
    url: str | None = Field(default=None, description="of the file, with response_format=url")
    imagen: dict[str, Any] = Field(description="model, seed, batch_size, timings_s, notes")


class Pictures(BaseModel):
    """The results."""

    created: int
    data: list[Picture]
    output_format: str
    size: str


_EVENTS = "text/event-stream"
_JSON = ("application/json",)
_STATUSES = (400, 401, 404, 406, 408, 413, 415, 429, 503, 504)
_ONE: dict[int | str, dict[str, Any]] = {404: {"model": Refused}}
_NAME = {
    "parameters": [
        {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}},
    ]
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"model": Pictures, "content": {_EVENTS: {}}},
    **{status: {"model": Refused} for status in _STATUSES},
}


_MASK = (
    "What is changed: what is transparent in this picture of the same size; or the word alpha, for "
    "what is transparent in the picture itself."
)


def _body(*kinds: str) -> dict[str, Any]:
    """What the reference says of a body: OpenAI's own fields. Others are the model's."""
    picture = {"type": "string", "description": "The picture: a file; in JSON, base64."}
    fields = {"prompt": {"type": "string"}, **Wishes.model_json_schema()["properties"]}
    if len(kinds) > 1:
        fields |= {"image": picture, "mask": {"type": "string", "description": _MASK}}
    schema = {"type": "object", "properties": fields, "additionalProperties": True}
    return {"requestBody": {"required": True, "content": {k: {"schema": schema} for k in kinds}}}


@dataclass(frozen=True, slots=True)
class Body:
    """What a request holds.

    Attributes:
        fields: as text, by name.
        image: the picture to edit; None for a new one.
        background, mask: further pictures; None if there is none. In their fields stands the word
            picture.
    """

    fields: dict[str, str]
    image: bytes | None = None
    background: bytes | None = None
    mask: bytes | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """A request in our own words.

    Attributes:
        call: for the intake.
        wishes: what OpenAI's fields ask for.
        event: the first part of the names of streamed events.
    """

    call: Call
    wishes: Wishes
    event: Literal["image_generation", "image_edit"]


async def intake_of(request: Request) -> Intake:
    """The application's intake."""
    return request.app.state.intake


TheIntake = Annotated[Intake, Depends(intake_of)]


@router.post(
    GENERATIONS,
    summary="Pictures from a text, as OpenAI's clients ask for them",
    responses=_ANSWERS,
    openapi_extra=_body(*_JSON),
)
async def generate(request: Request, intake: TheIntake) -> Response:
    """JSON in, JSON or a stream of events out."""
    check_plain(request)
    deadline_s = intake.deadline_s()
    body = Body(_texts(await intake.read(_read_generation(request), deadline_s)))
    return await _answer(request, _order(request, body, "image_generation"), deadline_s)


@router.post(
    EDITS,
    summary="A picture changed, as OpenAI's clients ask for it",
    responses=_ANSWERS,
    openapi_extra=_body(*_JSON, "multipart/form-data"),
)
async def edit(request: Request, intake: TheIntake) -> Response:
    """A form or JSON in, JSON or a stream of events out."""
    check_plain(request)
    deadline_s = intake.deadline_s()
    body = await intake.read(_read_edit(request), deadline_s)
    return await _answer(request, _order(request, body, "image_edit"), deadline_s)


@router.get("/v1/models", summary="What may stand in the field model")
async def list_models(request: Request) -> dict[str, Any]:
    """Every model that is served."""
    return {"object": "list", "data": [_model(spec) for spec in _served(request).models]}


@router.get("/v1/models/{name}", summary="One model", responses=_ONE, openapi_extra=_NAME)
async def get_model(request: Request) -> dict[str, Any]:
    """A model by its name or its task."""
    return _model(named(request.path_params["name"], _served(request)))


# --- in ---


async def _read_generation(request: Request) -> dict[str, Any]:
    kind = request.headers.get("content-type", "")
    if kind.lower().startswith("multipart/"):
        raise UnsupportedMedia(
            "Generations are asked for in JSON.",
            value=kind,
            remedy=f"Send a JSON object; or POST a form with a picture to {EDITS}.",
        )
    given = await read_object(request)
    if pictures := [name for name in _PICTURES if given.get(name) is not None]:
        raise InvalidParameter(
            "Generations take no picture.",
            value=f"a field {pictures[0]}",
            remedy=f"Leave it out, or POST to {EDITS}.",
        )
    return given


async def _read_edit(request: Request) -> Body:
    if not is_json(request.headers):
        form = await read_form(request)
        return Body(form.fields, form.image, form.background, form.mask)
    given = {k: v for k, v in (await read_object(request)).items() if v is not None}
    image = _sent(_only([given.pop(name) for name in ("image", "images") if name in given]))
    if "mask" in given:
        given["mask"] = _sent(given["mask"])
    files = take_files(given)
    return Body(_texts(given), await picture_at(request, "image", image), **files)


def _sent(picture: Any) -> Any:
    """What stands for a picture, out of the object that newer clients put it into."""
    if not isinstance(picture, dict):
        return picture
    if picture.keys() == {"image_url"} and picture["image_url"]:
        return picture["image_url"]
    raise InvalidParameter(
        "A picture in an object is its image_url, and nothing else. Files are not kept here.",
        value=json.dumps(picture),
        remedy='Send {"image_url": "data:image/png;base64,..."}.',
    )


def _only(images: list[Any]) -> Any:
    """The one picture of the fields for it, each of which may be a list."""
    sent = [one for some in images for one in (some if isinstance(some, list) else [some])]
    if not sent:
        raise MalformedRequest(
            "An edit needs a picture.", value="no field image", remedy="Send image as base64."
        )
    if len(sent) > 1:
        raise InvalidParameter(
            "An edit takes one picture.", value=f"{len(sent)} pictures", remedy="Send one."
        )
    return sent[0]


def _texts(given: Mapping[str, Any]) -> dict[str, str]:
    """JSON values as a form has them; null stands for a field that is left out."""
    return {name: text_of(name, value) for name, value in given.items() if value is not None}


def _order(request: Request, body: Body, event: Literal["image_generation", "image_edit"]) -> Order:
    fields = dict(body.fields)
    own = {name: fields.pop(name) for name in Wishes.model_fields if name in fields}
    if body.background is not None:
        fields["background"] = own.pop("background")
    if body.mask is not None:
        fields.setdefault("mask_changes", "transparent")
    wishes = validated(Wishes, own, "image")
    _check_format(wishes, request.app.state.jobs)
    spec = _model_for(wishes.model, _served(request), needs_picture=body.image is not None)
    task = spec.task
    # OpenAI's clients must send a prompt, also where the model reads none.
    unread = _UNREAD if "prompt" in spec.parameters else (*_UNREAD, "prompt")
    notes = unread_headers(request)
    notes += [
        note(Code.PARAMETER_UNUSED, f"{name} was ignored: the model does not read it.")
        for name in unread
        if fields.pop(name, None) is not None
    ]
    if wishes.partial_images and not wishes.stream:
        notes.append(note(Code.PARAMETER_UNUSED, "partial_images was ignored without stream."))
    elif wishes.partial_images and "steps" not in spec.parameters:
        notes.append(no_steps("partial_images", spec.name))
    fields = _joined(fields, _size_fields(wishes, spec, notes), "size")
    fields = _joined(fields, _background_fields(wishes, task, notes), "background")
    state = request.scope["state"]
    call = Call(
        task=task,
        fields={**fields, "model": spec.name},
        image=body.image,
        background=body.background,
        mask=body.mask,
        request_id=state["request_id"],
        charge=state["charge"],
        n=wishes.n,
        preview=bool(wishes.stream and wishes.partial_images),
        notes=tuple(notes),
    )
    return Order(call, wishes, event)


def _check_format(wishes: Wishes, jobs: Jobs | None) -> None:
    """Whether pictures can come back as asked for."""
    if wishes.response_format != "url":
        return
    if wishes.stream:
        raise InvalidParameter(
            "The events of a stream hold pictures, not addresses.",
            value="response_format=url, stream=true",
            remedy="Leave one of them out.",
        )
    if jobs is None:
        raise InvalidParameter(
            "This service keeps no pictures, and so has no addresses of them.",
            value="response_format=url",
            remedy="Send response_format=b64_json, or leave it out; operators: set jobs.enabled.",
        )


def _joined(fields: dict[str, str], derived: dict[str, str], theirs: str) -> dict[str, str]:
    """The model's own fields, and those that OpenAI's field `theirs` stands for."""
    if both := sorted(fields.keys() & derived.keys()):
        raise InvalidParameter(
            f"{theirs} and {', '.join(both)} say the same.",
            value=", ".join(f"{name}={fields[name]}" for name in both),
            remedy="Send one of them.",
        )
    return fields | derived


def _size_fields(wishes: Wishes, spec: ModelSpec, notes: list[Note]) -> dict[str, str]:
    """The size as the model's own fields."""
    if wishes.size == "auto":
        return {}
    found = _SIZE.fullmatch(wishes.size)
    if found is None:
        raise InvalidParameter(
            "size must be auto, or width x height.",
            value=wishes.size,
            remedy="Send 1024x1024, say.",
        )
    if "width" in spec.parameters:
        return {"width": found[1], "height": found[2]}
    told = f"size was ignored: {spec.name} gives the size of the picture that was sent."
    notes.append(note(Code.PARAMETER_UNUSED, told))
    return {}


def _background_fields(wishes: Wishes, task: Task, notes: list[Note]) -> dict[str, str]:
    """The background as the fields of the task that removes it."""
    if wishes.background == "auto":
        return {}
    if task is Task.BACKGROUND:
        return {"output": "rgba" if wishes.background == "transparent" else "color"}
    told = f"background={wishes.background} was ignored: model=background cuts a picture out."
    notes.append(note(Code.PARAMETER_UNUSED, told))
    return {}


def _served(request: Request) -> Registry:
    return request.app.state.registry


def _model_for(name: str, served: Registry, *, needs_picture: bool) -> ModelSpec:
    """The model of that name or task; without a name, the default of the request's usual task.

    Raises:
        NotFound: there is no such model, or none that fits.
        InvalidParameter: the model is for the other route.
    """
    if not name:
        wanted = Task.ENHANCE if needs_picture else Task.GENERATE
        if wanted in served:
            return served[wanted]
        raise unserved(wanted, "no model", known_models(served))
    spec = named(name, served)
    if spec.task.needs_picture == needs_picture:
        return spec
    raise InvalidParameter(
        f"The model {name} {'needs a' if spec.task.needs_picture else 'takes no'} picture.",
        value=name,
        remedy=f"POST to {EDITS if spec.task.needs_picture else GENERATIONS}.",
    )


def _model(spec: ModelSpec) -> dict[str, Any]:
    return {"id": spec.name, "object": "model", "created": 0, "owned_by": "imagen"} | {
        "task": str(spec.task),
        "summary": spec.summary,
        "licence": spec.licence,
    }


# --- out ---


async def _answer(request: Request, order: Order, deadline_s: float) -> Response:
    intake: Intake = request.app.state.intake
    if order.wishes.response_format == "url":
        await _kept(request).check_room(_owner(request), order.call.n)
    answers = await intake.follow(order.call, deadline_s)
    if order.wishes.stream:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(
            _events(order, answers, request.scope["state"]), media_type=_EVENTS, headers=headers
        )
    results = [result async for result in _results(answers)]
    if order.wishes.response_format == "url":
        data = [{"url": url} for url in await _addresses(request, results)]
    else:
        data = [{"b64_json": base64_of(result.image)} for result in results]
    data = [one | _facts(result) for one, result in zip(data, results, strict=True)]
    return JSONResponse({"created": int(time.time()), "data": data} | _described(results[0]))


async def _addresses(request: Request, results: Sequence[ImageResult]) -> list[str]:
    """Addresses of the pictures, which open without a key for a while."""
    root = str(request.base_url).rstrip("/")
    links = await _kept(request).keep(_owner(request), results)
    return [root + link if link.startswith("/") else link for link in links]


def _kept(request: Request) -> Kept:
    """What keeps pictures; `_check_format` has refused a request that needs it without."""
    jobs: Jobs = request.app.state.jobs
    return jobs.kept


def _owner(request: Request) -> str:
    return request.scope["state"]["key"].id


async def _results(answers: Answers) -> AsyncGenerator[ImageResult]:
    async for answer in answers:
        if isinstance(answer, tuple):
            for result in answer:
                yield result


async def _events(order: Order, answers: Answers, state: dict[str, Any]) -> AsyncGenerator[str]:
    """Server-sent events: previews as they come, and then the pictures, or an error."""
    sent, wanted = 0, order.wishes.partial_images
    try:
        async for answer in answers:
            if isinstance(answer, tuple):
                for result in answer:
                    body = {"b64_json": base64_of(result.image)} | _described(result)
                    yield _event(f"{order.event}.completed", body | _facts(result))
            elif answer.preview and sent < wanted and _is_due(answer, sent, wanted):
                body = {"b64_json": base64_of(answer.preview), "partial_image_index": sent}
                yield _event(f"{order.event}.partial_image", body | {"output_format": "jpeg"})
                sent += 1
    except ImagenError as error:
        # The status is sent; what the service failed is not charged, and is counted as such.
        state["reason"] = error.code
        if error.status == 429 or error.status >= 500:
            await state["refund"]()
        yield _event("error", openai_document(error, order.call.request_id))


def _is_due(progress: JobProgress, sent: int, wanted: int) -> bool:
    """Whether the next preview's share of the steps is done."""
    return progress.steps_done * (wanted + 1) >= progress.steps * (sent + 1)


def _event(name: str, body: Mapping[str, Any]) -> str:
    data = json.dumps({"type": name, "created_at": int(time.time()), **body})
    return f"event: {name}\ndata: {data}\n\n"


def _facts(result: ImageResult) -> dict[str, Any]:
    """What a result says of itself, beside OpenAI's fields."""
    return {
        "imagen": {
            "model": result.model,
            "seed": result.seed,
            "batch_size": result.batch_size,
            "timings_s": result.timings_s,
            "notes": documents(result.notes),
        }
    }


def _described(result: ImageResult) -> dict[str, Any]:
    size = f"{result.width_px}x{result.height_px}"
    return {"output_format": result.media_type.removeprefix("image/"), "size": size}
