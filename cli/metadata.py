"""`imagen metadata`: what a picture says about how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cli.console import Output
from cli.ending import ending
from deployments.credentials import Verdict, can_check, check
from deployments.errors import ConfigError
from deployments.images import read_metadata

_NONE = 3
_BROKEN = 4
_MARK = b"c2pa"
"""In every file with Content Credentials."""


def metadata(
    file: Annotated[Path, typer.Argument(help="A picture made by Imagen")],
    trust: Annotated[
        Path | None, typer.Option(help="PEM file of certificates that vouch for signers")
    ] = None,
) -> None:
    """Print what a picture carries, as JSON: model, seed, parameters, notes, source type, and
    Content Credentials with whether they hold: valid, untrusted or broken.

    Exit codes: 2 the file cannot be read; 3 it carries none of them; 4 its Content Credentials are
    broken.
    """
    output = Output(as_json=False)
    with ending(output):
        data = _read(file)
        found = read_metadata(data)
        verdict = _verdict(data, trust)
    if verdict is not None:
        found["content_credentials"] = verdict._asdict()
    elif _MARK in data and not can_check():
        found["content_credentials"] = (
            "not read: they need the extra `c2pa` (pip install '.[c2pa]')"
        )
    if not found:
        output.say(f"{file} carries no metadata of Imagen.", "yellow")
        raise typer.Exit(_NONE)
    output.show(json.dumps(found, indent=2, ensure_ascii=False))
    if verdict is not None and verdict.state == "broken":
        raise typer.Exit(_BROKEN)


def _verdict(data: bytes, trust: Path | None) -> Verdict | None:
    if trust is None and not can_check():
        return None
    return check(data, b"" if trust is None else _read(trust))


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"The picture cannot be read: {error.strerror}.", value=file, remedy="Name a file."
        ) from error
