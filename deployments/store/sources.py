"""Where models come from. Each scheme is a `Source` of two methods; all are fetched alike."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol
from urllib.parse import quote, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import InvalidSchema, InvalidURL, TooManyRedirects
from requests.utils import get_environ_proxies
from urllib3.exceptions import HTTPError

from deployments.errors import ConfigError, ModelCorrupt, SourceFailed
from deployments.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

UNRESOLVED = "unresolved"
NOT_THERE = "Put the file there, or correct `source` and `files` in the model registry."
"""The remedy for a file that is not at its source."""
TIMEOUT_S = (15.0, 20.0)
"""To connect, and between two pieces of an answer."""
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONNECTIONS = 64
_BLOCK_BYTES = 2**20
_RECEIVE_BYTES = 2**20
_PARTIAL = 206


class Remote(NamedTuple):
    """A file at its source.

    Attributes:
        path: relative to the source.
        size: bytes.
        sha256: hex, where the source publishes it.
        pin: what must not change while it is read: a generation, or nothing.
    """

    path: str
    size: int
    sha256: str | None = None
    pin: str = ""


class Transient(Exception):
    """A failure that may pass; fetching tries again.

    Args:
        reason: one line.
        after_s: how long the server asks to wait.
    """

    def __init__(self, reason: str, after_s: float = 0) -> None:
        super().__init__(reason)
        self.after_s = after_s


class Source(Protocol):
    """A place of files. Its methods may be called from several threads at a time.

    Raises:
        Transient: worth another try.
        SourceFailed: missing, forbidden, changed since it was listed, not reachable at all.
    """

    url: str

    def stat(self, paths: Sequence[str]) -> list[Remote]:
        """Size, pin and perhaps SHA-256 of each file, in the same order."""
        ...

    def read(self, file: Remote, start: int, stop: int, write: Callable[[bytes], object]) -> None:
        """Give the bytes from `start` up to `stop` to `write`, in order, in pieces."""
        ...


def local_folder(url: str) -> Path:
    """The folder of a file:// URL; a relative one (file://a/b) is taken from the project's root.

    Raises:
        ConfigError: it is written otherwise, such as file:/a.
    """
    path = url.removeprefix("file://")
    if path in ("", url):
        raise ConfigError(
            "A folder is written file:///folder.", value=url, remedy="Correct the URL."
        )
    return resolve(Path(path))


class LocalSource:
    """A folder: `file:///absolute` or `file://from/the/project's/root`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._folder = local_folder(url)

    def stat(self, paths: Sequence[str]) -> list[Remote]:
        return [self._stat(path) for path in paths]

    def read(self, file: Remote, start: int, stop: int, write: Callable[[bytes], object]) -> None:
        path = self._folder / file.path
        with _reading(path):
            opened = path.open("rb", buffering=0)
        with opened:
            while start < stop:
                with _reading(path):
                    data = os.pread(opened.fileno(), min(_BLOCK_BYTES, stop - start), start)
                if not data:
                    break
                write(data)  # its errors are those of another disk
                start += len(data)

    def _stat(self, path: str) -> Remote:
        here = self._folder
        for part in Path(path).parts:
            here /= part
            if here.is_symlink():
                raise ModelCorrupt(
                    "A source must hold plain files, no symbolic links.",
                    value=here,
                    remedy="Replace the link by the file it points to.",
                )
        with _reading(here):
            found = os.stat(here)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "not a plain file")
        return Remote(path, found.st_size)


@contextmanager
def _reading(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise SourceFailed(
            f"A file of the source cannot be read: {error.strerror}.",
            value=path,
            remedy=NOT_THERE,
        ) from error


class WebSource:
    """Files below an https:// URL, each known by its SHA-256 in the lock file.

    Plain http is for loopback only. Credentials never come from a netrc file.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
            raise ConfigError("Models come by https, not http.", value=url, remedy="Use https://.")
        self._session = web_session(url)

    def stat(self, paths: Sequence[str]) -> list[Remote]:
        return [Remote(path, self._size(path)) for path in paths]

    def read(self, file: Remote, start: int, stop: int, write: Callable[[bytes], object]) -> None:
        stream(self._session, self._url(file.path), {}, (start, stop), write)

    def _url(self, path: str) -> str:
        return f"{self.url.rstrip('/')}/{quote(path)}"

    def _size(self, path: str) -> int:
        url = self._url(path)
        headers = {"Accept-Encoding": "identity"}
        with mending(url):
            response = self._session.head(
                url, headers=headers, timeout=TIMEOUT_S, allow_redirects=True
            )
            check_status(response, url)
        return int(response.headers.get("Content-Length", -1))


def web_session(url: str) -> requests.Session:
    """A session that follows redirects; Authorization is dropped when the host changes."""
    session = requests.Session()
    # It would read ~/.netrc too; of the environment only the proxies and the CA file are wanted.
    session.trust_env = False
    session.proxies.update(get_environ_proxies(url))
    session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
    more_connections(session)
    return session


def more_connections(session: requests.Session) -> None:
    """Keep a connection for every thread."""
    adapter = HTTPAdapter(pool_connections=_CONNECTIONS, pool_maxsize=_CONNECTIONS)
    for scheme in ("https://", "http://"):
        session.mount(scheme, adapter)


def stream(
    session: requests.Session,
    url: str,
    headers: dict[str, str],
    span: tuple[int, int],
    write: Callable[[bytes], object],
) -> None:
    """GET a range of bytes; a server that ignores Range gets its whole body skipped through.

    Raises:
        Transient, SourceFailed: as `Source.read`.
    """
    position, stop = span
    if position >= stop:
        return
    asked = {**headers, "Range": f"bytes={position}-{stop - 1}", "Accept-Encoding": "identity"}
    with (
        mending(url),
        session.get(url, headers=asked, stream=True, timeout=TIMEOUT_S) as response,
    ):
        check_status(response, url)
        partial = response.status_code == _PARTIAL
        skip = 0 if partial else position
        # What one receive gives: after a failure only that is lost. Read to the end, for the
        # connection to be used again.
        while (position < stop or partial) and (data := response.raw.read1(_RECEIVE_BYTES)):
            piece = data[min(skip, len(data)) : skip + stop - position]
            skip -= min(skip, len(data))
            position += len(piece)
            if piece:
                write(piece)
    if position < stop:
        raise Transient(f"{url} ended {stop - position} bytes early")


@contextmanager
def mending(url: str) -> Generator[None]:
    """Turn the HTTP libraries' errors into ours."""
    try:
        yield
    except (TooManyRedirects, InvalidURL, InvalidSchema) as error:
        raise SourceFailed("A source's URL leads nowhere.", value=url) from error
    except (requests.RequestException, HTTPError) as error:
        raise Transient(f"{url}: {type(error).__name__}") from error


def check_status(response: requests.Response, url: str) -> None:
    """Raises Transient or SourceFailed unless the answer is a success."""
    status = response.status_code
    if status < 300:
        return
    if status in TRANSIENT:
        raise Transient(f"{url} answered {status}", retry_after_s(response.headers))
    if status in (404, 412):
        raise gone(url)
    raise SourceFailed(
        f"A source refused: HTTP {status} {response.reason}.",
        value=url,
        remedy="Check the name and revision in the model registry, and your access to it.",
    )


def gone(url: str) -> SourceFailed:
    """The error of a file that is not there, or not the one that was listed."""
    return SourceFailed(
        "A file is not there, or was replaced since it was listed.",
        value=url,
        remedy=NOT_THERE,
    )


def retry_after_s(headers: Mapping[str, str]) -> float:
    """How long an answer asks to wait; 0 if it does not say so in seconds."""
    value = headers.get("Retry-After", "0")
    return min(float(value), 60.0) if value.isdigit() else 0.0
