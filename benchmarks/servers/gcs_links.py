"""A fake of what Google's emulators lack: V4 signed links, IAM's signBlob, the metadata server."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any
from urllib.parse import quote

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from benchmarks.servers.gcs import GcsServer
from benchmarks.servers.listener import Answer, RefusedError, Request, json_answer

EMAIL = "imagen@example.iam.gserviceaccount.com"
TOKEN = "token-of-the-metadata-server"
_METADATA = "/computeMetadata/v1/instance/service-accounts/"
_SIGN = f"/v1/projects/-/serviceAccounts/{EMAIL}:signBlob"
_LONGEST_S = 604_800


class FakeGcsLinks(GcsServer):
    """A bucket whose signed links are checked: signature, date and expiry.

    Attributes:
        may_sign: whether IAM lets the account sign.
        key: the account's private key.
    """

    may_sign = True

    def start(self) -> None:
        super().start()
        self.key = rsa.generate_private_key(65537, 2048)

    @property
    def sign_endpoint(self) -> str:
        """What google-auth calls `_IAM_SIGN_ENDPOINT`."""
        return f"{self.url}{_SIGN.replace(EMAIL, '{}')}"

    @property
    def key_file(self) -> dict[str, str]:
        """The content of a service account's key file."""
        pem = self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return {
            "type": "service_account",
            "client_email": EMAIL,
            "private_key": pem.decode(),
            "private_key_id": "1",
            "token_uri": f"{self.url}/token",
        }

    def _answer(self, request: Request) -> Answer:
        if request.path.startswith(_METADATA):
            return self._metadata(request)
        if request.path == _SIGN:
            return self._sign_blob(request)
        if request.path.startswith(f"/{self.bucket}/"):
            return self._link(request)
        return super()._answer(request)

    def _metadata(self, request: Request) -> Answer:
        flavour = {"Metadata-Flavor": "Google"}
        if request.path.endswith("/token"):
            token = {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}
            return json_answer(token, headers=flavour)
        return json_answer({"email": EMAIL, "scopes": [], "aliases": ["default"]}, headers=flavour)

    def _sign_blob(self, request: Request) -> Answer:
        if not self.may_sign or request.headers["Authorization"] != f"Bearer {TOKEN}":
            return json_answer({"error": {"code": 403, "status": "PERMISSION_DENIED"}}, 403)
        message = base64.b64decode(json.load(request.body)["payload"])
        signature = self.key.sign(message, padding.PKCS1v15(), hashes.SHA256())
        return json_answer({"keyId": "1", "signedBlob": base64.b64encode(signature).decode()})

    def _link(self, request: Request) -> Answer:
        """https://cloud.google.com/storage/docs/authentication/canonical-requests."""
        query = dict(request.query)
        signature = query.pop("X-Goog-Signature", "")
        account, _, scope = query.get("X-Goog-Credential", "").partition("/")
        date, life_s = query.get("X-Goog-Date", ""), int(query.get("X-Goog-Expires", 0))
        text = "\n".join(
            ("GOOG4-RSA-SHA256", date, scope, sha256(_canonical(request, query)).hexdigest())
        )
        try:
            self.key.public_key().verify(
                bytes.fromhex(signature), text.encode(), padding.PKCS1v15(), hashes.SHA256()
            )
        except (InvalidSignature, ValueError):
            raise _refused("SignatureDoesNotMatch") from None
        if account != EMAIL or not scope.startswith(date[:8]) or life_s > _LONGEST_S:
            raise _refused("InvalidArgument")
        begin = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if not begin <= datetime.now(UTC) < begin + timedelta(seconds=life_s):
            raise _refused("ExpiredToken")
        media = request.path.removeprefix(f"/{self.bucket}/")
        target = f"/download/storage/v1/b/{self.bucket}/o/{quote(media, safe='')}"
        return super()._answer(Request(request.method, target, {}, request.headers, request.body))


def _canonical(request: Request, query: dict[str, str]) -> bytes:
    parts = sorted(f"{quote(name, safe='~')}={quote(query[name], safe='~')}" for name in query)
    host = f"host:{request.headers['Host']}"
    lines: tuple[Any, ...] = (
        request.method,
        request.raw_path,
        "&".join(parts),
        host,
        "",
        "host",
        "UNSIGNED-PAYLOAD",
    )
    return "\n".join(lines).encode()


def _refused(code: str) -> RefusedError:
    body = f"<Error><Code>{code}</Code></Error>"
    return RefusedError(Answer(403, body.encode(), {"Content-Type": "application/xml"}))
