"""HTTP for the store: one client for every source, ranged reads, and https:// URLs."""

from __future__ import annotations

import ssl
import threading
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import httpx

from deployments.errors import ConfigError, SourceFailed
from deployments.store import environment
from deployments.store.bucket import RemoteFile, Transient, missing

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

TIMEOUT_S = (15.0, 20.0)
"""To connect, and between two pieces of an answer."""
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which another try may succeed."""
_KEPT_CONNECTIONS = 64
_PARTIAL = 206
_lock = threading.Lock()
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class WebReader:
    """Files below an https:// URL, each known by its SHA-256 in the lock file.

    Plain http is for loopback only. Credentials never come from a netrc file.

    Raises:
        ConfigError: plain http to another machine.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise ConfigError("Models come by https, not http.", value=url, remedy="Use https://.")

    def stat(self, paths: Sequence[str]) -> list[RemoteFile]:
        return [RemoteFile(path, self._size(path)) for path in paths]

    def read(
        self, file: RemoteFile, start: int, stop: int, write: Callable[[bytes], object]
    ) -> None:
        stream(self._url(file.path), {}, start, stop, write)

    def _url(self, path: str) -> str:
        return f"{self.url.rstrip('/')}/{quote(path)}"

    def _size(self, path: str) -> int:
        url = self._url(path)
        with http_errors(url):
            response = client().head(url, headers={"Accept-Encoding": "identity"})
        check_status(response, url)
        return int(response.headers.get("Content-Length", -1))


def client() -> httpx.Client:
    """This process's client.

    It follows redirects and drops Authorization when one leads to another host. From the
    environment it takes proxies and CA files.
    """
    with _lock:  # lru_cache alone would let two threads make two
        return _make_client()


@lru_cache(1)
def _make_client() -> httpx.Client:
    ca_file = environment.ca_file()
    return httpx.Client(
        verify=ssl.create_default_context(cafile=ca_file) if ca_file else True,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=_KEPT_CONNECTIONS),
        follow_redirects=True,
        timeout=httpx.Timeout(TIMEOUT_S[1], connect=TIMEOUT_S[0]),
    )


def stream(
    url: str,
    headers: Mapping[str, str],
    start: int,
    stop: int,
    write: Callable[[bytes], object],
    *,
    where: str = "",
    remedy: str = "",
) -> None:
    """GET the bytes from `start` up to `stop`, and pass them to `write` as they come.

    A server that ignores Range sends everything; what comes before `start` is skipped.

    Args:
        where: what errors name, if the URL holds a signature.
        remedy: of a refusal, as `check_status` has it.

    Raises:
        Transient, Missing, SourceFailed: as `Reader.read`.
    """
    if start >= stop:
        return
    where = where or url
    asked = {**headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with http_errors(where), client().stream("GET", url, headers=asked) as response:
        check_status(response, where, remedy)
        partial = response.status_code == _PARTIAL
        position = start if partial else 0
        # A partial answer is read to its end, so that its connection can be used again.
        for data in response.iter_raw():
            piece = data[max(start - position, 0) : stop - position]
            position += len(data)
            if piece:
                write(piece)
            if position >= stop and not partial:
                break
    if position < stop:
        raise Transient(f"{where} ended {stop - position} bytes early")


@contextmanager
def http_errors(url: str) -> Generator[None]:
    """Turn httpx's errors into ours."""
    try:
        yield
    except (httpx.TooManyRedirects, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise SourceFailed("A source's URL leads nowhere.", value=url) from error
    except httpx.HTTPError as error:
        raise Transient(f"{url}: {type(error).__name__}") from error


def check_status(response: httpx.Response, url: str, remedy: str = "") -> None:
    """Raises Transient, Missing or SourceFailed unless the answer is a success.

    Args:
        remedy: of a refusal; by default, to check the registry and the access.
    """
    status = response.status_code
    if response.is_success:
        return
    if status in TRANSIENT:
        raise Transient(f"{url} answered {status}", retry_after_s(response.headers))
    if status in (404, 412):
        raise missing(url)
    raise SourceFailed(
        f"A source refused: HTTP {status} {response.reason_phrase}.",
        value=url,
        remedy=remedy
        or "Check the name and revision in the model registry, and your access to it.",
    )


def retry_after_s(headers: Mapping[str, str]) -> float:
    """How long an answer asks to wait, 60 s at most; 0 if it does not say so in seconds."""
    value = headers.get("Retry-After", "0")
    return min(float(value), 60.0) if value.isdigit() else 0.0
