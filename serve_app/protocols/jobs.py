"""The routes of jobs, and what makes a job of a request (docs/jobs.md)."""

from __future__ import annotations

import hashlib
import json
import re
import time
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args
from urllib.parse import parse_qsl

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse

from deployments.contract import OutputFormat, draw_seed, validated
from deployments.errors import (
    Full,
    ImagenError,
    InvalidParameter,
    JobsUnavailable,
    MalformedRequest,
    NotFound,
    RateLimited,
)
from deployments.notes import no_steps
from serve_app.intake import check_n
from serve_app.jobs.options import MAX_N, JobOptions
from serve_app.jobs.record import ENDED, Inputs, JobSpec, Priority, Status, new_job_id
from serve_app.jobs.results import result_of
from serve_app.jobs.webhooks import check_webhook, webhook_secret
from serve_app.problem import MEDIA_TYPE, Problem
from serve_app.protocols.parameters import PageQuery, header_parameters, query_parameters
from serve_app.protocols.picture import image_response

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from starlette.types import Receive, Scope, Send

    from deployments.contract import ImageRequest
    from deployments.notes import Note
    from deployments.registry import ModelSpec
    from serve_app.intake import Call, Checked, Intake
    from serve_app.jobs.queue import Event
    from serve_app.jobs.record import Job
    from serve_app.jobs.service import Accepted, Jobs

MOST_WAIT_S = 60.0
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_EVENT_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")
"""Redis refuses a part of 2**64 and above."""
_WAIT = re.compile(r"wait=(\d{1,9})")
_RETRY_HEADERS = {"Idempotency-Key": "a repeated request with the same key finds the first job"}
_REPRESENTATION = "return=representation"
_RESULT_HEADERS = {"Prefer": f"{_REPRESENTATION} puts the picture into the answer itself"}
_STREAM_HEADERS = {"Last-Event-ID": "the last event that the client has"}


class Preference(NamedTuple):
    """What the header Prefer (RFC 7240) asks for.

    Attributes:
        wait_s: for the end of the job, before the answer.
        applied: as the answer repeats it.
    """

    wait_s: float
    applied: str


class AcceptedJob(BaseModel):
    """A job has been made, or was made by an earlier request with the same Idempotency-Key."""

    job_id: str
    status: Status


class Result(BaseModel):
    """One result of a job."""

    url: str = Field(description="leads to the picture; never goes stale while the job is kept")
    seed: int | None
    media_type: str
    width_px: int
    height_px: int
    bytes: int
    metadata: dict[str, Any] = Field(description="model, batch size, GPU seconds, timings, notes")


class JobDocument(BaseModel):
    """A job as it is now."""

    job_id: str
    status: Status
    task: str
    model: str | None = Field(description="that the request named; null for the task's default")
    priority: Priority
    created_at: str
    started_at: str | None
    ended_at: str | None
    expires_at: str | None
    deadline_at: str
    position: int | None = Field(description="in the queue, from 1; null unless queued")
    steps_done: int
    steps: int
    eta_s: float | None = Field(description="seconds until its end, about; null if unknown")
    attempts: int
    timings_s: dict[str, float]
    gpu_seconds: float
    cost: float | None
    error: dict[str, Any] | None = Field(description="problem details; null unless failed")
    webhook: dict[str, Any] | None
    retry_of: str | None
    n: int
    request: dict[str, Any]
    results: list[Result]
    links: dict[str, str]


class Secret(BaseModel):
    """For the library `standardwebhooks`, or another one by that specification."""

    secret: str


class JobPage(BaseModel):
    """Jobs, newest first."""

    jobs: list[JobDocument]
    next_cursor: str | None


# --- from an image route to a job ---


def preference_of(request: Request, jobs: Jobs | None) -> Preference | None:
    """The preference for a job; None for an answer in the same call.

    A preference that is unknown or malformed is ignored, as RFC 7240 says.
    """
    given = _preferences(request)
    for part in given:
        if found := _WAIT.fullmatch(part):
            wait_s = min(float(found[1]), MOST_WAIT_S)
            return Preference(wait_s, f"wait={wait_s:.0f}")
    if "respond-async" in given:
        return Preference(0, "respond-async")
    by_default = jobs is not None and jobs.clients.respond_async_by_default
    return Preference(0, "") if by_default else None


def _preferences(request: Request) -> list[str]:
    """The preferences of a request, without spaces and parameters."""
    given = ",".join(request.headers.getlist("prefer")).split(",")
    return [part.lower().replace(" ", "").partition(";")[0] for part in given]


def check_kept(preference: Preference, jobs: Jobs | None) -> None:
    """Whether a preference for a job can be honoured.

    Raises:
        InvalidParameter: jobs are switched off.
    """
    if jobs is None:
        raise InvalidParameter(
            "The header Prefer asks for a job, and this service keeps none.",
            value=preference.applied,
            remedy="Leave the header out; operators: set jobs.enabled.",
        )


def check_sync(request: Request, options: Mapping[str, str]) -> None:
    """Whether a request can be answered in the same call.

    Raises:
        InvalidParameter: it has a field or a header that only a job can have.
    """
    remedy = "Send the header Prefer: respond-async, or leave it out."
    for name, value in validated(JobOptions, options, "job").wishes.items():
        raise InvalidParameter(f"The field {name} belongs to a job.", value=value, remedy=remedy)
    if key := request.headers.get("idempotency-key"):
        raise InvalidParameter(
            "The header Idempotency-Key belongs to a job.", value=key, remedy=remedy
        )


async def jobs_of(request: Request) -> Jobs:
    """The application's jobs.

    Raises:
        NotFound: they are switched off.
    """
    jobs: Jobs | None = request.app.state.jobs
    if jobs is None:
        raise NotFound(
            "This service keeps no jobs.",
            value="jobs.enabled is false",
            remedy="Send pictures without the header Prefer; operators: set jobs.enabled.",
        )
    return jobs


def owner_of(request: Request) -> str:
    """Whose jobs a request may see: the id of its API key."""
    return request.scope["state"]["key"].id


def share_of(request: Request) -> float:
    """The share of the queue that the request's API key may take."""
    return request.scope["state"]["key"].limits.queue_share


def wait_share_of(request: Request) -> float:
    """The share of the places to wait that the request's API key may take."""
    return request.scope["state"]["key"].limits.wait_share


async def submit(
    request: Request, call: Call, intake: Intake, options: Mapping[str, str]
) -> Accepted:
    """Make a job of a request, or find the one that a repeated request made.

    Raises:
        RequestError: the request is wrong, or its Idempotency-Key came with another one.
        Full, RateLimited: there is no room in the queue, or the key has reached its limit.
        JobsUnavailable: Redis or the storage does not answer.
    """
    jobs = await jobs_of(request)
    key = _idempotency_key(request)
    wanted = validated(JobOptions, options, "job")
    check_n(wanted.n, intake.spec_of(call))
    if wanted.webhook:
        url = check_webhook(wanted.webhook, jobs.settings.webhooks)
        wanted = wanted.model_copy(update={"webhook": url})
    checked = await intake.check(replace(call, charge=None))
    made = _job_spec(request, call, checked, wanted)
    if key:
        fingerprint = _fingerprint(call, options, checked.output_format)
        made = replace(made, fingerprint=fingerprint)
    state = request.scope["state"]
    inputs = Inputs(call.image, call.background, call.mask)
    accepted = await jobs.submit(
        made, inputs, idempotency_key=key, share=share_of(request), charge=state["charge"]
    )
    # What the job comes to costs what it costs, also where the client waits for it.
    state["settled"] = accepted.is_new
    if not accepted.is_new:
        await state["refund"]()
    return accepted


def _job_spec(request: Request, call: Call, checked: Checked, wanted: JobOptions) -> JobSpec:
    """What is kept of a request."""
    spec = checked.spec
    fields, notes = _fields(checked.request, spec)
    if wanted.preview and "steps" not in spec.parameters:
        notes += (no_steps("preview", spec.name),)
    return JobSpec(
        job_id=new_job_id(),
        owner=owner_of(request),
        task=call.task,
        model=call.fields.get("model", ""),
        request=fields,
        output_format=checked.output_format,
        width_px=checked.width_px,
        height_px=checked.height_px,
        has_image=call.image is not None,
        image_bytes=sum(len(one or b"") for one in (call.image, call.background, call.mask)),
        background_px=checked.background_px,
        has_mask=call.mask is not None,
        n=wanted.n,
        priority=wanted.priority,
        deadline_s=wanted.deadline_s,
        preview=wanted.preview,
        webhook=wanted.webhook,
        webhook_events=tuple(wanted.webhook_events.split(",")) if wanted.webhook else (),
        request_id=call.request_id,
        notes=notes,
    )


def _fields(request: ImageRequest, spec: ModelSpec) -> tuple[dict[str, Any], tuple[Note, ...]]:
    """What a job keeps of a request, and what was chosen for it."""
    fields = request.model_dump(mode="json", exclude_unset=True)
    if "seed" not in spec.parameters or fields.get("seed") is not None:
        return fields, ()
    # Drawn now, so that each attempt makes the same picture.
    fields["seed"], drawn = draw_seed()
    return fields, (drawn,)


def _idempotency_key(request: Request) -> str:
    key = request.headers.get("idempotency-key")
    if key is None:
        return ""
    if not _KEY.fullmatch(key):
        raise MalformedRequest(
            "The header Idempotency-Key has 1 to 255 printable ASCII characters.",
            value=key[:40] or "an empty header",
            remedy="Send a UUID.",
        )
    return key


def _fingerprint(call: Call, options: Mapping[str, str], output_format: str) -> str:
    """What makes two requests the same: task, fields, picture, and the format of the result."""
    said = [call.task, sorted(call.fields.items()), sorted(options.items()), output_format]
    digest = hashlib.sha256(json.dumps(said).encode())
    digest.update(call.image or b"")
    digest.update(call.background or b"")
    digest.update(call.mask or b"")
    return digest.hexdigest()


async def answer(request: Request, accepted: Accepted, preference: Preference) -> Response:
    """202, or what the job came to if its end is worth waiting for."""
    jobs, prefix = await jobs_of(request), request.scope.get("root_path", "")
    headers = {"Preference-Applied": preference.applied} if preference.applied else {}
    if not preference.wait_s:
        return _accepted(request, accepted.job_id, accepted.status, headers)
    try:
        job = await jobs.wait(
            owner_of(request), accepted.job_id, preference.wait_s, wait_share_of(request)
        )
        if job.status == "completed" and len(job.results) == 1:
            response = await _picture(jobs, job, 0)
            headers["Location"] = f"{prefix}/api/v1/jobs/{accepted.job_id}"
            response.headers.update(headers)
            return response
    except (Full, RateLimited, JobsUnavailable):
        # The job is accepted, and only its id lets the client find it.
        return _accepted(request, accepted.job_id, accepted.status, headers)
    if not job.has_ended:
        return _accepted(request, accepted.job_id, job.status, headers)
    headers["Location"] = f"{prefix}/api/v1/jobs/{accepted.job_id}"
    if job.status == "failed" and job.error:
        if job.error["status"] in (429, 503):
            headers["Retry-After"] = str(request.app.state.retry_after_s)
        return JSONResponse(job.error, job.error["status"], headers, media_type=MEDIA_TYPE)
    return JSONResponse(jobs.view(job, prefix), 200, headers)


def _accepted(
    request: Request, job_id: str, status: str, headers: dict[str, str] | None = None
) -> Response:
    path = f"{request.scope.get('root_path', '')}/api/v1/jobs/{job_id}"
    body = {"job_id": job_id, "status": status}
    return JSONResponse(body, 202, {"Location": path} | (headers or {}))


async def _picture(jobs: Jobs, job: Job, k: int) -> Response:
    image, _ = await jobs.files.result(job.spec.job_id, k)
    return image_response(result_of(job.results[k], image))


class _Result(Response):
    """A result in the answer itself, which holds a place of downloads while it is read and sent."""

    def __init__(self, jobs: Jobs, job: Job, k: int) -> None:
        super().__init__()
        self._jobs, self._job, self._k = jobs, job, k

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._jobs.downloads.take():
            picture = await _picture(self._jobs, self._job, self._k)
            picture.headers["Preference-Applied"] = _REPRESENTATION
            await picture(scope, receive, send)


# --- the routes ---

TheJobs = Annotated["Jobs", Depends(jobs_of)]
Owner = Annotated[str, Depends(owner_of)]
_BINARY = {"type": "string", "format": "binary"}
_PROBLEM = {"content": {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}}


def problems(**texts: str) -> dict[int | str, dict[str, Any]]:
    """Answers of a route, for the reference: what each status means, by `s` and the status."""
    return {
        int(status.removeprefix("s")): {"description": text, **_PROBLEM}
        for status, text in texts.items()
    }


UNAVAILABLE = problems(s503="Redis or the storage does not answer; see Retry-After")
_COMMON = problems(s404="This service keeps no jobs") | UNAVAILABLE
_ONE = problems(s404="There is no such job, or it is another key's") | UNAVAILABLE
_RESULT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The picture, as a call without a job has it",
        "content": {f"image/{name}": {"schema": _BINARY} for name in get_args(OutputFormat)},
    },
    **_ONE,
    **problems(s409="It is not completed", s429="Too many downloads; see Retry-After"),
}
router = APIRouter(tags=["jobs"])


@router.get(
    "/api/v1/jobs",
    summary="Your jobs, newest first",
    responses=_COMMON | problems(s422="A parameter is out of range"),
    response_model=JobPage,
    openapi_extra={"parameters": query_parameters(PageQuery)},
)
async def list_jobs(
    request: Request,
    jobs: TheJobs,
    owner: Owner,
) -> Response:
    """A page of jobs; `next_cursor` leads to the next one."""
    asked = validated(PageQuery, dict(parse_qsl(request.url.query, keep_blank_values=True)), "list")
    page, cursor = await jobs.list(owner, asked.status, asked.cursor, asked.limit)
    prefix = request.scope.get("root_path", "")
    return JSONResponse({"jobs": [jobs.view(j, prefix) for j in page], "next_cursor": cursor})


@router.get("/api/v1/jobs/{job_id}", summary="A job", responses=_ONE, response_model=JobDocument)
async def get_job(request: Request, job_id: str, jobs: TheJobs, owner: Owner) -> Response:
    """Its state, its place in the queue, its progress, its results."""
    return _shown(request, jobs, await jobs.get(owner, job_id))


@router.delete(
    "/api/v1/jobs/{job_id}",
    summary="Cancel a job",
    responses=_ONE | problems(s409="It has ended"),
    response_model=JobDocument,
)
async def cancel_job(request: Request, job_id: str, jobs: TheJobs, owner: Owner) -> Response:
    """A running job stops within one step."""
    return _shown(request, jobs, await jobs.cancel(owner, job_id))


@router.post(
    "/api/v1/jobs/{job_id}/retry",
    summary="Run a failed or canceled job again, as a new job",
    status_code=202,
    responses=_ONE
    | problems(
        s400="The Idempotency-Key is malformed",
        s409="It has not failed, or the Idempotency-Key came before with another request",
        s422="Its task or its model is served no longer",
        s429="There is no room in the queue; see Retry-After",
    ),
    response_model=AcceptedJob,
    openapi_extra={"parameters": header_parameters(_RETRY_HEADERS)},
)
async def retry_job(request: Request, job_id: str, jobs: TheJobs, owner: Owner) -> Response:
    """The same picture and parameters, with attempts of its own."""
    state, registry = request.scope["state"], request.app.state.registry
    spec = (await jobs.get(owner, job_id)).spec
    registry.choose(spec.task, spec.model or None)
    accepted = await jobs.retry(
        owner,
        job_id,
        state["request_id"],
        idempotency_key=_idempotency_key(request),
        share=share_of(request),
        charge=state["charge"],
    )
    if not accepted.is_new:
        await state["refund"]()
    return _accepted(request, accepted.job_id, accepted.status)


@router.get(
    "/api/v1/jobs/{job_id}/result",
    summary="Leads to the first result",
    status_code=307,
    responses=_RESULT,
    response_class=RedirectResponse,
    openapi_extra={"parameters": header_parameters(_RESULT_HEADERS)},
)
async def get_result(request: Request, job_id: str, jobs: TheJobs, owner: Owner) -> Response:
    """A redirect to a link that works without credentials for a while.

    With Prefer: return=representation the picture itself, for clients that cannot follow one.
    """
    return await _to_result(request, jobs, owner, job_id, 0)


@router.get(
    "/api/v1/jobs/{job_id}/results/{k}",
    summary="Leads to a result",
    status_code=307,
    responses=_RESULT,
    response_class=RedirectResponse,
    openapi_extra={"parameters": header_parameters(_RESULT_HEADERS)},
)
async def get_one_result(
    request: Request, job_id: str, k: str, jobs: TheJobs, owner: Owner
) -> Response:
    """A redirect to a link that works without credentials for a while.

    With Prefer: return=representation the picture itself, for clients that cannot follow one.
    """
    place = int(k) if k.isascii() and k.isdigit() and len(k) < 4 else MAX_N
    return await _to_result(request, jobs, owner, job_id, place)


@router.get(
    "/api/v1/jobs/{job_id}/events",
    summary="What happens to a job, as server-sent events",
    responses={
        200: {"description": "The stream", "content": {"text/event-stream": {}}},
        204: {"description": "The job has ended, and Last-Event-ID is its last event"},
        **_ONE,
        **problems(s429="There are too many streams, or too many of your key; see Retry-After"),
    },
    response_class=StreamingResponse,
    openapi_extra={"parameters": header_parameters(_STREAM_HEADERS)},
)
async def follow_job(request: Request, job_id: str, jobs: TheJobs, owner: Owner) -> Response:
    """Ends with the job. The header Last-Event-ID goes on where another stream has ended.

    A browser comes back after each stream, until it gets 204.
    """
    job = await jobs.get(owner, job_id)
    last = request.headers.get("last-event-id", "")
    after = last if _EVENT_ID.fullmatch(last) else ""
    if job.has_ended and after and not await jobs.queue.events(job_id, after):
        return Response(status_code=204)
    # The stream takes the place; this tells before the head of the answer is sent.
    jobs.streams.check(owner, wait_share_of(request))
    stream = _stream(request, jobs, owner, job_id, after)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream, headers=headers, media_type="text/event-stream")


@router.get(
    "/api/v1/webhook-secret",
    summary="The secret that your webhooks are signed with",
    responses=_COMMON,
    response_model=Secret,
)
async def get_webhook_secret(jobs: TheJobs, owner: Owner) -> Response:
    """Of the API key that asks."""
    body = {"secret": webhook_secret(await jobs.queue.webhook_master(), owner)}
    return JSONResponse(body, headers={"Cache-Control": "no-store"})


def _shown(request: Request, jobs: Jobs, job: Job) -> Response:
    headers = {"Cache-Control": "no-store"}
    return JSONResponse(jobs.view(job, request.scope.get("root_path", "")), headers=headers)


async def _to_result(request: Request, jobs: Jobs, owner: str, job_id: str, k: int) -> Response:
    if _REPRESENTATION in _preferences(request):
        return _Result(jobs, await jobs.completed(owner, job_id, k), k)
    link = await jobs.link(owner, job_id, k)
    if link.startswith("/"):
        link = request.scope.get("root_path", "") + link
    return RedirectResponse(link, headers={"Cache-Control": "no-store"})


async def _stream(
    request: Request, jobs: Jobs, owner: str, job_id: str, after: str
) -> AsyncGenerator[str]:
    """Server-sent events, until the job has ended or the client should come back."""
    prefix, until_s = request.scope.get("root_path", ""), time.monotonic() + jobs.clients.stream_s
    yield "retry: 1000\n\n"
    # The status of the answer is out: a job that was forgotten, or a Redis that went away, can only
    # end the stream. The client comes back, and then the status says why.
    with suppress(ImagenError):
        # Closed at once when the client leaves, so that its place is free.
        async with aclosing(jobs.follow(owner, job_id, after, wait_share_of(request))) as events:
            async for event in events:
                if event is None:
                    yield ": nothing new\n\n"
                elif event.name in ENDED:
                    view = jobs.view(await jobs.get(owner, job_id), prefix)
                    yield _event(event, json.dumps(view))
                else:
                    yield _event(event, event.data)
                if time.monotonic() > until_s:
                    return


def _event(event: Event, data: str) -> str:
    # A preview has no id: a client that comes back goes on after the last event that is kept.
    place = f"id: {event.event_id}\n" if event.event_id else ""
    return f"{place}event: {event.name}\ndata: {data}\n\n"
