"""s3://bucket/prefix: a bucket of Amazon S3, or of a service that speaks its protocol.

obstore signs and lists; it reads the AWS_* variables, the token file of a pod's role, and the
metadata services of containers and machines. Everything else is a request to a signed URL, so that
files are streamed from and to the disk, and errors keep their status and Retry-After. With
AWS_SKIP_SIGNATURE=true nothing is signed, for public buckets; these are only read.
"""

from __future__ import annotations

import re
import threading
from contextlib import contextmanager, suppress
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal
from urllib.parse import quote

import httpx
import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from deployments.errors import ConfigError, Missing, SourceFailed
from deployments.store import environment, web
from deployments.store.bucket import (
    ANY_BYTES,
    RemoteFile,
    Transient,
    check_path,
    link_life_s,
    missing,
    no_bucket,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from obstore.store import ClientConfig

_OWN_LINK_S = 900
"""How long the URL of one of our own requests works: as much as Amazon lets clocks differ. A
transfer that has begun may take longer."""
_LARGEST_PUT_BYTES = 5 * 2**30
_PAGE = 1000
_Method = Literal["GET", "HEAD", "PUT", "DELETE"]
_STATUS = re.compile(r"status code: (\d{3})")
"""obstore's errors have the status in their text only."""
_REMEDY = (
    "Check the credentials (AWS_ACCESS_KEY_ID or a role, with s3:ListBucket, s3:GetObject,"
    " s3:PutObject and s3:DeleteObject), AWS_REGION and AWS_ENDPOINT_URL; a public bucket may be"
    " read with AWS_SKIP_SIGNATURE=true."
)


class S3Bucket:
    """Objects below a prefix; each read names the ETag that was listed."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._name, _, self._prefix = self.url.removeprefix("s3://").partition("/")
        self._made: S3Store | None = None
        self._lock = threading.Lock()

    def stat(self, paths: Sequence[str]) -> list[RemoteFile]:
        if len(paths) == 1:
            return [self._stat(paths[0])]
        held = {file.path: file for file in self.list()}
        for path in paths:
            if path not in held:
                raise missing(f"{self.url}/{path}")
        return [held[path] for path in paths]

    def read(
        self, file: RemoteFile, start: int, stop: int, write: Callable[[bytes], object]
    ) -> None:
        where = f"{self.url}/{file.path}"
        headers = {"If-Match": file.pin} if file.pin else {}
        web.stream(
            self._signed("GET", file.path), headers, start, stop, write, where=where, remedy=_REMEDY
        )

    def put(self, path: str, content: Path | bytes, media_type: str = ANY_BYTES) -> bool:
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        where = f"{self.url}/{path}"
        if size > _LARGEST_PUT_BYTES:
            raise ConfigError(
                "S3 takes at most 5 GiB in one upload.",
                value=f"{where}: {size} bytes",
                remedy="Save the weights in smaller files (max_shard_size).",
            )
        if isinstance(content, bytes):
            return self._put(path, content, size, media_type)
        with content.open("rb") as file:
            return self._put(path, file, size, media_type)

    def list(self, prefix: str = "") -> Iterator[RemoteFile]:
        # obstore takes whole folders only.
        folder = self._object(prefix.rpartition("/")[0]).strip("/")
        start = self._object(prefix)
        self._signed("GET", "-")  # an unusable endpoint or no credentials: a clearer error
        with _list_errors(self.url):
            for page in obstore.list(self._store(), prefix=folder or None, chunk_size=_PAGE):
                for item in page:
                    if item["path"].startswith(start):
                        path = item["path"][len(self._object("")) :]
                        yield RemoteFile(path, item["size"], pin=item["e_tag"] or "")

    def delete(self, path: str) -> None:
        response = self._send("DELETE", path)
        with suppress(Missing):
            web.check_status(response, f"{self.url}/{path}", _REMEDY)

    def sign(self, path: str, expires_s: float) -> str:
        return self._signed("GET", path, link_life_s(expires_s))

    def _stat(self, path: str) -> RemoteFile:
        response = self._send("HEAD", path, {"Accept-Encoding": "identity"})
        web.check_status(response, f"{self.url}/{path}", _REMEDY)
        size = int(response.headers.get("Content-Length", -1))
        return RemoteFile(path, size, pin=response.headers.get("ETag", ""))

    def _put(self, path: str, content: bytes | BinaryIO, size: int, media_type: str) -> bool:
        headers = {"If-None-Match": "*", "Content-Type": media_type, "Content-Length": str(size)}
        response = self._send("PUT", path, headers, content)
        match response.status_code:
            case HTTPStatus.PRECONDITION_FAILED:
                return False
            case HTTPStatus.CONFLICT:  # another writer, or a deletion, at the same moment
                raise Transient(f"{self.url}/{path} is being written")
            case HTTPStatus.NOT_FOUND:
                raise no_bucket(self.url)
            case _:
                web.check_status(response, f"{self.url}/{path}", _REMEDY)
        return True

    def _send(
        self,
        method: _Method,
        path: str,
        headers: dict[str, str] | None = None,
        content: bytes | BinaryIO | None = None,
    ) -> httpx.Response:
        url = self._signed(method, path)
        with web.http_errors(f"{self.url}/{path}"):
            return web.client().request(
                method, url, headers=headers, content=content, follow_redirects=False
            )

    def _signed(self, method: _Method, path: str, life_s: int = _OWN_LINK_S) -> str:
        name = self._object(check_path(path))
        if environment.s3_unsigned() and method in ("GET", "HEAD"):
            return self._encrypted(f"{environment.s3_endpoint(self._name)}/{quote(name)}")
        try:
            url = obstore.sign(self._store(), method, name, timedelta(seconds=life_s))
        except BaseError as error:
            raise Transient(
                f"{self.url}: no credentials (AWS_SKIP_SIGNATURE=true reads a public bucket"
                f" without), or no endpoint: {_line(error)}"
            ) from error
        return self._encrypted(url)

    def _encrypted(self, url: str) -> str:
        """The URL.

        Raises:
            ConfigError: it is plain http, and nothing allows that.
        """
        if url.startswith("http:") and not environment.s3_over_http():
            raise ConfigError(
                "The endpoint of s3:// does not encrypt.",
                value=self.url,
                remedy="Set AWS_ENDPOINT_URL to an https URL, or AWS_ALLOW_HTTP=true.",
            )
        return url

    def _object(self, path: str) -> str:
        return f"{self._prefix}/{path}" if self._prefix else path

    def _store(self) -> S3Store:
        """The client of this bucket, with our timeouts and certificates."""
        with self._lock:
            if self._made is None:
                connect_s, read_s = web.TIMEOUT_S
                options: ClientConfig = {
                    "connect_timeout": timedelta(seconds=connect_s),
                    "timeout": timedelta(seconds=read_s),
                    "allow_http": environment.s3_over_http(),
                }
                if ca_file := environment.ca_file():
                    options["root_certificate"] = Path(ca_file).read_bytes()
                self._made = S3Store(
                    self._name,
                    client_options=options,
                    retry_config={"max_retries": 0},
                    skip_signature=environment.s3_unsigned(),
                )
            return self._made


@contextmanager
def _list_errors(url: str) -> Generator[None]:
    """Turn the errors of a list into ours."""
    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        match = _STATUS.search(_line(error))
        status = int(match[1]) if match else None
        if status is None or status in web.TRANSIENT:
            raise Transient(f"{url}: {_line(error)}") from error
        if status == HTTPStatus.NOT_FOUND:
            raise no_bucket(url) from error
        raise SourceFailed(
            f"The bucket answered HTTP {status}.", value=url, remedy=_REMEDY
        ) from error


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]
