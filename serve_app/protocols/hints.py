"""What a page that builds its form from the reference learns of a field beside type and range."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from deployments.contract import PICTURE, ImageRequest
from serve_app.jobs.options import JobOptions
from serve_app.protocols.multipart import MAY_BE_FILES

if TYPE_CHECKING:
    from collections.abc import Mapping

NEEDS: dict[str, dict[str, str | bool]] = {
    "background": {"output": "rgba"},
    "color": {"output": "color"},
    "mask_changes": {"mask": PICTURE},
    "mask_feather_px": {"mask": True},
}
"""Fields that mean nothing, or contradict, without a value of others (True: any)."""
UNSENT = frozenset({"color"})
"""Those of them whose default a form must not send: a colour that is not used gets a note."""
_ROLES = {"seed": "seed", "n": "count", "preview": "preview"}
"""Fields that a page treats in a way of their own."""


def hints(name: str, field: Mapping[str, Any]) -> dict[str, Any]:
    """The extension `x-imagen` of a field.

    Its `group` says whom the field concerns: `task`, `file` (the result's file; every task has
    these) or `job`. Optional are `role`, `choices` (what each value of an enumeration means, or the
    default of a number that stands for something else), `needs` (values of other fields without
    which it means nothing, and its `default` does not count; `true` is any value) and `file` (the
    word that a result's metadata have in place of a file, and `needs` for one).

    Args:
        name: of the field.
        field: its schema.
    """
    said: dict[str, Any] = {"group": _group(name)}
    if role := _ROLES.get(name):
        said["role"] = role
    if needs := NEEDS.get(name):
        said |= {"needs": needs, "default": field.get("default")}
    if name in MAY_BE_FILES:
        said["file"] = PICTURE
    if choices := _choices(field):
        said["choices"] = choices
    return {"x-imagen": said}


def _group(name: str) -> str:
    if name in JobOptions.model_fields:
        return "job"
    return "file" if name in ImageRequest.model_fields else "task"


def _choices(field: Mapping[str, Any]) -> dict[str, str]:
    """Each value's words in the description, which has them as `value: words.`"""
    options = [field, *field.get("anyOf", ())]
    text = field.get("description", "")
    values = [str(value) for option in options for value in option.get("enum", ())]
    if field.get("type") in ("integer", "number"):
        values = [str(field.get("default"))]
    said = {value: re.search(rf"\b{re.escape(value)}: (.+?)\.(?: |$)", text) for value in values}
    return {value: found[1] for value, found in said.items() if found}
