"""The doors of the application: which protocol a request speaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from starlette.datastructures import Headers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import Scope

Door = Literal["native", "json", "openai", "kserve"]
"""The protocol in metrics. `json` is the native one with a JSON body; whatever belongs to no other
door, such as a probe, is `native`."""
OPENAI_ROOT = "/v1/"
KSERVE_ROOT = "/v2"
KSERVE_HEALTH = (f"{KSERVE_ROOT}/health/live", f"{KSERVE_ROOT}/health/ready")
"""Paths of its probes."""
JSON = "application/json"


def below_root(scope: Scope) -> str:
    """The path without the prefix that the application is deployed under."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def door_of(scope: Scope) -> Door:
    """The protocol of a request, known before its body is read."""
    named = door_at(below_root(scope))
    return "json" if named == "native" and is_json(Headers(scope=scope)) else named


def door_at(path: str) -> Door:
    """The protocol of a path below the root."""
    if path.startswith(OPENAI_ROOT):
        return "openai"
    return "kserve" if f"{path}/".startswith(f"{KSERVE_ROOT}/") else "native"


def is_json(headers: Mapping[str, str]) -> bool:
    """Whether a body says that it is JSON."""
    return headers.get("content-type", "").partition(";")[0].strip().lower() == JSON
