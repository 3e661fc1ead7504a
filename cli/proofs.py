"""What `imagen storage check` proves of a storage, with the real credentials."""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs, urlsplit

from deployments.errors import LinkRefused, SetupError, SourceFailed
from deployments.store import web
from deployments.store.bucket import find, read_whole
from deployments.store.folder_bucket import FolderBucket, local_folder
from deployments.store.transfer import retrying
from serve_app.jobs.links import FolderLinks, folder_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deployments.settings import StoreSettings
    from deployments.store.bucket import Bucket

_CONTENT = b"written by `imagen storage check`"
_LINK_S = 60
_SHORT_LINK_S = 2
_EXPIRY_LIMIT_S = 60
"""Clocks may differ a little."""


class _Proof(NamedTuple):
    says: str
    holds: Callable[[], bool]
    remedy: str


class _Links(NamedTuple):
    """How links are signed, and what they open: None if they are refused."""

    sign: Callable[[str, float], str]
    opens: Callable[[str], bytes | None]


def prove(bucket: Bucket, settings: StoreSettings) -> Iterator[str]:
    """What holds of a storage, one after the other; a file of its own is deleted in the end.

    Raises:
        SourceFailed: something does not hold, or the bucket failed or refused.
        Unsignable: the credentials cannot sign.
        StoreUnwritable: a folder cannot be written.
    """
    path = f"outputs/{uuid.uuid4().hex}/result-0.png"
    try:
        for proof in _proofs(bucket, path):
            if not retrying(proof.holds, settings):
                raise SourceFailed(
                    f"This does not hold: {proof.says}.", value=bucket.url, remedy=proof.remedy
                )
            yield proof.says
    finally:
        with suppress(SetupError):  # the first error says more
            retrying(lambda: bucket.delete(path), settings)


def _proofs(bucket: Bucket, path: str) -> list[_Proof]:
    return [
        *_proofs_of_files(bucket, path),
        *_proofs_of_links(bucket, path),
        _deletes(bucket, path),
    ]


def _proofs_of_files(bucket: Bucket, path: str) -> list[_Proof]:
    return [
        _Proof(
            "a file can be written",
            lambda: bucket.put(path, _CONTENT, "image/png"),
            "Run the command again: the first try may have been cut off.",
        ),
        _Proof(
            "a second write does not replace it",
            lambda: not bucket.put(path, b"other"),
            "Use a service that honours If-None-Match, such as a newer release of this one.",
        ),
        _Proof(
            "it reads back as it was written",
            lambda: read_whole(bucket, path) == _CONTENT,
            "Something else writes to this bucket, or changes files: give jobs one of their own.",
        ),
    ]


def _proofs_of_links(bucket: Bucket, path: str) -> list[_Proof]:
    is_folder = isinstance(bucket, FolderBucket)
    sign, opens = _folder_links(bucket) if is_folder else _bucket_links(bucket)
    return [
        _Proof(
            "a signed link opens it without credentials",
            lambda: opens(sign(path, _LINK_S)) == _CONTENT,
            "Let clients reach the bucket's address, and its policy allow signed links.",
        ),
        _Proof(
            "an altered link is refused",
            lambda: opens(_altered(sign(path, _LINK_S))) is None,
            "Close the bucket to the public. An emulator that checks no signature is for tests.",
        ),
        _Proof(
            "a link is refused once it has expired",
            lambda: _expires(sign(path, _SHORT_LINK_S), opens),
            "Set the clocks of this machine and of the storage; close the bucket to the public.",
        ),
    ]


def _deletes(bucket: Bucket, path: str) -> _Proof:
    def deleted() -> bool:
        bucket.delete(path)
        return find(bucket, path) is None

    return _Proof("the file can be deleted", deleted, "Allow these credentials to delete files.")


def _bucket_links(bucket: Bucket) -> _Links:

    def opens(link: str) -> bytes | None:
        with web.http_errors("A signed link"):
            response = web.client().get(link)
        if response.is_client_error:
            return None
        web.check_status(response, "A signed link")
        return response.content

    return _Links(bucket.sign, opens)


def _folder_links(bucket: FolderBucket) -> _Links:
    """The application signs and opens the links of a folder."""
    links = FolderLinks(folder_key(local_folder(bucket.url)))

    def opens(link: str) -> bytes | None:
        parts = urlsplit(link)
        query = parse_qs(parts.query)
        path = parts.path.removeprefix("/files/")
        try:
            links.check(path, query["expires"][0], query["signature"][0])
        except LinkRefused:
            return None
        return read_whole(bucket, path)

    return _Links(links.sign, opens)


def _altered(link: str) -> str:
    return link[:-1] + ("0" if link[-1] != "0" else "1")


def _expires(link: str, opens: Callable[[str], bytes | None]) -> bool:
    stop_s = time.monotonic() + _EXPIRY_LIMIT_S
    while time.monotonic() < stop_s:
        if opens(link) is None:
            return True
        time.sleep(0.5)
    return False
