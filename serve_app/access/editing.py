"""Changes to the file of API keys, by one process at a time."""

from __future__ import annotations

import fcntl
import os
import uuid
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import yaml
from pydantic import ValidationError

from deployments.errors import ConfigError
from serve_app.access.keys import Key, make_key, parse_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path

    from deployments.settings import KeyLimits

_HEADER = (
    "# API keys of Imagen, written by `imagen keys`. Tokens are not here, only their SHA-256.\n"
)


def create_key(path: Path, name: str, limits: KeyLimits) -> tuple[Key, str]:
    """Add a key to a file, which is made if there is none.

    Returns:
        The key, and its token, which is kept nowhere.

    Raises:
        ConfigError: the name is not usable, or the file cannot be read or written.
    """
    made: list[tuple[Key, str]] = []

    def add(keys: Sequence[Key]) -> Sequence[Key]:
        try:
            made.append(make_key(name, limits, frozenset(key.id for key in keys)))
        except ValidationError as error:
            raise ConfigError(
                "The name of the key is not usable.",
                value=repr(name),
                remedy="Give 1 to 100 printable characters.",
            ) from error
        return [*keys, made[0][0]]

    _update(path, add)
    return made[0]


def revoke_key(path: Path, key_id: str) -> Key:
    """Refuse a key from now on. Its entry stays, so that logs can be read. Twice is the same.

    Raises:
        ConfigError: the file has no such key, or cannot be read or written.
    """
    revoked: list[Key] = []

    def change(keys: Sequence[Key]) -> Sequence[Key]:
        [found] = [key for key in keys if key.id == key_id] or [None]
        if found is None:
            raise ConfigError(
                "The file has no key with this id.",
                value=key_id,
                remedy="`imagen keys list` shows the ids.",
            )
        now = datetime.now(UTC).replace(microsecond=0)
        revoked.append(found.model_copy(update={"revoked": found.revoked or now}))
        return [revoked[0] if key is found else key for key in keys]

    _update(path, change)
    return revoked[0]


def load_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file, oldest first; none if there is no file.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        return parse_keys(path.read_bytes())
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"The file of API keys cannot be read: {reason}.",
            value=path,
            remedy="Restore it from a backup.",
        ) from error


def _update(path: Path, change: Callable[[Sequence[Key]], Sequence[Key]]) -> None:
    """Change the file as it is now; other processes that change it wait meanwhile."""
    place = path.resolve()  # a link stays a link
    with _writing(path):
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a network file system may have no locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        keys = change(load_keys(place))
        with _writing(path):
            _replace(place, keys)
    finally:
        os.close(folder)


def _replace(place: Path, keys: Sequence[Key]) -> None:
    values = [key.model_dump(mode="json", exclude_unset=True) for key in keys]
    text = _HEADER + yaml.safe_dump({"keys": values}, sort_keys=False, allow_unicode=True)
    new = place.with_name(f".{place.name}.{uuid.uuid4().hex}.new")
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, place)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"The file of API keys cannot be written: {error.strerror}.",
            value=path,
            remedy="Name a file in a folder that this user may write to.",
        ) from error
