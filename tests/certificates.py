"""A certificate authority for one test, and signing certificates as C2PA wants them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from pathlib import Path

_USES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


class Certificates(NamedTuple):
    """Files in PEM: the signer's chain, its key, and the root that vouches for it."""

    chain: Path
    key: Path
    root: Path


def make_certificates(folder: Path, days: int = 30) -> Certificates:
    """A root, and a certificate that it has signed, which is valid from yesterday on.

    Args:
        folder: gets the files.
        days: until it ends; below 0 it has ended.
    """
    authority, signer = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = _begun("Test root", "Test root", authority.public_key(), 30)
    root = root.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    root = root.add_extension(_use("key_cert_sign"), critical=True)
    leaf = _begun("Test signer", "Test root", signer.public_key(), days)
    leaf = leaf.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    leaf = leaf.add_extension(_use("digital_signature"), critical=True)
    purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
    leaf = leaf.add_extension(purpose, critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    leaf = leaf.add_extension(issuer, critical=False)
    roots = root.sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM)
    chain = leaf.sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM)
    key = signer.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    folder.mkdir(parents=True, exist_ok=True)
    files = Certificates(folder / "chain.pem", folder / "key.pem", folder / "root.pem")
    for file, data in zip(files, (chain, key, roots), strict=True):
        file.write_bytes(data)
    return files


def _begun(
    name: str, issuer: str, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=60))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(name: str) -> x509.Name:
    attributes = {NameOID.COMMON_NAME: name, NameOID.ORGANIZATION_NAME: "Test house"}
    return x509.Name([x509.NameAttribute(kind, text) for kind, text in attributes.items()])


def _use(name: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{use: use == name for use in _USES})
