"""The one protocol for files elsewhere: a `Reader` is read from, a `Bucket` is written to as well.

`FolderBucket`, `GcsBucket` and `S3Bucket` are buckets, `WebReader` and `HubReader` are readers.
`open_reader` and `open_bucket` in `provider.py` make them from URLs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

from deployments.errors import ConfigError, Missing, SourceFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

ANY_BYTES = "application/octet-stream"
"""The media type of a file of which nothing is known."""
LONGEST_LINK_S = 7 * 86_400
"""Google and Amazon sign for no longer."""


class RemoteFile(NamedTuple):
    """A file at its source.

    Attributes:
        path: relative to the source, POSIX.
        size: bytes; -1 where the source does not state it.
        sha256: 64 hex digits, where the source publishes it.
        crc32c: 8 hex digits, where the source publishes it.
        pin: identifies this version of the file, so that a read fails if the file was replaced:
            the generation of an object; empty where the source has no such thing.
    """

    path: str
    size: int
    sha256: str | None = None
    crc32c: str | None = None
    pin: str = ""


class Transient(Exception):
    """A failure that may pass; `transfer.retrying` tries again.

    Args:
        reason: one line.
        after_s: how long the server asks to wait.
    """

    def __init__(self, reason: str, after_s: float = 0) -> None:
        super().__init__(reason)
        self.after_s = after_s


class Reader(Protocol):
    """Files below a URL. Methods may be called from several threads at a time.

    Raises:
        Transient: the call may succeed if it is repeated.
        Missing: a file is not there, or was replaced since it was listed.
        SourceFailed: access refused, or the source cannot be used at all.
    """

    url: str

    def stat(self, paths: Sequence[str]) -> list[RemoteFile]:
        """What is known of each file, in the order of `paths`."""
        ...

    def read(
        self, file: RemoteFile, start: int, stop: int, write: Callable[[bytes], object]
    ) -> None:
        """Pass the bytes from `start` up to `stop` to `write`, in order, in pieces."""
        ...


class Bucket(Reader, Protocol):
    """Files that can be written too. No method ever overwrites a file.

    Raises:
        Transient, SourceFailed: as `Reader`.
        StoreUnwritable: a folder cannot be written.
    """

    def put(self, path: str, content: Path | bytes, media_type: str = ANY_BYTES) -> bool:
        """Write a file unless it exists, whole or not at all.

        Args:
            content: a local file, or the bytes themselves.
            media_type: what a browser that opens a signed link takes the file for; a folder does
                not keep it.

        Returns:
            False if a file of that name was already there; it is left as it was.
        """
        ...

    def list(self, prefix: str = "") -> Iterator[RemoteFile]:
        """Every file whose path starts with `prefix`, sorted by path."""
        ...

    def delete(self, path: str) -> None:
        """Delete a file; does nothing if there is none."""
        ...

    def sign(self, path: str, expires_s: float) -> str:
        """A URL that lets anyone GET the file until it expires.

        Args:
            expires_s: above 0, at most seven days; a part of a second counts as a whole one.

        Raises:
            ConfigError: `expires_s` is out of range.
            Unsignable: a folder, or credentials that can neither sign nor let a service sign.
        """
        ...


def find(reader: Reader, path: str) -> RemoteFile | None:
    """A file, or None if it is not there; raises as `Reader`."""
    try:
        return reader.stat([path])[0]
    except Missing:
        return None


def read_whole(reader: Reader, path: str) -> bytes:
    """All bytes of a file; raises as `Reader`."""
    file = reader.stat([path])[0]
    content = bytearray()
    reader.read(file, 0, file.size, content.extend)
    return bytes(content)


def check_path(path: str) -> str:
    """A path that stays below its bucket's URL.

    Raises:
        ConfigError: it is absolute, leaves the folder, or has empty parts.
    """
    if {"", ".", ".."} & set(path.split("/")):
        raise ConfigError("A file's path is wrong.", value=path, remedy="Use a relative path.")
    return path


def link_life_s(expires_s: float) -> int:
    """How long a signed link works, in whole seconds.

    Raises:
        ConfigError: not above 0, or longer than seven days.
    """
    if not 0 < expires_s <= LONGEST_LINK_S:
        raise ConfigError(
            "A signed link cannot work for so long.",
            value=f"{expires_s} s",
            remedy="Give a time above 0 and of at most seven days.",
        )
    return math.ceil(expires_s)


def no_bucket(url: str) -> SourceFailed:
    """The error of a bucket that does not exist."""
    return SourceFailed(
        "There is no such bucket.", value=url, remedy="Correct its name, or create it."
    )


def missing(where: object) -> Missing:
    """The error of a file that is not there, or is not the one that was listed."""
    return Missing(
        "A file is not there, or was replaced since it was listed.",
        value=where,
        remedy="Put the file there, or correct `source` and `files` in the model registry.",
    )
