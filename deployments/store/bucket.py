"""The one protocol for files elsewhere: a `Reader` is read from, a `Bucket` is written to as well.

`FolderBucket` and `GcsBucket` are buckets, `WebReader` and `HubReader` are readers. `open_reader`
and `open_bucket` in `provider.py` make them from URLs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from deployments.errors import Missing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


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

    def put(self, path: str, content: Path | bytes) -> bool:
        """Write a file unless it exists, whole or not at all.

        Args:
            content: a local file, or the bytes themselves.

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
        """A URL that lets anyone GET the file until it expires, after seven days at most.

        Raises:
            Unsignable: a folder, or credentials without a key.
        """
        ...


def find(reader: Reader, path: str) -> RemoteFile | None:
    """A file, or None if it is not there; raises as `Reader`."""
    try:
        return reader.stat([path])[0]
    except Missing:
        return None


def missing(where: object) -> Missing:
    """The error of a file that is not there, or is not the one that was listed."""
    return Missing(
        "A file is not there, or was replaced since it was listed.",
        value=where,
        remedy="Put the file there, or correct `source` and `files` in the model registry.",
    )
