"""For Schemathesis: most pictures are pictures, and most uploads become jobs; some are waited for.

Cases that break the document on purpose stay as they are.
"""

from __future__ import annotations

import base64
from typing import Any

import schemathesis

from tests.jobs.application import picture

_PICTURE = picture(0)


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: Any, kwargs: dict[str, Any]) -> None:
    meant_well = case.meta is not None and case.meta.generation.mode.is_positive
    if not meant_well or not isinstance(case.body, dict) or "image" not in case.body:
        return
    kind = hash(case.id) % 5
    if kind:
        in_json = case.media_type == "application/json"
        case.body["image"] = base64.b64encode(_PICTURE).decode() if in_json else _PICTURE
    if kind > 1:
        case.headers["Prefer"] = "wait=5" if kind == 2 else "respond-async"
