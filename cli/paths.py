"""Paths that users type."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def user_path(path: Path) -> Path:
    """The path from where the user is, if it exists there.

    Else it stays relative, and `settings.resolve` takes it from the project's root.
    """
    return path.absolute() if path.exists() else path


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())
