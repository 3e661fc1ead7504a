"""Bytes in, bytes out: upload to form, result to response, error to problem+json."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.responses import Response

from deployments.errors import (
    ImagenError,
    InvalidParameter,
    MalformedRequest,
    NotAcceptable,
    SlowUpload,
    UnsupportedMedia,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from starlette.requests import Request
    from starlette.types import Scope

    from deployments.contract import ImageResult, OutputFormat

MAX_PARTS = 40
MAX_FIELD_BYTES = 64 * 1024
_IMAGE_FIELD = "image"
_FORM_REMEDY = "Send multipart/form-data, as curl -F image=@photo.jpg does."
_FORMATS: tuple[OutputFormat, ...] = ("png", "webp", "jpeg")


@dataclass(slots=True)
class Form:
    """A parsed upload.

    Attributes:
        image: the file's bytes.
        fields: every other part, as text.
    """

    image: bytes = b""
    fields: dict[str, str] = field(default_factory=dict[str, str])


async def read_form(request: Request) -> Form:
    """Read a multipart body while it streams in.

    Raises:
        UnsupportedMedia: the body is not multipart/form-data.
        MalformedRequest: the multipart is broken, ends early, or has no image part.
        InvalidParameter: a field comes twice or is no UTF-8 text.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise UnsupportedMedia(
            "The body must be multipart/form-data.",
            value=kind.decode("latin-1") or "no content-type",
            remedy=_FORM_REMEDY,
        )
    if not options.get(b"boundary"):
        raise MalformedRequest(
            "The content-type names no boundary.",
            value=request.headers["content-type"],
            remedy=_FORM_REMEDY,
        )
    reader = _FormReader()
    try:
        parser = MultipartParser(options[b"boundary"], reader.callbacks())
        async for chunk in request.stream():
            reader.seen_bytes += len(chunk)
            parser.write(chunk)
        parser.finalize()
    except FormParserError as error:
        raise MalformedRequest(
            "The multipart body cannot be read.",
            value=f"{reader.seen_bytes} bytes so far",
            remedy=_FORM_REMEDY,
        ) from error
    return reader.form()


class _FormReader:
    """Collects the parser's callbacks into a Form."""

    def __init__(self) -> None:
        self.seen_bytes = 0
        self._header, self._value = bytearray(), bytearray()
        self._headers: dict[str, str] = {}
        self._data = bytearray()
        self._parts: list[tuple[str, bytes]] = []
        self._ended = False

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def form(self) -> Form:
        if not self._ended:
            raise MalformedRequest(
                "The multipart body ends before its closing boundary.",
                value=f"{self.seen_bytes} bytes",
                remedy=_FORM_REMEDY,
            )
        names = [name for name, _ in self._parts]
        if _IMAGE_FIELD not in names:
            raise MalformedRequest(
                "The form has no field named image.",
                value=", ".join(sorted(names)) or "no field",
                remedy="Add the picture as a file: -F image=@photo.jpg.",
            )
        form = Form()
        for name, data in self._parts:
            if names.count(name) > 1:
                raise InvalidParameter(
                    f"The field {name[:100]} comes more than once.",
                    value=f"{names.count(name)} times",
                    remedy="Send it once.",
                )
            if name == _IMAGE_FIELD:
                form.image = data
            else:
                form.fields[name] = _text(name, data)
        return form

    def _on_part_begin(self) -> None:
        if len(self._parts) == MAX_PARTS:
            raise MalformedRequest(
                f"The form has more than {MAX_PARTS} parts.",
                value=f"at least {MAX_PARTS + 1}",
                remedy="Send each parameter once.",
            )
        self._headers, self._data = {}, bytearray()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header.extend(data[start:end])

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value.extend(data[start:end])

    def _on_header_end(self) -> None:
        self._headers[self._header.decode("latin-1").lower()] = self._value.decode("latin-1")
        self._header, self._value = bytearray(), bytearray()

    def _on_headers_finished(self) -> None:
        disposition = self._headers.get("content-disposition", "")
        _, options = parse_options_header(disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if not self._name:
            raise MalformedRequest(
                "A part of the form has no name.",
                value=disposition or "no content-disposition",
                remedy=_FORM_REMEDY,
            )

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._data.extend(data[start:end])
        if self._name != _IMAGE_FIELD and len(self._data) > MAX_FIELD_BYTES:
            raise InvalidParameter(
                f"The field {self._name[:100]} is longer than {MAX_FIELD_BYTES} bytes.",
                value=f"at least {len(self._data)} bytes",
                remedy="Shorten it. The picture itself goes into the field image.",
            )

    def _on_part_end(self) -> None:
        self._parts.append((self._name, bytes(self._data)))

    def _on_end(self) -> None:
        self._ended = True


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidParameter(
            f"The field {name[:100]} is not UTF-8 text.",
            value=data[:40].decode("utf-8", "backslashreplace"),
            remedy="Encode it as UTF-8; lone surrogates cannot be encoded.",
        ) from error


def choose_format(wanted: OutputFormat | None, accept: str, *, transparent: bool) -> OutputFormat:
    """The output format: as the request says, else by the Accept header (RFC 9110), else PNG.

    Args:
        wanted: the `output_format` parameter.
        accept: the header, empty if there is none.
        transparent: the result has an alpha channel, which JPEG lacks.

    Raises:
        NotAcceptable: the header excludes everything we can write.
    """
    if wanted is not None:
        return wanted
    offered: list[OutputFormat] = [f for f in _FORMATS if not (transparent and f == "jpeg")]
    ranked = sorted(offered, key=lambda f: -_quality(accept, f))
    if _quality(accept, ranked[0]) == 0:
        raise NotAcceptable(
            "No output format fits the Accept header.",
            value=accept,
            remedy="Accept one of " + ", ".join(f"image/{f}" for f in offered) + ".",
        )
    return ranked[0]


def _quality(accept: str, name: str) -> float:
    if not accept.strip():
        return 1.0
    best, specificity = 0.0, -1
    for item in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in item.split(";"))
        match = {f"image/{name}": 2, "image/*": 1, "*/*": 0}.get(kind, -1)
        if match > specificity:
            best, specificity = _q(parameters), match
    return best


def _q(parameters: list[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                value = float(parameter[2:])
            except ValueError:
                return 0.0
            return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0
    return 1.0


def image_response(result: ImageResult) -> Response:
    """The picture, and headers that say what happened."""
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


def problem(error: ImagenError, request_id: str) -> dict[str, Any]:
    """An error as RFC 9457 problem details: fact, value, remedy, request id."""
    body: dict[str, Any] = {
        "type": f"urn:imagen:problem:{error.code}",
        "title": error.status.phrase,
        "status": int(error.status),
        "code": error.code,
        "detail": str(error),
        "fact": error.message,
        "value": error.value,
        "remedy": error.remedy,
        "request_id": request_id,
    }
    if error.problems:
        body["errors"] = list(error.problems)
    return body


def error_response(
    error: ImagenError, scope: Scope, headers: Mapping[str, str] | None = None
) -> Response:
    """An error as a response; 429 and 503 say when to try again, 408 closes the connection.

    Args:
        scope: of the request; its state has the request id, and gets the error's code.
    """
    scope["state"]["reason"] = error.code
    request_id = scope["state"]["request_id"]
    own = dict(headers or {})
    if isinstance(error, SlowUpload):
        own["Connection"] = "close"  # else the server in front would wait for the rest
    if error.retry_after_s is not None:
        own["Retry-After"] = str(math.ceil(error.retry_after_s))
    body = json.dumps(problem(error, request_id)).encode()
    return Response(body, error.status, own, media_type="application/problem+json")
