"""API keys: their file, and which key a token belongs to."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import yaml
from pydantic import Field, ValidationError

from deployments.settings import KeyLimits, Strict

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger("ray.serve.imagen")
_TOKEN = re.compile(r"imagen_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")
_SECRET_BYTES = 32
_STAT_S = 1.0
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Key(Strict):
    """An API key, as its file has it.

    Attributes:
        id: public; logs name the key by it.
        name: whose it is, for people.
        sha256: of the token. A plain hash is right: a token is 32 random bytes, so nobody finds it
            by guessing, however fast the hash is.
        created: when.
        revoked: since when it is refused; None while it is valid.
        limits: its own; fields that it does not set are those of `access.limits`.
    """

    id: Annotated[str, Field(pattern=r"^([0-9a-f]{8}|anonymous)$")]
    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: datetime
    revoked: datetime | None = None
    limits: KeyLimits = KeyLimits()

    def over(self, defaults: KeyLimits) -> Key:
        """This key with every limit filled in."""
        own = self.limits.model_dump(exclude_unset=True)
        return self.model_copy(update={"limits": defaults.model_copy(update=own)})


class Keys(Strict):
    """The content of a file of keys."""

    keys: tuple[Key, ...]


ANONYMOUS = Key(
    id="anonymous",
    name="anonymous",
    sha256="0" * 64,
    created=datetime(2026, 1, 1, tzinfo=UTC),
    limits=KeyLimits(
        requests_per_s=None,
        pictures=None,
        megapixels_per_minute=None,
        queue_share=1.0,
        wait_share=1.0,
    ),
)
"""Whoever calls without a key, where none is asked for. It has no limits."""


def make_key(name: str, limits: KeyLimits, taken: frozenset[str] = frozenset()) -> tuple[Key, str]:
    """A new key, and its token, which exists nowhere else.

    Args:
        name: whose it is.
        limits: its own.
        taken: ids of other keys.

    Raises:
        ValidationError: the name is empty, too long, or holds control characters.
    """
    key_id = secrets.token_hex(4)
    while key_id in taken:
        key_id = secrets.token_hex(4)
    token = f"imagen_{key_id}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    now = datetime.now(UTC).replace(microsecond=0)
    return Key(id=key_id, name=name, sha256=_hash(token), created=now, limits=limits), token


def parse_keys(data: bytes) -> tuple[Key, ...]:
    """The keys in the bytes of a file.

    Raises:
        ValueError: it is no such file.
    """
    try:
        values = yaml.load(data, _LOADER)  # noqa: S506 - a safe loader
    except Exception as error:  # a tag that does not fit its value raises anything
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        where = f": line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        # The parser's own words may quote what stands there.
        raise ValueError(f"it is not YAML{where}") from None
    try:
        keys = Keys.model_validate(values).keys
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) or "the file"
        raise ValueError(f"{place}: {error.errors()[0]['msg']}") from None
    if len({key.id for key in keys}) < len(keys):
        raise ValueError("an id comes twice")
    return keys


class _Stamp(NamedTuple):
    """What changes whenever a file is replaced or written to."""

    inode: int
    changed_ns: int
    size: int


class KeyFile:
    """The keys of a file, read again when it changes.

    A file that cannot be read, also one that disappears, leaves the keys as they were: a slip of an
    editor must not lock every client out.

    Args:
        path: of the file.
        defaults: limits of keys that state none.
        clock: seconds.
    """

    def __init__(
        self, path: Path, defaults: KeyLimits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._defaults = defaults
        self._clock = clock
        self._keys: dict[str, Key] = {}
        self._stamp: _Stamp | str | None = "not looked yet"
        self._look_s = clock()
        self._reload()

    def find(self, token: str) -> Key | None:
        """The valid key of a token; None if there is none.

        Takes the same time whatever the token's secret part is. Looks at the file at most once a
        second.
        """
        if self._clock() >= self._look_s:
            self._reload()
        match = _TOKEN.fullmatch(token)
        if match is None:
            return None
        key = self._keys.get(match[1], ANONYMOUS)  # whose hash is no token's
        known = hmac.compare_digest(key.sha256, _hash(token))
        return key if known and key.revoked is None else None

    def _reload(self) -> None:
        self._look_s = self._clock() + _STAT_S
        stamp = self._stamped()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            keys = parse_keys(self._path.read_bytes())
        except (OSError, ValueError) as error:
            kept = f"the {len(self._keys)} keys from before stay" if self._keys else "no key works"
            reason = error.strerror if isinstance(error, OSError) else error
            logger.error("The file of API keys cannot be read, and %s: %s", kept, reason)
            return
        self._keys = {key.id: key.over(self._defaults) for key in keys}
        valid = sum(key.revoked is None for key in keys)
        logger.info("API keys: %d valid, %d revoked", valid, len(keys) - valid)

    def _stamped(self) -> _Stamp | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return _Stamp(found.st_ino, found.st_mtime_ns, found.st_size)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
