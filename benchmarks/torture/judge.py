"""Sends the cases to a server, and compares what comes back with what should."""

from __future__ import annotations

import io
import secrets
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

import httpx
import numpy as np
from PIL import Image

from deployments.errors import Unreachable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benchmarks.torture.case import Case, Form
    from benchmarks.torture.scenes import Pixels

WITHIN_LEVELS = 12
"""What a model may change in the colour of a patch, of 255."""
_TIMEOUT_S = 120
_REFUSALS = range(400, 500)


@dataclass(frozen=True, slots=True)
class Target:
    """A server.

    Attributes:
        url: its address.
        paths: of its routes by task, where they are not ours.
        field: of the form, that holds the picture.
        key: an API key; empty for none.
    """

    url: str
    paths: Mapping[str, str]
    field: str = "image"
    key: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a case ended.

    Attributes:
        case: which one.
        fault: what is wrong with the answer; empty where it is right.
        is_told: whether the note came that the case asks for; None if it asks for none.
    """

    case: Case
    fault: str
    is_told: bool | None


def judge(target: Target, cases: Sequence[Case]) -> Iterator[Verdict]:
    """The verdicts, one by one.

    Raises:
        Unreachable: no server answers.
    """
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    with httpx.Client(timeout=_TIMEOUT_S, trust_env=False, headers=headers) as client:
        for case in cases:
            path = target.paths.get(case.task, case.task.route)
            boundary = secrets.token_hex(8)
            kind = f"multipart/form-data; boundary={boundary}"
            try:
                answer = client.post(
                    target.url.rstrip("/") + path,
                    content=_body(case, target.field, boundary),
                    # Some servers close behind an error, and the next case must not suffer for it.
                    headers={"Content-Type": kind, "Connection": "close"},
                )
            except httpx.ConnectError as error:
                raise Unreachable(
                    "No server listens there.", value=target.url, remedy="Start it first."
                ) from error
            except httpx.HTTPError as error:
                yield Verdict(case, f"no answer ({type(error).__name__})", None)
                continue
            yield _verdict(case, answer)


def _body(case: Case, field: str, boundary: str) -> bytes:
    names = {"image[]": f"{field}[]"}
    padding = " \t" if case.form == "padded" else ""
    picture = f'name="{names.get(case.form, field)}"; filename="picture"'
    parts = [(picture, case.file), *((f'name="{k}"', v.encode()) for k, v in case.fields.items())]
    body = b"".join(
        f"--{boundary}{padding}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode()
        + data
        + b"\r\n"
        for head, data in parts
    )
    return _before(case.form) + body + f"--{boundary}--{padding}\r\n".encode()


def _before(form: Form) -> bytes:
    return b"This is a multi-part message in MIME format.\r\n" if form == "preamble" else b""


def _verdict(case: Case, answer: httpx.Response) -> Verdict:
    if case.refused:
        fault = "" if answer.status_code in _REFUSALS else f"{answer.status_code}: not refused"
        return Verdict(case, fault, None)
    if answer.status_code != HTTPStatus.OK:
        return Verdict(case, f"{answer.status_code}: {answer.text[:120]}", None)
    codes = [one.partition(":")[0] for one in answer.headers.get_list("x-imagen-note")]
    is_told = any(code in codes for code in case.note.split("|")) if case.note else None
    kind = answer.headers.get("content-type", "")
    if case.media_type and kind != case.media_type:
        return Verdict(case, f"{kind} instead of {case.media_type}", is_told)
    try:
        with Image.open(io.BytesIO(answer.content)) as image:
            pixels = np.asarray(image.convert("RGBA"))
    except Exception:  # Pillow's readers raise many types on what a server made of it.
        return Verdict(case, "the answer is no picture", is_told)
    fault = fault_of(case, pixels[..., :3].astype(int), WITHIN_LEVELS)
    return Verdict(case, fault or judged(case, pixels), is_told)


def judged(case: Case, pixels: Pixels) -> str:
    """What a case's own judge finds wrong with a result of any size."""
    try:
        return case.judge(pixels) if case.judge else ""
    except (ValueError, IndexError) as error:  # as numpy raises them on another size
        return f"the result cannot be judged: {error}"


def fault_of(case: Case, pixels: np.ndarray, within: int) -> str:
    """What is wrong with the pixels, `H x W x 3` integers; empty where nothing is.

    Args:
        case: what they should be.
        pixels: of the result.
        within: levels by which a channel may differ.
    """
    height, width = pixels.shape[:2]
    for patch in case.patches:
        top, left = int(patch.y * height), int(patch.x * width)
        found = pixels[max(top - 1, 0) : top + 2, max(left - 1, 0) : left + 2].mean((0, 1))
        if abs(found - patch.colour).max() > within:
            return f"{tuple(found.round().astype(int).tolist())} instead of {patch.colour}"
    if case.is_grey and np.ptp(pixels, axis=2).any():
        return "a grey picture has colours"
    return ""
