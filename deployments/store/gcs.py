"""gs://bucket/prefix: a bucket of Google Cloud Storage. Generations are pinned when listed."""

from __future__ import annotations

import base64
import os
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import requests
from google.api_core.exceptions import (
    GoogleAPICallError,
    NotFound,
    PreconditionFailed,
    RetryError,
)
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import GoogleAuthError, TransportError
from google.cloud import storage
from google.cloud.exceptions import Forbidden, Unauthorized
from google.cloud.storage.retry import DEFAULT_RETRY
from google.resumable_media import DataCorruption, InvalidResponse

from deployments.errors import SourceFailed
from deployments.store.sources import (
    TIMEOUT_S,
    TRANSIENT,
    Remote,
    Transient,
    gone,
    more_connections,
    retry_after_s,
    stream,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path

_CHUNK_BYTES = 32 * 2**20
_CHUNK_TIMEOUT_S = 120
"""Of an upload's chunk, tries included: the library tries a chunk again, we only a whole file."""


class BucketSource:
    """Objects below a prefix; each read names the generation that was listed."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._name, _, self._prefix = self.url.removeprefix("gs://").partition("/")

    def stat(self, paths: Sequence[str]) -> list[Remote]:
        with _mending(self.url):
            blobs = _client().list_blobs(
                self._bucket, prefix=self._object(""), timeout=TIMEOUT_S, retry=None
            )
            try:
                found = {cast("str", blob.name): blob for blob in blobs}
            except NotFound as error:
                raise SourceFailed(
                    "There is no such bucket.",
                    value=self.url,
                    remedy="Correct its name, or make it.",
                ) from error
        return [self._remote(path, found.get(self._object(path))) for path in paths]

    def read(self, file: Remote, start: int, stop: int, write: Callable[[bytes], object]) -> None:
        with _mending(f"{self.url}/{file.path}"):
            blob = self._bucket.blob(self._object(file.path), generation=int(file.pin))
            # The library's own download methods read 8 KiB at a time: a sixth of the speed.
            url = blob._get_download_url(_client(), if_generation_match=int(file.pin))
            stream(_client()._http, url, {}, (start, stop), write)

    def upload(self, path: str, local: Path) -> bool:
        """Upload a file unless there is one of that name; False if there was."""
        with _mending(f"{self.url}/{path}"):
            blob = self._bucket.blob(self._object(path), chunk_size=_CHUNK_BYTES)
            try:
                blob.upload_from_filename(
                    str(local),
                    if_generation_match=0,
                    checksum="crc32c",
                    timeout=_CHUNK_TIMEOUT_S,
                    retry=DEFAULT_RETRY.with_timeout(_CHUNK_TIMEOUT_S),
                )
            except PreconditionFailed:
                return False
        return True

    def find(self, path: str) -> tuple[int, str] | None:
        """Size and CRC32C (hex) of a file that is there; raises as `stat`."""
        with _mending(f"{self.url}/{path}"):
            blob = self._bucket.get_blob(self._object(path), timeout=TIMEOUT_S, retry=None)
        if blob is None:
            return None
        return int(blob.size), base64.b64decode(blob.crc32c or "").hex()

    @property
    def _bucket(self) -> Any:
        return _client().bucket(self._name)  # asks nobody

    def _object(self, path: str) -> str:
        return f"{self._prefix}/{path}" if self._prefix else path

    def _remote(self, path: str, blob: Any) -> Remote:
        if blob is None:
            raise gone(f"{self.url}/{path}")
        return Remote(path, int(blob.size), None, str(blob.generation))


@lru_cache(1)
def _client() -> Any:
    """Anonymous towards an emulator, else with the application default credentials."""
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        client = storage.Client(project="emulator", credentials=AnonymousCredentials())
    else:
        # Objects belong to a bucket; without a project the library would refuse to start.
        project = os.environ.get("GOOGLE_CLOUD_PROJECT") or "none"
        client = storage.Client(project=project)
    more_connections(client._http)  # pyright: ignore[reportPrivateUsage] # no public way to it
    return client


@contextmanager
def _mending(url: str) -> Generator[None]:
    """Turn the library's errors into ours."""
    try:
        yield
    except (NotFound, PreconditionFailed) as error:
        raise gone(url) from error
    except (Forbidden, Unauthorized) as error:
        raise _refused(url) from error
    except (InvalidResponse, GoogleAPICallError) as error:
        raise _answer(url, error.response) from error
    except RetryError as error:
        raise Transient(f"{url}: {type(error.cause).__name__}") from error
    except (requests.RequestException, TransportError, DataCorruption, ConnectionError) as error:
        raise Transient(f"{url}: {type(error).__name__}") from error
    except GoogleAuthError as error:
        # So the library wraps a metadata server that is not up yet.
        if isinstance(error.__cause__, TransportError):
            raise Transient(f"{url}: {type(error).__name__}") from error
        raise _refused(url) from error


def _refused(url: str) -> SourceFailed:
    return SourceFailed(
        "The bucket refuses access.",
        value=url,
        remedy="Give this account storage.objectViewer there (to publish,"
        " storage.objectCreator too), or run `gcloud auth application-default login`.",
    )


def _answer(url: str, response: Any) -> Exception:
    if response is None:
        return Transient(f"{url} does not answer")
    status: int = response.status_code
    if status in (404, 412):
        return gone(url)
    if status in TRANSIENT:
        return Transient(f"{url} answered {status}", retry_after_s(response.headers))
    return SourceFailed(f"The bucket answered HTTP {status}.", value=url)
