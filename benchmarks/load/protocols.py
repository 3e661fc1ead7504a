"""Turns requests into HTTP calls, and HTTP answers into figures."""

from __future__ import annotations

import json
import math
import secrets
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.load.plan import Scalar, Target
    from benchmarks.load.workload import Request

_JSON_LENGTH = "Inference-Header-Content-Length"
_DETAIL_CHARACTERS = 300
_PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")


@dataclass(frozen=True, slots=True)
class Call:
    """A POST.

    Attributes:
        path: with its query.
        headers: beside those of every request.
        body: bytes.
    """

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """The content of an answer.

    Attributes:
        code: why there is no picture, such as `full` (a problem's code), `HTTP 500` or
            `no picture`; None if there is one.
        detail: of a refusal, shortened.
        batch_size, gpu_seconds: of the picture; None if the server does not report them.
        stages_s: seconds by stage, from Server-Timing.
    """

    code: str | None = None
    detail: str = ""
    batch_size: int | None = None
    gpu_seconds: float | None = None
    stages_s: dict[str, float] = field(default_factory=dict[str, float])


def path_of(target: Target, request: Request) -> str:
    """The path of a request."""
    if request.task is None:
        return str(request.path)
    own = f"/v2/models/{request.task}/infer"
    return target.paths.get(
        request.task, own if target.protocol == "kserve" else request.task.route
    )


def call(target: Target, request: Request, image: bytes) -> Call:
    """The request in the target's protocol."""
    path = path_of(target, request)
    if target.protocol == "kserve":
        return _kserve_call(path, request.parameters, image, target.shape)
    texts = {name: as_text(value) for name, value in request.parameters.items()}
    if target.protocol == "raw":
        joint = "&" if "?" in path else "?"
        full = f"{path}{joint}{urlencode(texts)}" if texts else path
        return Call(full, {"Content-Type": "image/jpeg"}, image)
    return _multipart_call(path, texts, image)


def as_text(value: Scalar) -> str:
    """A parameter as a form field: true and false as in JSON."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _multipart_call(path: str, texts: Mapping[str, str], image: bytes) -> Call:
    boundary = secrets.token_hex(16)
    heads = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'
        for name, text in texts.items()
    ]
    heads.append(
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="photo.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    )
    body = "".join(heads).encode() + image + f"\r\n--{boundary}--\r\n".encode()
    return Call(path, {"Content-Type": f"multipart/form-data; boundary={boundary}"}, body)


def _kserve_call(
    path: str, parameters: Mapping[str, Scalar], image: bytes, shape: tuple[int, ...]
) -> Call:
    tensors = {"IMAGE": _element(image), "PARAMETERS": _element(json.dumps(parameters).encode())}
    head = {
        "inputs": [
            {
                "name": name,
                "shape": shape,
                "datatype": "BYTES",
                "parameters": {"binary_data_size": len(data)},
            }
            for name, data in tensors.items()
        ],
        "outputs": [{"name": "IMAGE", "parameters": {"binary_data": True}}],
    }
    text = json.dumps(head).encode()
    headers = {"Content-Type": "application/octet-stream", _JSON_LENGTH: str(len(text))}
    return Call(path, headers, text + b"".join(tensors.values()))


def _element(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def read_answer(target: Target, status: int, headers: Mapping[str, str], body: bytes) -> Answer:
    """Read an answer."""
    if status != 200:
        return Answer(*_refusal(status, body))
    picture = _kserve_picture(headers, body) if target.protocol == "kserve" else body
    # A server that answers 200 with an error page must not look fast.
    if not picture.startswith(_PICTURES):
        return Answer("no picture", _text(body))
    batch_size = _number(headers.get("X-Imagen-Batch-Size"))
    return Answer(
        batch_size=None if batch_size is None else int(batch_size),
        gpu_seconds=_number(headers.get("X-Imagen-Gpu-Seconds")),
        stages_s=stages_s(headers.get("Server-Timing", "")),
    )


def _refusal(status: int, body: bytes) -> tuple[str, str]:
    try:
        found: Any = json.loads(body)
        detail = found.get("detail", found.get("error", ""))  # the latter in kserve
        return str(found["code"]), str(detail)[:_DETAIL_CHARACTERS]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"HTTP {status}", _text(body)


def _kserve_picture(headers: Mapping[str, str], body: bytes) -> bytes:
    """The first element of the output IMAGE; empty if the answer holds none."""
    try:
        start = int(headers[_JSON_LENGTH])
        for output in json.loads(body[:start])["outputs"]:
            size = int(output["parameters"]["binary_data_size"])
            if output["name"] == "IMAGE":
                (length,) = struct.unpack_from("<I", body, start)
                return body[start + 4 : start + 4 + min(length, size - 4)]
            start += size
    except (KeyError, TypeError, ValueError, struct.error):
        pass  # not an answer of this protocol, so there is no image
    return b""


def stages_s(header: str) -> dict[str, float]:
    """Seconds by stage, from a Server-Timing header."""
    found: dict[str, float] = {}
    for item in header.split(","):
        name, *parts = (part.strip() for part in item.split(";"))
        for part in parts:
            milliseconds = _number(part.partition("dur=")[2])
            if milliseconds is not None:
                found[name] = milliseconds / 1000
    return found


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "nan")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _text(body: bytes) -> str:
    return body[:_DETAIL_CHARACTERS].decode("utf-8", "replace")
