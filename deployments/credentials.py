"""Content Credentials (C2PA): results signed with the operator's certificate, and their check.

A manifest states what was done, by which model, and from which picture (https://c2pa.org,
specification 2.4). The package c2pa-python writes and reads it; nothing here reaches the network
unless a time-stamping authority is configured.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from PIL import Image

from deployments import provenance
from deployments.errors import ConfigError, ModelFailed
from deployments.settings import resolve

if TYPE_CHECKING:
    from pathlib import Path

    from deployments.provenance import SourceType
    from deployments.settings import C2paSettings

State = Literal["valid", "untrusted", "broken"]
"""Signed by whom a given anchor vouches for; intact, but signed by somebody unknown; changed since
it was signed, or never right.
"""
_STATES: dict[str, State] = {"Trusted": "valid", "Valid": "untrusted"}
_OFFLINE: dict[str, Any] = {
    # An upload may name any address as the place of its manifest.
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": False},
    # A thumbnail of the upload would put the upload into the result.
    "builder": {"thumbnail": {"enabled": False}},
}
_MOST_MANIFEST_BYTES = 2**20
"""Of the manifests in a result, with those that the upload brought along. Larger ones stay out."""
logger = logging.getLogger("ray.serve.imagen.model")


class Origin(NamedTuple):
    """Where a result comes from.

    Attributes:
        task: as in `comic`.
        model: name@digest.
        source_type: IPTC's digital source type.
        picture: the uploaded file; None if the result was made from text alone.
        media_type: of the upload.
        carried: whether manifests that the upload has go on into the result.
    """

    task: str
    model: str
    source_type: SourceType
    picture: bytes | None
    media_type: str
    carried: bool = True


class Verdict(NamedTuple):
    """What Content Credentials of a file say, and whether they hold.

    Attributes:
        state: see `State`.
        signed_by: common name of the signer's certificate; empty if unknown.
        issuer: organisation of it; empty if unknown.
        actions: as in `c2pa.edited`, with the model and the source type.
        ingredients: media types of the pictures it was made from.
        problems: codes of the C2PA specification.
    """

    state: State
    signed_by: str
    issuer: str
    actions: list[dict[str, Any]]
    ingredients: list[str]
    problems: list[str]


class Signing:
    """Signs results. Thread-safe.

    Args:
        settings: whose certificate and key.

    Raises:
        ConfigError: a file is missing or wrong, the key is not the certificate's, what is signed
            with them does not verify, or c2pa-python is not installed.
    """

    def __init__(self, settings: C2paSettings) -> None:
        self._c2pa = _package()
        self._settings = settings
        self._chain = _read(settings.certificates, "certificates")
        self._key = _read(settings.key, "key")
        _check_pair(settings, self._chain, self._key)
        self._check_signature()

    def sign(self, body: bytes, media_type: str, origin: Origin) -> bytes:
        """A result with its manifest, some 4 kB more and those of the upload.

        Args:
            body: image/png, image/jpeg or image/webp.
            media_type: of the body.
            origin: what the manifest states.

        Raises:
            ModelFailed: it cannot be signed, such as when the time-stamping authority is away.
        """
        try:
            signed = self._signed(body, media_type, origin, self._settings.timestamp_url)
            if origin.carried and len(signed) - len(body) > _MOST_MANIFEST_BYTES:
                alone = origin._replace(carried=False)
                signed = self._signed(body, media_type, alone, self._settings.timestamp_url)
            return signed
        except self._c2pa.C2paError as error:
            logger.error("A result could not be signed: %s", error)
            raise ModelFailed(
                "The result could not be signed.",
                value="no signature",
                remedy="Try again; operators find the reason in the log.",
            ) from error

    def _signed(self, body: bytes, media_type: str, origin: Origin, tsa: str | None) -> bytes:
        c2pa, signed = self._c2pa, io.BytesIO()
        info = c2pa.C2paSignerInfo(
            self._settings.algorithm, self._chain, self._key, tsa.encode() if tsa else None
        )
        with c2pa.Signer.from_info(info) as signer, self._builder(origin) as builder:
            builder.sign(signer, media_type, io.BytesIO(body), signed)
        return signed.getvalue()

    def _builder(self, origin: Origin) -> Any:
        """A manifest that waits to be signed."""
        context = _context(self._c2pa, {})
        manifest = _manifest(origin)
        if origin.picture is None:
            return self._c2pa.Builder(json.dumps(manifest), context)
        ingredient = {"relationship": "parentOf", "format": origin.media_type, "title": "upload"}
        if origin.carried and self._may_carry(origin):
            builder = self._c2pa.Builder(json.dumps(manifest), context)
            builder.set_intent(self._c2pa.C2paBuilderIntent.EDIT)
            file = io.BytesIO(origin.picture)
            builder.add_ingredient(json.dumps(ingredient), origin.media_type, file)
            return builder
        manifest["ingredients"] = [ingredient]
        builder = self._c2pa.Builder(json.dumps(manifest), context)
        builder.set_intent(self._c2pa.C2paBuilderIntent.EDIT)
        return builder

    def _may_carry(self, origin: Origin) -> bool:
        """Whether the upload's manifests can be read; also if it has none."""
        file = io.BytesIO(origin.picture or b"")
        try:
            reader = self._c2pa.Reader.try_create(
                origin.media_type, file, context=_context(self._c2pa, {})
            )
            if reader is None:
                return True
            with reader:
                return bool(reader.json())
        except self._c2pa.C2paError:
            return False

    def _check_signature(self) -> None:
        """Sign a picture of one pixel, and read it.

        Raises:
            ConfigError: it cannot be signed, or does not verify.
        """
        origin = Origin("start", "none@none", "algorithmicallyEnhanced", None, "")
        pixel = io.BytesIO()
        Image.new("L", (1, 1)).save(pixel, "PNG")
        problems: list[str] = []
        reason = "What is signed with the certificate does not verify"
        try:
            signed = self._signed(pixel.getvalue(), "image/png", origin, None)
            verdict = check(signed)
            problems = verdict.problems if verdict and verdict.state == "broken" else []
        except self._c2pa.C2paError as error:
            reason, problems = "The certificate cannot sign", [str(error)]
        if problems:
            raise ConfigError(
                f"{reason}: {', '.join(problems)}.",
                value=f"{self._settings.certificates}, {self._settings.algorithm}",
                remedy="Use a C2PA signing certificate that is valid today, and the `algorithm` "
                "of its key (docs/provenance.md).",
            )


def can_check() -> bool:
    """Whether c2pa-python is installed."""
    return find_spec("c2pa") is not None


def check(data: bytes, anchors: bytes = b"") -> Verdict | None:
    """What the Content Credentials of a file say; None if it has none.

    Args:
        data: a file of any format that C2PA knows.
        anchors: PEM certificates that are trusted.

    Raises:
        ConfigError: c2pa-python is not installed, or the anchors are no certificates.
    """
    c2pa = _package()
    trust = {"trust": {"user_anchors": anchors.decode("ascii", "replace")}} if anchors else {}
    try:
        context = _context(c2pa, trust)
    except c2pa.C2paError as error:
        raise ConfigError(
            "The trusted certificates cannot be read.",
            value=str(error),
            remedy="Name a PEM file of certificates.",
        ) from error
    try:
        reader = c2pa.Reader.try_create(None, io.BytesIO(data), context=context)
        if reader is None:
            return None
        with reader:
            return _verdict(json.loads(reader.json()))
    except c2pa.C2paError as error:
        return Verdict("broken", "", "", [], [], [str(error)])


def _verdict(store: dict[str, Any]) -> Verdict:
    manifest: dict[str, Any] = store["manifests"][store["active_manifest"]]
    signature: dict[str, str] = manifest.get("signature_info") or {}
    actions = [
        action
        for assertion in manifest.get("assertions", [])
        if assertion["label"].startswith("c2pa.actions")
        for action in assertion["data"]["actions"]
    ]
    return Verdict(
        state=_STATES.get(store.get("validation_state", ""), "broken"),
        signed_by=signature.get("common_name", ""),
        issuer=signature.get("issuer", ""),
        actions=[{k: v for k, v in one.items() if k != "parameters"} for one in actions],
        ingredients=[one.get("format", "") for one in manifest.get("ingredients", [])],
        problems=[one["code"] for one in store.get("validation_status") or []],
    )


def _manifest(origin: Origin) -> dict[str, Any]:
    """What is claimed, as c2pa-rs defines manifests."""
    name, _, digest = origin.model.partition("@")
    action: dict[str, Any] = {
        "action": "c2pa.created" if origin.picture is None else "c2pa.edited",
        "digitalSourceType": provenance.term(origin.source_type),
        "softwareAgent": {"name": name, "version": digest},
        "description": origin.task,
    }
    if origin.picture is not None:
        digest = hashlib.sha256(origin.picture).hexdigest()
        action["parameters"] = {"imagen.upload_sha256": digest}
    return {
        "claim_generator_info": [{"name": "Imagen"}],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
    }


def _context(c2pa: Any, trust: dict[str, Any]) -> Any:
    return c2pa.Context(c2pa.Settings.from_dict({**_OFFLINE, **trust}))


def _package() -> Any:
    """The package c2pa, whose library takes 25 MB.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module("c2pa")
    except ImportError as error:
        raise ConfigError(
            "Content Credentials need the package c2pa-python, which is not installed.",
            value="c2pa-python",
            remedy="Install the extra `c2pa`: pip install '.[c2pa]'.",
        ) from error


def _read(path: Path, name: str) -> bytes:
    try:
        return resolve(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"The file of c2pa.{name} cannot be read: {error.strerror}.",
            value=path,
            remedy=f"Correct c2pa.{name}.",
        ) from error


def _check_pair(settings: C2paSettings, chain: bytes, key: bytes) -> None:
    """Whether a PEM file of certificates begins with that of a private key.

    Raises:
        ConfigError: it does not, or one of them is something else.
    """
    # Comes with c2pa-python, and is needed nowhere else.
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_pem_private_key,
    )
    from cryptography.x509 import load_pem_x509_certificates

    try:
        certificate = load_pem_x509_certificates(chain)[0]
    except ValueError as error:
        raise ConfigError(
            "The file of c2pa.certificates holds no certificate.",
            value=settings.certificates,
            remedy="Name a PEM file: the signing certificate first, then those above it.",
        ) from error
    try:
        private = load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            "The file of c2pa.key holds no private key, or one with a password.",
            value=settings.key,
            remedy="Name a PEM file (PKCS #8) without a password.",
        ) from error
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if certificate.public_key().public_bytes(*form) != private.public_key().public_bytes(*form):
        raise ConfigError(
            "The key of c2pa.key is not that of the first certificate in c2pa.certificates.",
            value=settings.key,
            remedy="Name the key that the certificate was made for.",
        )
