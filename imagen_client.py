"""A client of Imagen in one file: copy it, or import it where Imagen is installed.

It needs Python 3.11, httpx and standardwebhooks. docs/jobs.md says what a job is.

    with Imagen("http://127.0.0.1:8000") as imagen:
        imagen.run("style/comic", "photo.jpg", steps=20).save("comic.png")
        job = imagen.submit("style/aged", "photo.jpg", n=4)
        job.wait(timeout_s=300)
        pictures = job.results()

`AsyncImagen` has the same methods, to be awaited under asyncio.

What goes wrong is one of these:

    ImagenError
      + InvalidRequest     4xx  the request is wrong; sent again unchanged, it fails again
        x Unauthorized     401  no API key, or one that is unknown or revoked
        x NotFound         404  no such job of this key, or no such route
        x Conflict         409  the job's state does not allow it, or an idempotency key came before
      x RateLimited        429  the API key has reached one of its limits
      x Unavailable        429 full, 5xx  the service is full, starting, failed or away
      x ConnectionFailed   no connection, or no answer in time
      x UnexpectedAnswer   something other than Imagen answered
      x JobFailed          the job ended without a picture; `problem` says why
      x JobCanceled        the job was canceled
      x WaitTimeout        the job has not ended yet; it goes on
      x WebhookRefused     a webhook that the service did not sign

A request is sent again by itself after a lost connection, and after an answer that says when to try
again (429, 503). A job is never made twice by that.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import random
import re
import time
import uuid
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar
from urllib.parse import quote

import httpx
from standardwebhooks import Webhook, WebhookVerificationError

if TYPE_CHECKING:
    from typing import Self

T = TypeVar("T")
Status: TypeAlias = Literal["queued", "processing", "completed", "failed", "canceled"]
Priority: TypeAlias = Literal["interactive", "batch"]
Image: TypeAlias = bytes | str | os.PathLike[str] | IO[bytes]
"""The bytes of an image file, its path, or a file opened for reading bytes."""
Parameter: TypeAlias = str | float | bool | bytes | Sequence[str] | None
"""The value of a form field. A field that is None is left out. Bytes are those of an image file,
for fields that take one, such as `mask` and `background`."""
Document: TypeAlias = dict[str, Any]
"""A JSON object of the service."""

KEY_VARIABLE = "IMAGEN_KEY"
"""Environment variable with the API key of a client that is given none."""
BASE_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 90.0
"""Longer than the service's own deadline of a request, 60 s."""
RETRIES = 5

_BINARY = "application/octet-stream"
_ENDED = ("completed", "failed", "canceled")
_BACKOFF_S = (0.5, 8.0)
"""The first pause and the longest, where the service names none."""
_LONGEST_PAUSE_S = 60.0
"""A service that asks for a longer pause gets no further try."""
_POLL_S = (0.1, 5.0)
_MAX_REDIRECTS = 5
_MAX_LINE_BYTES = 16 * 2**20
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


# --- Errors -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What the service says of an error.

    Attributes:
        status: of HTTP.
        code: stable name of the error, such as `invalid_parameter`; empty if something other than
            Imagen answered, such as a proxy.
        fact, value, remedy: what is wrong, what was found, what to do.
        request_id: names the request in the service's log.
        detail: fact, value and remedy in one text.
        errors: the single findings, where there are several.
    """

    status: int
    code: str
    fact: str
    value: str = ""
    remedy: str = ""
    request_id: str = ""
    detail: str = ""
    errors: tuple[Document, ...] = ()

    @classmethod
    def of(cls, document: Document) -> Problem:
        """The problem in a problem+json."""
        texts = {
            name: str(document.get(name, ""))
            for name in ("code", "fact", "value", "remedy", "request_id", "detail")
        }
        return cls(int(document["status"]), errors=tuple(document.get("errors") or ()), **texts)

    def __str__(self) -> str:
        text = self.detail or f"{self.fact} {self.remedy}".strip()
        names = [str(self.status), self.code, self.request_id and f"request {self.request_id}"]
        return f"{text} [{', '.join(name for name in names if name)}]"


class ImagenError(Exception):
    """Base of the tree. It survives a pickle.

    Attributes:
        problem: what the service says of it; None if the service said nothing.
        retry_after_s: when a new try makes sense; None if the service does not say.
        job_id: of the job that it is about, or empty.
    """

    def __init__(
        self,
        message: str,
        *,
        problem: Problem | None = None,
        retry_after_s: float | None = None,
        job_id: str = "",
    ) -> None:
        super().__init__(message)
        self.problem = problem
        self.retry_after_s = retry_after_s
        self.job_id = job_id


class InvalidRequest(ImagenError):
    """The request is wrong. Sent again unchanged, it fails again."""


class Unauthorized(InvalidRequest):
    """The request has no API key, or one that is unknown or revoked."""


class NotFound(InvalidRequest):
    """No job of this key has that id, or there is no such route."""


class Conflict(InvalidRequest):
    """The job's state does not allow it, or the idempotency key came before with another body."""


class RateLimited(ImagenError):
    """The API key has reached one of its limits."""


class Unavailable(ImagenError):
    """The service is full, starting, failed or away."""


class ConnectionFailed(ImagenError):
    """There is no connection, it broke, or no answer came in time."""


class UnexpectedAnswer(ImagenError):
    """Something other than Imagen answered, or another version of it."""


class JobFailed(ImagenError):
    """The job ended without a picture."""


class JobCanceled(ImagenError):
    """The job was canceled."""


class WaitTimeout(ImagenError):
    """The job has not ended yet. It goes on."""


class WebhookRefused(ImagenError):
    """The webhook is not signed with the secret, or it is older than five minutes."""


def _answer_error(response: httpx.Response, *, ours: bool = True) -> ImagenError:
    """The error in an answer that is no success.

    Args:
        response: read to its end.
        ours: whether Imagen was asked, rather than the storage behind a link.
    """
    status = response.status_code
    try:
        problem = Problem.of(response.json())
    except (ValueError, TypeError, KeyError, AttributeError):
        problem = Problem(
            status,
            code="",
            fact=f"{_origin(response.url)} answered {status}, and not with a problem of Imagen.",
            value=response.text[:200],
            remedy="Check the address; a service that is being deployed answers so, too.",
            request_id=response.headers.get("x-request-id", ""),
        )
    kind = {401: Unauthorized, 404: NotFound, 409: Conflict, 429: RateLimited}.get(status)
    # Ray Serve's proxy answers a bare 404 while no application is deployed, and a bare 429 while
    # its queue is full.
    bare = ours and not problem.code and status in (404, 429)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or problem.code == "full" or bare:
        kind = Unavailable
    return (kind or InvalidRequest)(
        str(problem), problem=problem, retry_after_s=_retry_after_s(response)
    )


def _retry_after_s(response: httpx.Response) -> float | None:
    """`Retry-After`, which is seconds or a date."""
    value = response.headers.get("retry-after", "")
    try:
        if value.isdecimal():
            return float(value)
        date = parsedate_to_datetime(value)
        return max(0.0, (date - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def _connection_error(error: httpx.RequestError) -> ConnectionFailed:
    reason = str(error) or type(error).__name__
    failed = ConnectionFailed(f"{_origin(error.request.url)} does not answer: {reason}.")
    failed.__cause__ = error
    return failed


def _end_error(job: JobState) -> JobFailed | JobCanceled | None:
    """The error of a job that ended without a picture."""
    if job.status == "failed":
        return JobFailed(
            f"Job {job.id} failed: {job.error or 'the service does not say why'}",
            problem=job.error,
            job_id=job.id,
        )
    if job.status == "canceled":
        return JobCanceled(f"Job {job.id} was canceled.", job_id=job.id)
    return None


def _is_worth_repeating(error: ImagenError, *, once: bool) -> bool:
    """Whether the request behind an error is to be sent again.

    Args:
        error: what came of it.
        once: whether it must not reach the service twice.
    """
    if isinstance(error, ConnectionFailed):
        return not once or isinstance(error.__cause__, _NEVER_SENT)
    if not isinstance(error, RateLimited | Unavailable) or error.problem is None:
        return False
    if error.problem.code:
        return error.retry_after_s is not None
    return not once and error.problem.status in (404, 429, 502, 503)


@contextmanager
def _understanding(what: str) -> Generator[None]:
    """Turn what a document lacks into UnexpectedAnswer."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, httpx.InvalidURL) as error:
        raise UnexpectedAnswer(
            f"The service's answer is no {what}: {type(error).__name__} {error}."
        ) from error


# --- What the service tells ----------------------------------------------------------------------


@dataclass(frozen=True)
class Note:
    """What the service could not keep of the request, or chose for it.

    Attributes:
        code: for programs, such as frames_dropped.
        text: for people, a sentence.
    """

    code: str
    text: str


@dataclass(frozen=True)
class Picture:
    """A result.

    Attributes:
        data: the image file.
        media_type: such as image/png.
        width_px, height_px: of the result.
        model: name@digest.
        seed: the seed used; None where the model uses no chance.
        batch_size: rows in the pass that carried this one; None if not told.
        timings_s: seconds by stage.
        notes: what was lost or chosen on the way.
        request_id: names the request in the service's log.
    """

    data: bytes = field(repr=False)
    media_type: str
    width_px: int
    height_px: int
    model: str
    seed: int | None
    batch_size: int | None
    timings_s: Mapping[str, float]
    notes: tuple[Note, ...]
    request_id: str

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the image file, over one that is there, and give back its path."""
        path = Path(path)
        path.write_bytes(self.data)
        return path


@dataclass(frozen=True)
class Output:
    """What the service says of one result of a job.

    Attributes:
        url: where `Job.result` fetches it.
        seed: the seed used; None where the model uses no chance.
        media_type: such as image/png.
        width_px, height_px, size_bytes: of the image file.
        metadata: the model, the size of its batch, notes.
    """

    url: str
    seed: int | None
    media_type: str
    width_px: int
    height_px: int
    size_bytes: int
    metadata: Document


class JobState:
    """A job as the service described it last.

    The answer to a submission tells `id` and `status` only. The rest comes with the first
    `refresh`, `wait` or event.

    Attributes:
        id: of the job.
        status: queued or processing, and in the end completed, failed or canceled.
        task: such as comic.
        model: that the request named; None for the task's default.
        priority: interactive or batch.
        created_at, started_at, ended_at: None if not yet, or not told.
        expires_at: when the job and its results are deleted.
        deadline_at: when a job that has not ended fails.
        position: 1 for the job that is next; None unless queued.
        steps_done, steps: of the model.
        eta_s: estimated seconds to the end; None if unknown.
        attempts: how often a model began it.
        timings_s: seconds by stage.
        gpu_seconds: share of a GPU's time.
        cost: of that, if the operator states a price.
        error: why it failed.
        webhook: its url, its events, and how many are still to be delivered.
        retry_of: id of the job that this one repeats.
        request: the parameters.
        outputs: one for each result, once it is completed.
    """

    id: str
    status: Status
    task: str
    model: str | None
    priority: Priority
    created_at: datetime | None
    started_at: datetime | None
    ended_at: datetime | None
    expires_at: datetime | None
    deadline_at: datetime | None
    position: int | None
    steps_done: int | None
    steps: int | None
    eta_s: float | None
    attempts: int
    timings_s: dict[str, float]
    gpu_seconds: float
    cost: float | None
    error: Problem | None
    webhook: Document | None
    retry_of: str | None
    request: Document
    outputs: tuple[Output, ...]

    def __init__(self, document: Document) -> None:
        self.update(document)

    def update(self, document: Document) -> None:
        """Take over a newer description.

        Raises:
            UnexpectedAnswer: it is no job.
        """
        with _understanding("job"):
            get = document.get
            self.id, self.status = document["job_id"], document["status"]
            self.task, self.model = get("task", ""), get("model")
            self.priority = get("priority", "interactive")
            self.created_at = _time(get("created_at"))
            self.started_at = _time(get("started_at"))
            self.ended_at = _time(get("ended_at"))
            self.expires_at = _time(get("expires_at"))
            self.deadline_at = _time(get("deadline_at"))
            self.position, self.eta_s = get("position"), get("eta_s")
            self.steps_done, self.steps = get("steps_done"), get("steps")
            self.attempts, self.timings_s = get("attempts", 0), get("timings_s") or {}
            self.gpu_seconds, self.cost = get("gpu_seconds") or 0.0, get("cost")
            self.error = Problem.of(document["error"]) if get("error") else None
            self.webhook, self.retry_of = get("webhook"), get("retry_of")
            self.request = get("request") or {}
            self.outputs = tuple(map(_output, get("results") or ()))

    @property
    def ended(self) -> bool:
        """Whether the status is final."""
        return self.status in _ENDED

    def __repr__(self) -> str:
        return f"{type(self).__name__}(id={self.id!r}, status={self.status!r})"


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _output(entry: Document) -> Output:
    return Output(
        url=entry["url"],
        seed=entry.get("seed"),
        media_type=entry["media_type"],
        width_px=entry["width_px"],
        height_px=entry["height_px"],
        size_bytes=entry["bytes"],
        metadata=entry.get("metadata") or {},
    )


@dataclass(frozen=True)
class Event:
    """Something that happened to a job.

    Attributes:
        id: for `Job.events(after=…)`.
        job_id: of the job.
    """

    id: str
    job_id: str


@dataclass(frozen=True)
class StateEvent(Event):
    """The job has a new status. Its last event is one of these.

    Attributes:
        status: the new one.
        job: as it was then.
    """

    status: Status
    job: JobState


@dataclass(frozen=True)
class ProgressEvent(Event):
    """The job has made steps.

    Attributes:
        steps_done, steps: of the model.
        eta_s: estimated seconds to the end; None if unknown.
    """

    steps_done: int
    steps: int | None
    eta_s: float | None


@dataclass(frozen=True)
class PreviewEvent(Event):
    """A small picture of a step, of a job with `preview=True`.

    Attributes:
        image: the image file.
        media_type: such as image/jpeg.
    """

    image: bytes = field(repr=False)
    media_type: str


@dataclass(frozen=True)
class WebhookEvent:
    """A verified webhook.

    Attributes:
        id: the same in every attempt of one event: ignore an id that was seen before.
        type: such as job.completed.
        timestamp: when it happened; None if not told.
        job: as it was then.
    """

    id: str
    type: str
    timestamp: datetime | None
    job: JobState


def verify_webhook(body: bytes | str, headers: Mapping[str, str], secret: str) -> WebhookEvent:
    """The event in a webhook, if the service signed it (Standard Webhooks).

    Args:
        body: as it came, not parsed and written again.
        headers: of the request, in any case.
        secret: whsec_…, of the service.

    Raises:
        WebhookRefused: the signature is missing, wrong or older than five minutes.
        UnexpectedAnswer: the body is signed, and is no event of a job.
        ValueError: the secret is none.
    """
    try:
        webhook = Webhook(secret)
    except Exception:  # the library lets whatever its decoder raises through
        raise ValueError("The webhook secret is not whsec_ and base64 after it.") from None
    lower = {name.lower(): value for name, value in headers.items()}
    try:
        webhook.verify(body, lower, json_parse=False)
    except (WebhookVerificationError, ValueError) as error:
        raise WebhookRefused(f"The webhook is not signed with the secret: {error}.") from error
    with _understanding("event of a job"):
        document = json.loads(body)
        return WebhookEvent(
            id=lower["webhook-id"],
            type=document["type"],
            timestamp=_time(document.get("timestamp")),
            job=JobState(document["data"]),
        )


def _direct_picture(response: httpx.Response) -> Picture:
    """The picture of a call without a job, which its headers describe."""
    _refuse_redirect(response)
    headers = response.headers
    with _understanding("picture"):
        width_px, height_px = map(int, headers["x-imagen-size"].split("x"))
        seed, batch_size = headers.get("x-imagen-seed"), headers.get("x-imagen-batch-size")
        # Proxies may join headers of one name by commas.
        notes = re.split(r", (?=[a-z_]+: )", headers.get("x-imagen-note", ""))
        stages = re.findall(
            r"([^\s,;]+);dur=(\d+(?:\.\d+)?)", headers.get("server-timing", ""), re.ASCII
        )
        return Picture(
            data=response.content,
            media_type=headers["content-type"],
            width_px=width_px,
            height_px=height_px,
            model=headers.get("x-imagen-model", ""),
            seed=int(seed) if seed else None,
            batch_size=int(batch_size) if batch_size else None,
            timings_s={stage: float(duration_ms) / 1000 for stage, duration_ms in stages},
            notes=tuple(Note(*note.split(": ", 1)) for note in notes if ": " in note),
            request_id=headers.get("x-request-id", ""),
        )


def _job_picture(response: httpx.Response, job: JobState, k: int) -> Picture:
    with _understanding("result of the job"):
        output = dict(enumerate(job.outputs))[k]
        return Picture(
            data=response.content,
            media_type=output.media_type,
            width_px=output.width_px,
            height_px=output.height_px,
            model=output.metadata.get("model", ""),
            seed=output.seed,
            batch_size=output.metadata.get("batch_size"),
            timings_s=job.timings_s,
            notes=tuple(Note(**note) for note in output.metadata.get("notes") or ()),
            request_id=response.headers.get("x-request-id", ""),
        )


# --- Server-sent events --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Message:
    name: str
    data: str
    id: str


class _EventParser:
    """Bytes of one stream in, messages out, as the HTML standard says (server-sent events).

    Attributes:
        last_id: the id of the last message, or the one that it began with.
        retry_s: after which the server wants to be asked again.
    """

    def __init__(self, last_id: str, retry_s: float) -> None:
        self.last_id = self._id = last_id
        self.retry_s = retry_s
        self._line = b""
        self._after_cr = False
        self._at_start = True
        self._name = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[_Message]:
        if self._after_cr:  # the second half of a line end that two chunks share
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        *lines, self._line = re.split(rb"\r\n|\r|\n", self._line + chunk)
        if len(self._line) > _MAX_LINE_BYTES:
            raise UnexpectedAnswer(f"A line of the events is longer than {_MAX_LINE_BYTES} bytes.")
        for line in lines:
            text = line.decode("utf-8", "replace")
            if self._at_start:
                text, self._at_start = text.removeprefix("\ufeff"), False
            if text:
                self._take(*text.partition(":")[::2])
            elif message := self._end_message():
                yield message

    def _take(self, name: str, value: str) -> None:
        value = value.removeprefix(" ")
        if name == "event":
            self._name = value
        elif name == "data":
            self._data.append(value)
        elif name == "id" and value.isascii() and value.isprintable():
            self._id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            self.retry_s = min(int(value) / 1000, _LONGEST_PAUSE_S)

    def _end_message(self) -> _Message | None:
        name, data, self.last_id = self._name, self._data, self._id
        self._name, self._data = "", []
        return _Message(name or "message", "\n".join(data), self.last_id) if data else None


class _Feed:
    """The events of one job, over as many streams as it takes. The job is kept up to date.

    Attributes:
        over: whether the job's last event came.
        pause_s: to wait before the next stream.
    """

    def __init__(self, flows: _Flows, job: JobState, after: str) -> None:
        self.over = False
        self.pause_s = 0.0
        self._flows, self._job = flows, job
        self._parser = _EventParser(after, _BACKOFF_S[0])
        self._failures = 0
        self._is_open = False

    def request(self) -> httpx.Request:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if self._parser.last_id:
            headers["Last-Event-ID"] = self._parser.last_id
        self._parser = _EventParser(self._parser.last_id, self._parser.retry_s)
        self._is_open = False
        return self._flows.request("GET", f"{_job_path(self._job.id)}/events", headers)

    def opened(self, response: httpx.Response) -> None:
        """Look at the head of an answer; of an error, at its body too."""
        _refuse_redirect(response)
        if not response.is_success:
            raise _answer_error(response)
        if response.status_code == HTTPStatus.NO_CONTENT:  # nothing came after the last event
            self.over = True
            return
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise UnexpectedAnswer("The service's answer is no stream of events.")
        self._is_open = True

    def take(self, chunk: bytes) -> Iterator[Event]:
        for message in self._parser.feed(chunk):
            with _understanding("event"):
                event = self._event(message)
            if event is not None:
                self._failures = 0
                yield event
            if self.over:
                return

    def closed(self) -> None:
        """The service ended the stream before the job has ended."""
        self._failures = 0
        self.pause_s = self._parser.retry_s

    def lost(self, error: httpx.RequestError | ImagenError) -> None:
        """The stream broke off, or did not begin.

        Raises:
            ImagenError: it is no use to try again.
        """
        if self._is_open and isinstance(error, httpx.ReadTimeout):
            return self.closed()  # nothing happens to a job that waits for its turn
        self._failures += 1
        failed = _connection_error(error) if isinstance(error, httpx.RequestError) else error
        self.pause_s = max(self._parser.retry_s, self._flows.pause_s(failed, self._failures))

    def _event(self, message: _Message) -> Event | None:
        document: Document = json.loads(message.data)
        job, base = self._job, (message.id, self._job.id)
        if message.name in ("queued", "processing", *_ENDED):
            if "task" in document:
                job.update(document)
            else:  # only the last event has the whole job
                job.status = document["status"]
            self.over = job.ended
            return StateEvent(*base, job.status, JobState(document))
        if message.name == "progress":
            job.status, job.position = document["status"], None
            job.steps_done, job.steps = document["steps_done"], document.get("steps")
            job.eta_s = document.get("eta_s")
            return ProgressEvent(*base, document["steps_done"], job.steps, job.eta_s)
        if message.name == "preview":
            kind, _, data = document["image"].partition(";base64,")
            return PreviewEvent(*base, base64.b64decode(data), kind.removeprefix("data:"))
        return None


# --- Requests and answers, for both clients -------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A request to be sent, after a pause."""

    request: httpx.Request
    after_s: float


_Flow: TypeAlias = Generator[_Call, httpx.Response, T]
"""One operation: it yields calls, gets their answers, and returns what came of them.

The senders of the two clients carry a flow out. So the clients differ in nothing but how they send
and how they wait.
"""


class _Flows:
    """Builds requests, reads answers, and decides what is sent again."""

    def __init__(
        self,
        http: httpx.Client | httpx.AsyncClient,
        key: str | None,
        timeout_s: float,
        retries: int,
    ) -> None:
        self.base_url = _origin(http.base_url) + http.base_url.path.rstrip("/")
        self._http = http
        self._headers = httpx.Headers()  # its repr hides the key
        key = (os.environ.get(KEY_VARIABLE, "") if key is None else key).strip()
        if key:
            self._headers["Authorization"] = f"Bearer {_header_value('API key', key)}"
        self._timeout_s = timeout_s
        self._retries = retries

    def request(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, **body: Any
    ) -> httpx.Request:
        return self._http.build_request(
            method, path, headers={**self._headers, **(headers or {})}, **body
        )

    def pause_s(self, error: ImagenError, failures: int, *, once: bool = False) -> float:
        """How long to wait after a number of failures in a row.

        Raises:
            ImagenError: the one given, if there is to be no further try.
        """
        if failures > self._retries or not _is_worth_repeating(error, once=once):
            raise error
        first_s, longest_s = _BACKOFF_S
        pause_s = min(first_s * 2 ** (failures - 1), longest_s) * random.uniform(0.5, 1)  # noqa: S311 - jitter
        pause_s = max(pause_s, error.retry_after_s or 0)
        if pause_s > _LONGEST_PAUSE_S:
            raise error
        return pause_s

    def running(
        self, task: str, image: Image | None, parameters: Mapping[str, Parameter]
    ) -> _Flow[Picture]:
        request = self.request("POST", _task_path(task), files=_form(image, parameters))
        response = yield from self._exchange(request)
        if response.status_code != HTTPStatus.ACCEPTED:
            return _direct_picture(response)
        # The service makes jobs by default (`respond_async_by_default`).
        job = JobState(_document(response))
        yield from self.waiting(job, self._timeout_s)
        return (yield from self.fetching(job, 0))

    def submitting(
        self,
        task: str,
        image: Image | None,
        fields: Mapping[str, Parameter],
        idempotency_key: str | None,
    ) -> _Flow[Document]:
        key = idempotency_key or uuid.uuid4().hex
        headers = {
            "Prefer": "respond-async",
            "Idempotency-Key": _header_value("idempotency key", key),
        }
        request = self.request("POST", _task_path(task), headers, files=_form(image, fields))
        return _document((yield from self._exchange(request)))

    def reading(
        self, job_id: str, *, after_s: float = 0, until: float = math.inf
    ) -> _Flow[Document]:
        request = self.request("GET", _job_path(job_id))
        return _document((yield from self._exchange(request, after_s=after_s, until=until)))

    def listing(
        self, status: Status | None, limit: int, cursor: str
    ) -> _Flow[tuple[list[Document], str | None]]:
        params = {"status": status, "limit": limit, "cursor": cursor}
        request = self.request(
            "GET", "/api/v1/jobs", params={name: value for name, value in params.items() if value}
        )
        page = _document((yield from self._exchange(request)))
        with _understanding("list of jobs"):
            return page["jobs"], page["next_cursor"]

    def canceling(self, job_id: str) -> _Flow[Document]:
        request = self.request("DELETE", _job_path(job_id))
        return _document((yield from self._exchange(request)))

    def retrying(self, job_id: str) -> _Flow[Document]:
        request = self.request("POST", f"{_job_path(job_id)}/retry")
        return _document((yield from self._exchange(request, once=True)))

    def waiting(self, job: JobState, timeout_s: float | None) -> _Flow[None]:
        until = math.inf if timeout_s is None else time.monotonic() + timeout_s
        pause_s, longest_s = _POLL_S
        after_s = 0.0
        # A completed job from the answer to a submission says nothing of its results yet.
        while not job.ended or not (job.outputs or job.error):
            job.update((yield from self.reading(job.id, after_s=after_s, until=until)))
            if job.ended:
                break
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise WaitTimeout(
                    f"Job {job.id} is {job.status} after {timeout_s} seconds.", job_id=job.id
                )
            after_s = min(pause_s, left_s)
            pause_s = min(pause_s * 1.5, longest_s)
        if error := _end_error(job):
            raise error

    def fetching(self, job: JobState, k: int) -> _Flow[Picture]:
        if not job.outputs:
            job.update((yield from self.reading(job.id)))
        if error := _end_error(job):
            raise error
        response = yield from self._exchange(
            self.request("GET", f"{_job_path(job.id)}/results/{k}")
        )
        for _ in range(_MAX_REDIRECTS):
            if not response.has_redirect_location:
                break
            # The link is signed. The key is not for the storage, which refuses a second credential.
            with _understanding("link"):
                url = response.url.join(response.headers["location"])
            link = self._http.build_request("GET", url)
            response = yield from self._exchange(link, ours=False)
        if not response.is_success:
            raise UnexpectedAnswer(f"The link of the result redirects {_MAX_REDIRECTS} times.")
        return _job_picture(response, job, k)

    def _exchange(
        self,
        request: httpx.Request,
        *,
        after_s: float = 0,
        until: float = math.inf,
        once: bool = False,
        ours: bool = True,
    ) -> _Flow[httpx.Response]:
        """Send a request, again if that may help.

        Args:
            request: to send.
            after_s: a pause before.
            until: time of the monotonic clock, after which it is not sent again.
            once: whether it must not reach the service twice.
            ours: whether Imagen is asked, rather than the storage behind a link.

        Returns:
            A success, or a redirect.
        """
        failures = 0
        while True:
            left_s = max(until - time.monotonic() - after_s, 1)
            timeout = httpx.Timeout(min(self._timeout_s, left_s), connect=_connect_s(left_s))
            request.extensions["timeout"] = timeout.as_dict()
            try:
                response = yield _Call(request, after_s)
            except httpx.RequestError as lost:
                error = _connection_error(lost)
            else:
                if response.is_success or response.has_redirect_location:
                    return response
                error = _answer_error(response, ours=ours)
            failures += 1
            after_s = self.pause_s(error, failures, once=once)
            if time.monotonic() + after_s > until:
                raise error


def _base_url(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ValueError(f"base_url is no URL: {error}.") from error
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise ValueError("base_url must be http:// or https://, a host, and a path at most.")
    return url


def _origin(url: httpx.URL) -> str:
    """Scheme, host and port: no password, path or signature."""
    return f"{url.scheme}://{url.netloc.decode()}"


def _connect_s(timeout_s: float) -> float:
    return min(timeout_s, 10)


def _header_value(name: str, value: str) -> str:
    # httpx would show the value in its own error.
    if not (value.isascii() and value.isprintable() and len(value) <= 255):
        raise ValueError(f"The {name} must be 1 to 255 printable ASCII characters.")
    return value


def _task_path(task: str) -> str:
    return f"/api/v1/images/{quote(task.strip('/'))}"


def _job_path(job_id: str) -> str:
    return f"/api/v1/jobs/{quote(job_id, safe='')}"


def _refuse_redirect(response: httpx.Response) -> None:
    if response.has_redirect_location:
        raise UnexpectedAnswer(
            f"{_origin(response.url)} redirects to {response.headers['location']}. "
            "If the service is there, name that place as base_url."
        )


def _document(response: httpx.Response) -> Document:
    _refuse_redirect(response)
    with _understanding("JSON object"):
        document = response.json()
        return {**document}


def _read(image: Image | None) -> bytes | None:
    if image is None or isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    return image.read()


def _form(
    image: Image | None, fields: Mapping[str, Parameter]
) -> list[tuple[str, tuple[str | None, bytes | str, str | None]]]:
    """Every part of the form. One without a file name is a plain field."""
    form: list[tuple[str, tuple[str | None, bytes | str, str | None]]] = []
    for name, value in fields.items():
        if isinstance(value, bytes):
            form.append((name, (name, value, _BINARY)))
        elif value is not None:
            form.append((name, (None, _text(value), None)))
    data = _read(image)
    if data is not None:
        form.append(("image", ("image", data, _BINARY)))
    return form


def _text(value: str | float | Sequence[str]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    return ",".join(value)


# --- The client -----------------------------------------------------------------------------------


class _Sender:
    """Sends the calls of flows, and blocks while it waits."""

    def __init__(self, base_url: str, key: str | None, timeout_s: float, retries: int) -> None:
        timeout = httpx.Timeout(timeout_s, connect=_connect_s(timeout_s))
        self.http = httpx.Client(base_url=_base_url(base_url), timeout=timeout)
        self.flows = _Flows(self.http, key, timeout_s, retries)

    def run(self, flow: _Flow[T]) -> T:
        try:
            call = next(flow)
            while True:
                time.sleep(call.after_s)
                try:
                    response = self.http.send(call.request)
                except httpx.RequestError as error:
                    call = flow.throw(error)
                else:
                    call = flow.send(response)
        except StopIteration as end:
            return end.value


class Imagen:
    """A client of one service. Threads may share it.

    Args:
        base_url: of the service, without /api.
        key: the API key. None takes $IMAGEN_KEY; an empty one sends none.
        timeout_s: how long to wait for a connection (at most 10 s), for the answer to a request,
            and for each further part of it.
        retries: how often a request is sent again.

    Raises:
        ValueError: the URL or the key cannot be one.
    """

    def __init__(
        self,
        base_url: str = BASE_URL,
        key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        retries: int = RETRIES,
    ) -> None:
        self._sender = _Sender(base_url, key, timeout_s, retries)

    def run(self, task: str, image: Image | None = None, **parameters: Parameter) -> Picture:
        """Send a picture and wait for the result, without a job.

        Args:
            task: the route below /api/v1/images/, such as style/comic.
            image: an image file: its bytes, its path, or a file opened in binary mode.
            parameters: of the task, such as steps=20; /docs of the service lists them.

        Raises:
            ImagenError: see the tree above.
            OSError: the image file cannot be read.
        """
        return self._sender.run(self._sender.flows.running(task, image, parameters))

    def submit(
        self,
        task: str,
        image: Image | None = None,
        *,
        n: int | None = None,
        priority: Priority | None = None,
        deadline_s: float | None = None,
        webhook: str | None = None,
        webhook_events: Sequence[Status] | None = None,
        preview: bool | None = None,
        idempotency_key: str | None = None,
        **parameters: Parameter,
    ) -> Job:
        """Make a job.

        Args:
            task: the route below /api/v1/images/, such as style/comic.
            image: an image file: its bytes, its path, or a file opened in binary mode.
            n: 1 to 8 results, of seeds that follow one another; diffusion tasks only.
            priority: interactive or batch.
            deadline_s: 1 to 604800, after which a job that has not ended fails.
            webhook: URL that gets events; `verify_webhook` reads them.
            webhook_events: the statuses that are sent there.
            preview: whether the events have small pictures of the steps.
            idempotency_key: 1 to 255 printable characters. The same key with the same picture and
                parameters gives the first job. None makes one of its own for this call.
            parameters: of the task, such as steps=20; /docs of the service lists them.

        Raises:
            ImagenError: see the tree above.
            OSError: the image file cannot be read.
            ValueError: the idempotency key cannot be one.
        """
        fields: dict[str, Parameter] = {
            "n": n,
            "priority": priority,
            "deadline_s": deadline_s,
            "webhook": webhook,
            "webhook_events": webhook_events,
            "preview": preview,
            **parameters,
        }
        flow = self._sender.flows.submitting(task, image, fields, idempotency_key)
        return Job(self._sender, self._sender.run(flow))

    def job(self, job_id: str) -> Job:
        """A job by its id.

        Raises:
            NotFound: this key has no such job, or it has expired.
        """
        return Job(self._sender, self._sender.run(self._sender.flows.reading(job_id)))

    def jobs(self, *, status: Status | None = None, page_size: int = 20) -> Iterator[Job]:
        """All jobs of this key, newest first, page by page.

        Args:
            status: None for all.
            page_size: 1 to 100 jobs a request.
        """
        cursor: str | None = ""
        while cursor is not None:
            flow = self._sender.flows.listing(status, page_size, cursor)
            documents, cursor = self._sender.run(flow)
            yield from (Job(self._sender, document) for document in documents)

    def close(self) -> None:
        """Close the connections."""
        self._sender.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Imagen({self._sender.flows.base_url!r})"


class Job(JobState):
    """A job, from `Imagen.submit`, `job` or `jobs`. Its methods keep its attributes up to date."""

    def __init__(self, sender: _Sender, document: Document) -> None:
        super().__init__(document)
        self._sender = sender

    def refresh(self) -> Self:
        """Ask the service for the job's present state."""
        self.update(self._sender.run(self._sender.flows.reading(self.id)))
        return self

    def wait(self, timeout_s: float | None = None) -> Self:
        """Wait until the job is completed.

        Args:
            timeout_s: None waits to the end, which the job's deadline bounds.

        Raises:
            JobFailed, JobCanceled: it ended otherwise.
            WaitTimeout: it has not ended in time, and goes on.
            ImagenError: the service does not answer.
        """
        self._sender.run(self._sender.flows.waiting(self, timeout_s))
        return self

    def events(self, after: str = "") -> Iterator[Event]:
        """Follow the job to its end.

        The service ends a stream after a while, and connections break. The events go on where
        they stopped.

        Args:
            after: the id of an event, to have only what came later; nothing after the last one.

        Raises:
            ImagenError: the service does not answer.
        """
        feed = _Feed(self._sender.flows, self, after)
        while not feed.over:
            time.sleep(feed.pause_s)
            try:
                with closing(self._sender.http.send(feed.request(), stream=True)) as response:
                    if not response.is_success:
                        response.read()
                    feed.opened(response)
                    for chunk in response.iter_bytes():
                        yield from feed.take(chunk)
                        if feed.over:
                            return
                feed.closed()
            except (httpx.RequestError, RateLimited, Unavailable) as error:
                feed.lost(error)

    def cancel(self) -> Self:
        """Cancel the job. It is no error if it is canceled already.

        Raises:
            Conflict: it is completed or failed.
        """
        self.update(self._sender.run(self._sender.flows.canceling(self.id)))
        return self

    def retry(self) -> Job:
        """Make a new job of the same picture and parameters.

        Raises:
            Conflict: this one is neither failed nor canceled.
        """
        return Job(self._sender, self._sender.run(self._sender.flows.retrying(self.id)))

    def result(self, k: int = 0) -> Picture:
        """Fetch the k-th result, counted from 0, of a completed job.

        Raises:
            Conflict: the job has not ended yet.
            JobFailed, JobCanceled: it has no results.
        """
        return self._sender.run(self._sender.flows.fetching(self, k))

    def results(self) -> list[Picture]:
        """Fetch all results of a completed job; raises as `result` does."""
        first = self.result()
        return [first, *(self.result(k) for k in range(1, len(self.outputs)))]


# --- The client for asyncio -----------------------------------------------------------------------


class _AsyncSender:
    """Sends the calls of flows under asyncio."""

    def __init__(self, base_url: str, key: str | None, timeout_s: float, retries: int) -> None:
        timeout = httpx.Timeout(timeout_s, connect=_connect_s(timeout_s))
        self.http = httpx.AsyncClient(base_url=_base_url(base_url), timeout=timeout)
        self.flows = _Flows(self.http, key, timeout_s, retries)

    async def run(self, flow: _Flow[T]) -> T:
        try:
            call = next(flow)
            while True:
                await asyncio.sleep(call.after_s)
                try:
                    response = await self.http.send(call.request)
                except httpx.RequestError as error:
                    call = flow.throw(error)
                else:
                    call = flow.send(response)
        except StopIteration as end:
            return end.value


class AsyncImagen:
    """`Imagen` under asyncio: the same arguments, and methods to be awaited."""

    def __init__(
        self,
        base_url: str = BASE_URL,
        key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        retries: int = RETRIES,
    ) -> None:
        self._sender = _AsyncSender(base_url, key, timeout_s, retries)

    async def run(self, task: str, image: Image | None = None, **parameters: Parameter) -> Picture:
        """See `Imagen.run`."""
        data = await asyncio.to_thread(_read, image)
        return await self._sender.run(self._sender.flows.running(task, data, parameters))

    async def submit(
        self,
        task: str,
        image: Image | None = None,
        *,
        n: int | None = None,
        priority: Priority | None = None,
        deadline_s: float | None = None,
        webhook: str | None = None,
        webhook_events: Sequence[Status] | None = None,
        preview: bool | None = None,
        idempotency_key: str | None = None,
        **parameters: Parameter,
    ) -> AsyncJob:
        """See `Imagen.submit`."""
        fields: dict[str, Parameter] = {
            "n": n,
            "priority": priority,
            "deadline_s": deadline_s,
            "webhook": webhook,
            "webhook_events": webhook_events,
            "preview": preview,
            **parameters,
        }
        data = await asyncio.to_thread(_read, image)
        flow = self._sender.flows.submitting(task, data, fields, idempotency_key)
        return AsyncJob(self._sender, await self._sender.run(flow))

    async def job(self, job_id: str) -> AsyncJob:
        """See `Imagen.job`."""
        flow = self._sender.flows.reading(job_id)
        return AsyncJob(self._sender, await self._sender.run(flow))

    async def jobs(
        self, *, status: Status | None = None, page_size: int = 20
    ) -> AsyncIterator[AsyncJob]:
        """See `Imagen.jobs`; for `async for`."""
        cursor: str | None = ""
        while cursor is not None:
            flow = self._sender.flows.listing(status, page_size, cursor)
            documents, cursor = await self._sender.run(flow)
            for document in documents:
                yield AsyncJob(self._sender, document)

    async def close(self) -> None:
        """Close the connections."""
        await self._sender.http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncImagen({self._sender.flows.base_url!r})"


class AsyncJob(JobState):
    """`Job` under asyncio: the same methods, to be awaited."""

    def __init__(self, sender: _AsyncSender, document: Document) -> None:
        super().__init__(document)
        self._sender = sender

    async def refresh(self) -> Self:
        """See `Job.refresh`."""
        self.update(await self._sender.run(self._sender.flows.reading(self.id)))
        return self

    async def wait(self, timeout_s: float | None = None) -> Self:
        """See `Job.wait`."""
        await self._sender.run(self._sender.flows.waiting(self, timeout_s))
        return self

    async def events(self, after: str = "") -> AsyncIterator[Event]:
        """See `Job.events`; for `async for`. To leave early, go through `contextlib.aclosing`."""
        feed = _Feed(self._sender.flows, self, after)
        while not feed.over:
            await asyncio.sleep(feed.pause_s)
            try:
                answer = await self._sender.http.send(feed.request(), stream=True)
                async with aclosing(answer) as response:
                    if not response.is_success:
                        await response.aread()
                    feed.opened(response)
                    async for chunk in response.aiter_bytes():
                        for event in feed.take(chunk):
                            yield event
                        if feed.over:
                            return
                feed.closed()
            except (httpx.RequestError, RateLimited, Unavailable) as error:
                feed.lost(error)

    async def cancel(self) -> Self:
        """See `Job.cancel`."""
        self.update(await self._sender.run(self._sender.flows.canceling(self.id)))
        return self

    async def retry(self) -> AsyncJob:
        """See `Job.retry`."""
        flow = self._sender.flows.retrying(self.id)
        return AsyncJob(self._sender, await self._sender.run(flow))

    async def result(self, k: int = 0) -> Picture:
        """See `Job.result`."""
        return await self._sender.run(self._sender.flows.fetching(self, k))

    async def results(self) -> list[Picture]:
        """See `Job.results`."""
        first = await self.result()
        return [first, *[await self.result(k) for k in range(1, len(self.outputs))]]
