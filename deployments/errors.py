"""Every error Imagen raises on purpose.

    ImagenError
      + RequestError           the client can correct it
        x MalformedRequest     400  the request cannot be read
        x DamagedImage         400  an image that breaks while it is decoded
        x Unauthorized         401  no API key, or one that is unknown or revoked
        x LinkRefused          403  a signed link that expired or was altered
        x NotFound             404
        x NoSuchJob            404  unknown, expired, or the job of another key
        x MethodNotAllowed     405
        x NotAcceptable        406  no output format fits the Accept header
        x SlowUpload           408  the body did not arrive in time
        x JobConflict          409  the job's state does not allow it
        x IdempotencyConflict  409  an Idempotency-Key with another body
        x TooLarge             413  bytes or pixels
        x UnsupportedMedia     415  not an image, or not multipart
        x InvalidParameter     422  out of range, unknown, or contradictory
        x TooMuchWork          422  more than an idle replica finishes in time
      + ServiceError           the client may try again
        x Full                 429  queues are full, or too long for the deadline
        x RateLimited          429  a limit of the caller's API key
        x ModelFailed          503  the model gave no picture for this request
        x NotReady             503  starting, failed to start, or lost
        x JobsUnavailable      503  Redis or the storage of jobs does not answer
        x TooLate              504  not finished by the deadline
      + SetupError             stops a replica or a command; clients never see it
        x ConfigError          exit code 2, of a command
        x AttentionUnavailable 2
        x ModelNotCached       3
        x Unreachable          3  no server where `imagen bench` was sent
        x ModelCorrupt         4
        x StoreUnwritable      5  disk full, read-only, not permitted
        x LockTimeout          6
        x SourceFailed         7  a hub, a bucket, a server, a folder to pull from
        x Missing              7  a file that is not at its source
        x Unsignable           2  a bucket that cannot sign URLs
        x LicenceRefused       8
        x GpuTooSmall          9  models, or a share, that do not fit a GPU's memory

An error carries three things: the fact (`message`), the `value` that was found, and the `remedy`.
All three reach the client unchanged, so none may name a path of the server or quote another
exception.
"""

from __future__ import annotations

from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

if TYPE_CHECKING:
    from collections.abc import Generator


_SHOWN = 200
"""Characters of a value that an error shows."""


def plain(value: object, most: int = _SHOWN) -> str:
    r"""A value as text that any terminal, log and protocol can show.

    Bytes are read as UTF-8. What is none, control characters and lone surrogates are escaped, such
    as `\xff` and `\n`.

    Args:
        value: bytes, or anything that `str` can show.
        most: characters of the text; the rest is cut.
    """
    if isinstance(value, bytes | bytearray):
        # No character has more than four bytes, and one may be cut in two.
        value = value[: 4 * most].decode("utf-8", "backslashreplace")
    return _escaped(str(value)[:most])[:most]


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


class Problem(TypedDict):
    """One invalid parameter among several."""

    parameter: str
    fact: str
    value: str
    remedy: str


class ImagenError(Exception):
    """Base of the tree.

    It has one positional argument and keyword-only extras with defaults, because pickle rebuilds an
    exception as `cls(*args)` and then sets its `__dict__`.

    Args:
        message: what is wrong, one sentence.
        value: what was found, as `plain` text. Errors that clients see have one.
        remedy: what to do about it, one sentence.
        retry_after_s: when a new try makes sense.
        problems: the findings, if there are several.
    """

    status: ClassVar[HTTPStatus] = HTTPStatus.SERVICE_UNAVAILABLE
    code: ClassVar[str] = "error"

    def __init__(
        self,
        message: str,
        *,
        value: object = "",
        remedy: str = "",
        retry_after_s: float | None = None,
        problems: tuple[Problem, ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = _escaped(message)
        self.value = plain(value)
        self.remedy = remedy
        self.retry_after_s = retry_after_s
        self.problems = problems

    def __str__(self) -> str:
        fact = self.message.rstrip(".")
        got = f" (got {self.value})" if self.value else ""
        return f"{fact}{got}. {self.remedy}".strip()

    def details(self, request_id: str) -> dict[str, Any]:
        """The error as problem details (RFC 9457), ready for JSON."""
        found = {"errors": [dict(one) for one in self.problems]} if self.problems else {}
        return {
            "type": f"urn:imagen:problem:{self.code}",
            "title": self.status.phrase,
            "status": int(self.status),
            "code": self.code,
            "detail": str(self),
            "fact": self.message,
            "value": self.value or "nothing",
            "remedy": self.remedy,
            "request_id": request_id,
            **found,
        }


class RequestError(ImagenError):
    """The request is wrong. Sent again unchanged, it fails again."""

    status = HTTPStatus.BAD_REQUEST
    code = "bad_request"


class MalformedRequest(RequestError):
    """The body or a header cannot be read."""

    code = "malformed_request"


class DamagedImage(RequestError):
    """The image cannot be decoded to its end."""

    code = "damaged_image"


class Unauthorized(RequestError):
    """The request has no API key, or one that is unknown or revoked."""

    status = HTTPStatus.UNAUTHORIZED
    code = "unauthorized"


class LinkRefused(RequestError):
    """A signed link has expired or was altered."""

    status = HTTPStatus.FORBIDDEN
    code = "link_refused"


class NotFound(RequestError):
    """No such route."""

    status = HTTPStatus.NOT_FOUND
    code = "not_found"


class NoSuchJob(RequestError):
    """No job of this API key has that id."""

    status = HTTPStatus.NOT_FOUND
    code = "no_such_job"


class MethodNotAllowed(RequestError):
    """The route exists, with another method."""

    status = HTTPStatus.METHOD_NOT_ALLOWED
    code = "method_not_allowed"


class NotAcceptable(RequestError):
    """No format that we write fits the Accept header."""

    status = HTTPStatus.NOT_ACCEPTABLE
    code = "not_acceptable"


class SlowUpload(RequestError):
    """The body did not arrive in time."""

    status = HTTPStatus.REQUEST_TIMEOUT
    code = "slow_upload"


class JobConflict(RequestError):
    """The job has ended, or has not ended yet."""

    status = HTTPStatus.CONFLICT
    code = "job_conflict"


class IdempotencyConflict(RequestError):
    """An Idempotency-Key that came before with another body."""

    status = HTTPStatus.CONFLICT
    code = "idempotency_conflict"


class TooLarge(RequestError):
    """Too many bytes, or too many pixels in or out."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "too_large"


class UnsupportedMedia(RequestError):
    """Not an image format we read, or a body that is not multipart."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    code = "unsupported_media"


class InvalidParameter(RequestError):
    """A parameter is unknown, out of range, or contradicts another."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "invalid_parameter"


class TooMuchWork(RequestError):
    """Not even an idle replica could finish the request before its deadline."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "too_much_work"


class ServiceError(ImagenError):
    """The service failed or is busy. The same request may succeed later."""

    code = "unavailable"

    def __str__(self) -> str:
        # The value does not come from the client, and the message already says what it means.
        return f"{self.message} {self.remedy}".strip()


class Full(ServiceError):
    """Every queue slot is taken, or the queue is too long for the request's deadline."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "full"


class RateLimited(ServiceError):
    """The caller's API key has reached one of its limits."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "rate_limited"


class ModelFailed(ServiceError):
    """The model made no usable picture for this one request."""

    code = "model_failed"


class NotReady(ServiceError):
    """The model is starting, failed to start, or was lost."""

    code = "not_ready"


class JobsUnavailable(ServiceError):
    """Redis or the storage of jobs does not answer; requests without a job go on."""

    code = "jobs_unavailable"


class TooLate(ServiceError):
    """The deadline passed before the picture was finished."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    code = "too_late"


class SetupError(ImagenError):
    """Something that an operator must correct before serving."""

    code = "setup"
    exit_code: ClassVar[int] = 2


class ConfigError(SetupError):
    """A configuration file is wrong."""

    code = "config"


class AttentionUnavailable(SetupError):
    """The configured attention implementation cannot run here."""

    code = "attention_unavailable"


class ModelNotCached(SetupError):
    """A model's folder or one of its files is not on this node."""

    code = "model_not_cached"
    exit_code = 3


class ModelCorrupt(SetupError):
    """A model's files are there and wrong."""

    code = "model_corrupt"
    exit_code = 4


class StoreUnwritable(SetupError):
    """The model store's disk is full, read-only, or not writable for this user."""

    code = "store_unwritable"
    exit_code = 5


class LockTimeout(SetupError):
    """Another process holds a model's lock and makes no progress."""

    code = "lock_timeout"
    exit_code = 6


class SourceFailed(SetupError):
    """The source of a model refused, failed, or sent something else."""

    code = "source_failed"
    exit_code = 7


class Missing(SourceFailed):
    """A file is not at its source, or was replaced since it was listed."""

    code = "missing"


class Unsignable(SetupError):
    """The bucket has no way to sign URLs."""

    code = "unsignable"


class Unreachable(SetupError):
    """No server answers at the address that the load should go to."""

    code = "unreachable"
    exit_code = 3


class LicenceRefused(SetupError):
    """A model is non-commercial, and the registry does not accept it by name."""

    code = "licence_refused"
    exit_code = 8


class GpuTooSmall(SetupError):
    """Models or a share do not fit a GPU's memory."""

    code = "gpu_too_small"
    exit_code = 9


@contextmanager
def about(file: str) -> Generator[None]:
    """Name the file that an error is about, where a request has several: `Of the mask: ...`."""
    try:
        yield
    except RequestError as error:
        error.message = f"Of the {file}: {error.message}"
        error.args = (error.message,)
        raise


def too_late() -> TooLate:
    """The error of a request whose deadline has passed."""
    return TooLate(
        "The picture was not finished by its deadline.",
        value="not finished",
        remedy="Try again, with a smaller picture or fewer steps if it happens again.",
    )
