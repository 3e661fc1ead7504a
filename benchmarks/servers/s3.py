"""Amazon S3: moto behind a proxy that checks signatures.

moto keeps objects and their preconditions. It answers 200 to links that expired or were altered, so
the proxy recomputes each signature with botocore, and checks its date and expiry.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import re
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from tempfile import TemporaryFile
from typing import IO
from urllib.parse import quote, urlencode

from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from moto.server import ThreadedMotoServer

from benchmarks.servers.faults import Faults
from benchmarks.servers.listener import (
    BLOCK,
    HOST,
    Answer,
    FileRange,
    Loopback,
    RefusedError,
    Request,
)

KEY, SECRET, REGION = "test-key", "test-secret", "eu-west-1"
NOT_SENT_ON = frozenset({"connection", "content-length", "expect", "accept-encoding", "host"})
NOT_SENT_BACK = frozenset({"connection", "content-length", "date", "server", "transfer-encoding"})
HEADER = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/]+)/.+, SignedHeaders=([^,]+), Signature=(\w+)"
)
OWNER = {"Authorization": f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/{REGION}/s3/aws4_request"}
"""What moto takes for a signature: it reads the account from it."""
SKEW = timedelta(minutes=15)


class S3Server(Loopback):
    """S3 with one bucket; `env` leads clients to it.

    Args:
        bucket: its name.
        public: whether anyone may read, without a signature.
        faults: a plan to share with another server.
    """

    def __init__(
        self, bucket: str = "models", *, public: bool = False, faults: Faults | None = None
    ) -> None:
        super().__init__(faults)
        self.bucket = bucket
        self.public = public
        self.url = ""
        self._credentials = Credentials(KEY, SECRET)

    @property
    def env(self) -> dict[str, str]:
        """The environment of a client."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }

    def start(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        self._moto = ThreadedMotoServer(HOST, 0, verbose=False)
        self._moto.start()
        self._call("POST", "/moto-api/reset")  # moto's objects belong to the process
        self._call("PUT", f"/{self.bucket}")
        self.url = self.listen(self._answer)

    def stop(self) -> None:
        super().stop()
        self._moto.stop()

    def put(self, name: str, content: bytes) -> None:
        """Write an object without a client; replaces one of that name."""
        status, _, body = self._call("PUT", f"/{self.bucket}/{quote(name)}", content, OWNER)
        if status != 200:
            raise RuntimeError(body)

    def _answer(self, request: Request) -> Answer:
        self._check(request)
        # A HEAD gets the headers of a GET.
        method = "GET" if request.method == "HEAD" else request.method
        sent = {n: v for n, v in request.headers.items() if n.lower() not in NOT_SENT_ON}
        sent = (OWNER if self._is_open(request) else {}) | sent
        status, headers, body = self._call(method, request.target, request.body.read(), sent)
        kept = {n: v for n, v in headers.items() if n.lower() not in NOT_SENT_BACK}
        if status not in (200, 206) or request.method not in ("GET", "HEAD"):
            return Answer(status, body, kept)
        file: IO[bytes] = TemporaryFile()  # noqa: SIM115 - the answer closes it
        file.write(body)
        file.flush()
        return Answer(status, FileRange(file, 0, len(body)), kept)

    def _call(
        self, method: str, target: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One exchange with moto: status, headers, body."""
        connection = HTTPConnection(*self._moto.get_host_and_port(), blocksize=BLOCK)
        with contextlib.closing(connection):
            connection.request(method, target, body, headers or {})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def _check(self, request: Request) -> None:
        """Refuse a request unless a signature of ours, still valid, covers it."""
        if "X-Amz-Signature" in request.query:
            self._check_link(request)
        elif match := HEADER.fullmatch(request.headers.get("Authorization", "")):
            self._check_header(request, match[1], match[2].split(";"), match[3])
        elif not self._is_open(request):
            raise _refused("AccessDenied", "There is no signature.")

    def _is_open(self, request: Request) -> bool:
        """Whether a request needs no signature, and has none."""
        signed = "X-Amz-Signature" in request.query or "Authorization" in request.headers
        return self.public and not signed and request.method in ("GET", "HEAD")

    def _check_link(self, request: Request) -> None:
        query, life_s = request.query, int(request.query["X-Amz-Expires"])
        signed = AWSRequest(request.method, _url(request), headers={})
        auth = S3SigV4QueryAuth(self._credentials, "s3", REGION, life_s)
        signed.context["timestamp"] = query["X-Amz-Date"]
        auth._modify_request_before_signing(signed)
        _compare(auth, signed, query["X-Amz-Signature"])
        age = _age(query["X-Amz-Date"])
        if not -SKEW < age < timedelta(seconds=life_s) or life_s > 604_800:
            raise _refused("AccessDenied", "Request has expired")

    def _check_header(self, request: Request, key: str, names: list[str], signature: str) -> None:
        if key != KEY:
            raise _refused("InvalidAccessKeyId", "There is no such access key.")
        headers = {name: request.headers[name] for name in names if name != "host"}
        # A client may write a space as +, but signs it as %20.
        url = f"{_url(request)}?{urlencode(request.query, quote_via=quote, safe='-_.~')}"
        signed = AWSRequest(request.method, url, headers=headers)
        signed.context["timestamp"] = request.headers["X-Amz-Date"]
        _compare(S3SigV4Auth(self._credentials, "s3", REGION), signed, signature)
        if not -SKEW < _age(request.headers["X-Amz-Date"]) < SKEW:
            raise _refused("RequestTimeTooSkewed", "The clocks differ.")


def _url(request: Request) -> str:
    return f"http://{request.headers['Host']}{request.raw_path}"


def _compare(auth: S3SigV4Auth | S3SigV4QueryAuth, signed: AWSRequest, signature: str) -> None:
    text = auth.string_to_sign(signed, auth.canonical_request(signed))
    if not hmac.compare_digest(auth.signature(text, signed), signature):
        raise _refused("SignatureDoesNotMatch", "Another request was signed.")


def _age(date: str) -> timedelta:
    return datetime.now(UTC) - datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)


def _refused(code: str, message: str) -> RefusedError:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return RefusedError(Answer(403, body.encode(), {"Content-Type": "application/xml"}))
