"""gs://bucket/prefix: a bucket of Google Cloud Storage. Generations are pinned when listed."""

from __future__ import annotations

import base64
import io
import threading
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import google.auth
from google.api_core.exceptions import (
    Forbidden,
    GoogleAPICallError,
    NotFound,
    PreconditionFailed,
    RetryError,
    Unauthorized,
)
from google.auth import iam
from google.auth.credentials import AnonymousCredentials, Signing
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
from google.auth.transport.requests import Request
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from google.cloud.storage.retry import DEFAULT_RETRY
from google.oauth2 import service_account

from deployments.errors import SourceFailed, Unsignable
from deployments.store import environment, web
from deployments.store.bucket import (
    ANY_BYTES,
    RemoteFile,
    Transient,
    link_life_s,
    missing,
    no_bucket,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

_lock = threading.Lock()
_IAM_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
"""IAM's signBlob takes no token of the storage scopes."""
_BUSY = "RESOURCE_EXHAUSTED"
_CHUNK_BYTES = 32 * 2**20
_CHUNK_TIMEOUT_S = 120
"""Of one chunk of an upload with all its tries: the library repeats a chunk, we only a file."""


class GcsBucket:
    """Objects below a prefix; each read names the generation that was listed."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._name, _, self._prefix = self.url.removeprefix("gs://").partition("/")

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
        # Without the library, which reads 8 KiB at a time: a sixth of the speed.
        name = quote(self._object(file.path), safe="")
        query = f"?alt=media&generation={file.pin}&ifGenerationMatch={file.pin}"
        with _google_errors(f"{self.url}/{file.path}"):
            account = _account()
            url = f"{account.client.api_endpoint}/download/storage/v1/b/{self._name}/o/{name}"
            headers = account.authorization(url)
        web.stream(url + query, headers, start, stop, write)

    def put(self, path: str, content: Path | bytes, media_type: str = ANY_BYTES) -> bool:
        file = content.open("rb") if isinstance(content, Path) else io.BytesIO(content)
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        with file, _google_errors(f"{self.url}/{path}"):
            try:
                self._blob(path, chunk_size=_CHUNK_BYTES).upload_from_file(
                    file,
                    size=size,
                    content_type=media_type,
                    if_generation_match=0,
                    checksum="crc32c",
                    timeout=_CHUNK_TIMEOUT_S,
                    retry=DEFAULT_RETRY.with_timeout(_CHUNK_TIMEOUT_S),
                )
            except PreconditionFailed:
                return False
        return True

    def list(self, prefix: str = "") -> Iterator[RemoteFile]:
        with _google_errors(self.url):
            try:
                yield from map(
                    self._remote,
                    _account().client.list_blobs(
                        self._name, prefix=self._object(prefix), timeout=web.TIMEOUT_S, retry=None
                    ),
                )
            except NotFound as error:
                raise no_bucket(self.url) from error

    def delete(self, path: str) -> None:
        with _google_errors(f"{self.url}/{path}"), suppress(NotFound):
            self._blob(path).delete(timeout=web.TIMEOUT_S, retry=None)

    def sign(self, path: str, expires_s: float) -> str:
        url, life = f"{self.url}/{path}", timedelta(seconds=link_life_s(expires_s))
        with _google_errors(url):
            try:
                return self._blob(path).generate_signed_url(
                    version="v4", expiration=life, method="GET", credentials=_account().signing(url)
                )
            except TransportError as error:
                # How google-auth words a refusal, as opposed to a service that does not answer.
                if str(error).startswith("Error calling the IAM") and _BUSY not in str(error):
                    raise _unsignable(url) from error
                raise

    def expire_after(self, days: int, folders: Sequence[str]) -> None:
        """Let Google delete the files of these folders once they are `days` old.

        The bucket's other rules stay; an earlier one for the same folders is replaced.

        Raises:
            Transient, SourceFailed: as `Bucket`.
        """
        prefixes = [self._object(f"{folder}/") for folder in folders]
        with _google_errors(self.url):
            try:
                bucket = _account().client.get_bucket(self._name, timeout=web.TIMEOUT_S, retry=None)
                bucket.lifecycle_rules = [
                    rule
                    for rule in bucket.lifecycle_rules
                    if rule["condition"].get("matchesPrefix") != prefixes
                ]
                bucket.add_lifecycle_delete_rule(age=days, matches_prefix=prefixes)
                bucket.patch(timeout=web.TIMEOUT_S, retry=None)
            except NotFound as error:
                raise no_bucket(self.url) from error
            except Forbidden as error:
                raise SourceFailed(
                    "This account may not change the bucket's lifecycle.",
                    value=self.url,
                    remedy="Run the command as an account that has roles/storage.admin there.",
                ) from error

    def _stat(self, path: str) -> RemoteFile:
        with _google_errors(f"{self.url}/{path}"):
            blob = (
                _account()
                .client.bucket(self._name)
                .get_blob(self._object(path), timeout=web.TIMEOUT_S, retry=None)
            )
        if blob is None:
            raise missing(f"{self.url}/{path}")
        return self._remote(blob)

    def _blob(self, path: str, **options: Any) -> Any:
        """A handle of an object; makes no request."""
        return _account().client.bucket(self._name).blob(self._object(path), **options)

    def _object(self, path: str) -> str:
        return f"{self._prefix}/{path}" if self._prefix else path

    def _remote(self, blob: Any) -> RemoteFile:
        path = blob.name[len(self._object("")) :]
        crc32c = base64.b64decode(blob.crc32c or "").hex()
        return RemoteFile(path, int(blob.size), crc32c=crc32c, pin=str(blob.generation))


class _Account:
    """Google's client, and the same credentials for our own reads."""

    def __init__(self) -> None:
        self._credentials: Any = _credentials()
        # Objects belong to a bucket, whatever the project.
        self.client: Any = storage.Client(project=None, credentials=self._credentials)
        self._request = partial(Request(), timeout=int(web.TIMEOUT_S[1]))
        self._signing: Signing | None = None
        self._lock = threading.Lock()

    def authorization(self, url: str) -> dict[str, str]:
        """The header that authorises a GET; fetches a new token shortly before one expires."""
        headers: dict[str, str] = {}
        with self._lock:  # one thread fetches the token, the others wait for it
            self._credentials.before_request(self._request, "GET", url, headers)
        return headers

    def signing(self, url: str) -> Signing:
        """Credentials that sign: with their own key, or by IAM's signBlob.

        Raises:
            Unsignable: they belong to no service account.
        """
        if isinstance(self._credentials, Signing):
            return self._credentials
        self.authorization(url)  # the metadata server names the account together with its token
        email = getattr(self._credentials, "service_account_email", None)
        if not email:
            raise _unsignable(url)
        with self._lock:
            if self._signing is None:
                scoped = self._credentials.with_scopes([_IAM_SCOPE])
                signer = iam.Signer(self._request, scoped, email)
                self._signing = service_account.Credentials(signer, email, token_uri="")
            return self._signing


def _credentials() -> Any:
    """The application default credentials; else none, with which public buckets can be read."""
    if environment.storage_emulator():
        return AnonymousCredentials()
    try:
        return google.auth.default(scopes=storage.Client.SCOPE)[0]
    except DefaultCredentialsError as error:
        # This is how the library words that it found nothing, as opposed to a broken file.
        if "were not found" not in str(error):
            raise
        return AnonymousCredentials()


def _account() -> _Account:
    """This process's account."""
    with _lock:
        return _make_account()


@lru_cache(1)
def _make_account() -> _Account:
    return _Account()


@contextmanager
def _google_errors(url: str) -> Generator[None]:
    """Turn the library's errors into ours."""
    try:
        yield
    except (NotFound, PreconditionFailed) as error:
        raise missing(url) from error
    except (Forbidden, Unauthorized) as error:
        raise _refused(url) from error
    except (InvalidResponse, GoogleAPICallError) as error:
        raise _answer(url, error.response) from error
    except RetryError as error:
        raise Transient(f"{url}: {type(error.cause).__name__}") from error
    # OSError: the library's HTTP client (requests) derives its errors from it.
    except (OSError, TransportError, DataCorruption) as error:
        raise Transient(f"{url}: {type(error).__name__}") from error
    except GoogleAuthError as error:
        # This is how the library wraps a metadata server that is not up yet.
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


def _unsignable(url: str) -> Unsignable:
    return Unsignable(
        "These Google credentials cannot sign URLs.",
        value=url,
        remedy="Run as a service account that has roles/iam.serviceAccountTokenCreator on itself,"
        " with the IAM Service Account Credentials API enabled; or use a service account's key"
        " (GOOGLE_APPLICATION_CREDENTIALS).",
    )


def _answer(url: str, response: Any) -> Exception:
    if response is None:
        return Transient(f"{url} does not answer")
    status: int = response.status_code
    if status in (404, 412):
        return missing(url)
    if status in web.TRANSIENT:
        return Transient(f"{url} answered {status}", web.retry_after_s(response.headers))
    return SourceFailed(f"The bucket answered HTTP {status}.", value=url)
