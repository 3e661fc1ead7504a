"""What the store reads from the environment: variables that other tools know too."""

from __future__ import annotations

import os

_TRUE = frozenset({"1", "on", "yes", "true"})


def hub_endpoint() -> str:
    """The URL of the hub, without a slash at its end: `HF_ENDPOINT`, else huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_token() -> str | None:
    """The token for gated models: `HF_TOKEN`."""
    return os.environ.get("HF_TOKEN") or None


def hub_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids to ask the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE


def storage_emulator() -> str | None:
    """The URL of an emulator of Google Cloud Storage: `STORAGE_EMULATOR_HOST`."""
    return os.environ.get("STORAGE_EMULATOR_HOST") or None


def s3_over_http() -> bool:
    """Whether `AWS_ALLOW_HTTP` allows an S3 endpoint without TLS; obstore reads the other AWS_*."""
    return os.environ.get("AWS_ALLOW_HTTP", "").lower() in _TRUE


def s3_unsigned() -> bool:
    """Whether `AWS_SKIP_SIGNATURE` asks for public buckets of S3 without credentials."""
    return os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in _TRUE


def s3_endpoint(bucket: str) -> str:
    """The URL of a bucket: below `AWS_ENDPOINT_URL`, else Amazon's in `AWS_REGION`."""
    if given := os.environ.get("AWS_ENDPOINT_URL"):
        return f"{given.rstrip('/')}/{bucket}"
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return f"https://s3.{region}.amazonaws.com/{bucket}"


def ca_file() -> str | None:
    """A file of CA certificates to trust instead of certifi's: `REQUESTS_CA_BUNDLE`.

    `SSL_CERT_FILE` is not here because httpx reads it itself.
    """
    return os.environ.get("REQUESTS_CA_BUNDLE") or None
