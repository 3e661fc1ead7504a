"""Signed links to files of a folder, which has no service that could sign or check them."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import secrets
import time
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING

from deployments.errors import ConfigError, LinkRefused, StoreUnwritable
from deployments.store.bucket import link_life_s
from deployments.store.folder_bucket import LINK_KEY, PART

if TYPE_CHECKING:
    from pathlib import Path

KEY_BYTES = 32


class FolderLinks:
    """Makes and checks links: HMAC-SHA256 over the path and the time at which the link expires.

    Args:
        key: the folder's, of `KEY_BYTES`.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def sign(self, path: str, expires_s: float) -> str:
        """A link below the application's root.

        Args:
            path: of the file in its folder; letters, digits and `/.-` only.
            expires_s: how long it works: above 0, at most seven days.

        Raises:
            ConfigError: `expires_s` is out of range.
        """
        expires = str(math.ceil(time.time() + link_life_s(expires_s)))
        return f"/files/{path}?expires={expires}&signature={self._signature(path, expires)}"

    def check(self, path: str, expires: str, signature: str) -> None:
        """Raises LinkRefused unless this key signed the path and the expiry, and it still works.

        Args:
            path: what follows `/files/`.
            expires, signature: as in the link.
        """
        expected = self._signature(path, expires)
        if not hmac.compare_digest(expected.encode(), signature.encode(errors="replace")):
            raise LinkRefused(
                "The link was altered.", value=path, remedy="Ask for the job's result again."
            )
        # Digits, because we signed them.
        if time.time() >= int(expires):
            raise LinkRefused(
                "The link has expired.", value=expires, remedy="Ask for the job's result again."
            )

    def _signature(self, path: str, expires: str) -> str:
        text = f"{path}\n{expires}".encode(errors="replace")
        return hmac.new(self._key, text, hashlib.sha256).hexdigest()


def folder_key(folder: Path) -> bytes:
    """The key of a folder's links; made once, together with the folder, readable by this user only.

    Raises:
        StoreUnwritable: the folder cannot be written.
        ConfigError: the file of the key holds something else.
    """
    place = folder / LINK_KEY
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not place.exists():
            _make_key(folder / f"{PART}{uuid.uuid4().hex}", place)
        key = place.read_bytes()
    except OSError as error:
        raise StoreUnwritable(
            f"The folder of jobs cannot be written: {error.strerror}.",
            value=error.filename or folder,
            remedy="Give this user write access and disk space, or set jobs.folder.",
        ) from error
    if len(key) != KEY_BYTES:
        raise ConfigError(
            "The key of the links is damaged.",
            value=place,
            remedy="Delete the file and start again; links that were given out stop working.",
        )
    return key


def _make_key(part: Path, place: Path) -> None:
    """Write the key whole beside its place, then link it: of several processes, one wins."""
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(descriptor)
        with suppress(FileExistsError):
            os.link(part, place)
    finally:
        part.unlink(missing_ok=True)
