"""How a registry names where a model's files come from, and where they go."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from deployments.errors import ConfigError

UNRESOLVED = "unresolved"
"""Stands in registries and lock files for a revision, size or hash that is not known yet."""
MANIFEST = "manifest.json"
"""The store's own file in a model's folder."""
# The hub's own rules for names.
_PART = r"\w(?:[\w.-]*\w)?"
_NOT = r"(?!.*(?:--|\.\.|\.git@|/[^/]{97,}@))"
_URL = re.compile(rf"^hf://{_NOT}({_PART}/{_PART})@(\w+)$", re.ASCII)
_REVISION = re.compile(r"^[0-9a-f]{40}$")


def parse_hub(url: str) -> tuple[str, str]:
    """Repository and revision.

    Raises:
        ConfigError: the URL does not look like hf://org/repo@revision.
    """
    match = _URL.match(url)
    if not match:
        raise ConfigError(
            "A hub source is written hf://org/repo@revision.", value=url, remedy="Correct it."
        )
    return match[1], match[2]


def check_pinned(url: str) -> None:
    """Raises ConfigError unless the revision is a full commit id: a branch moves."""
    _, revision = parse_hub(url)
    if not _REVISION.match(revision):
        unresolved = revision == UNRESOLVED
        raise ConfigError(
            "A hub revision is not pinned.",
            value=url,
            remedy="Run `imagen models resolve` online."
            if unresolved
            else "Write the commit's 40 hex digits; branches and tags move.",
        )


def safe_path(path: str) -> str:
    """A relative POSIX path that stays inside its folder.

    Raises:
        ValueError: it is absolute, leaves the folder, or is not in its plain form.
    """
    plain = path.isprintable() and "\\" not in path
    if not plain or {"", ".", ".."} & set(path.split("/")):
        raise ValueError(f"{path!r} is not a plain relative path")
    if path.casefold() == MANIFEST:
        raise ValueError(f"{MANIFEST} is the store's own")
    return path


SafePath = Annotated[str, AfterValidator(safe_path)]
