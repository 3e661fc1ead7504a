"""Whether an answer is one that the OpenAPI document promises."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from serve_app.problem import MEDIA_TYPE, Problem

if TYPE_CHECKING:
    from tests.fuzz.attacks import Attack

_NO_HTTP = b"Invalid HTTP request received."
_GENERIC = {
    400: {"malformed_request"},  # a host or an address that cannot be read
    401: {"unauthorized"},
    404: {"not_found"},
    405: {"method_not_allowed"},
    408: {"slow_upload"},  # a body that no route asked for
    413: {"too_large"},
    429: {"full", "rate_limited"},
}
"""What any address may answer, documented or not: the route was never reached."""


def _pattern(path: str) -> re.Pattern[str]:
    anything = ".*" if path.startswith("/files") else "[^/]+"
    return re.compile(re.sub(r"\{\w+\}", anything, path))


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        status: 0 if nothing came.
        seconds: that it took.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float


class Documented:
    """The statuses that a document promises.

    Args:
        document: OpenAPI.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self._operations = document["paths"]
        self._paths = [(_pattern(path), path) for path in self._operations]

    def route(self, target: bytes) -> str:
        """The path of the document that a request's target belongs to; empty if none."""
        path = unquote(re.split(rb"[?#]", target, maxsplit=1)[0], errors="replace")
        return next((name for pattern, name in self._paths if pattern.fullmatch(path)), "")

    def breach(self, attack: Attack, answer: Answer) -> str:
        """What is wrong with an answer; empty if nothing is."""
        if answer.status >= 500:
            return str(answer.status)
        if _is_of_the_server(attack, answer):
            return ""
        if "x-request-id" not in answer.headers:
            return f"{answer.status} without a request id"
        if answer.status < 400 or attack.method == b"HEAD":
            return self._undocumented(attack, answer, "")
        return _malformed(answer) or self._undocumented(
            attack, answer, json.loads(answer.body)["code"]
        )

    def _undocumented(self, attack: Attack, answer: Answer, code: str) -> str:
        name = self.route(attack.target)
        operation = self._operations.get(name, {}).get(attack.method.decode("latin-1").lower())
        known = operation["responses"] if operation else ()
        # Pages and their files are not in the document.
        generic = code in _GENERIC.get(answer.status, ()) or (not name and answer.status < 400)
        if str(answer.status) in known or generic or attack.method == b"HEAD":
            return ""
        return f"{answer.status} {code} is not documented"


def _is_of_the_server(attack: Attack, answer: Answer) -> bool:
    """Whether uvicorn refused by itself what is no HTTP, or a websocket."""
    websocket = any(line == (b"Upgrade", b"websocket") for line in attack.headers)
    if answer.status == 403:
        return websocket and not answer.body
    return answer.status == 400 and (answer.body == _NO_HTTP or attack.method == b"HEAD")


def _malformed(answer: Answer) -> str:
    """What a problem lacks; empty if it is whole."""
    if answer.headers.get("content-type") != MEDIA_TYPE:
        return f"{answer.status} is no problem+json"
    problem = json.loads(answer.body)
    texts = Problem.model_fields.keys() - {"errors"}
    if missing := sorted(name for name in texts if not problem.get(name)):
        return f"{answer.status} {problem.get('code')} has no {missing}"
    if problem["status"] != answer.status:
        return f"{answer.status} says {problem['status']}"
    if problem["request_id"] != answer.headers["x-request-id"]:
        return f"{answer.status} has another request id"
    if answer.status == 429 and "retry-after" not in answer.headers:
        return "429 without Retry-After"
    return ""
