"""`imagen metadata`: what a picture says about how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cli.console import Output
from cli.ending import ending
from deployments.errors import ConfigError
from deployments.images import read_metadata

_NONE = 3


def metadata(file: Annotated[Path, typer.Argument(help="A picture made by Imagen")]) -> None:
    """Print the model, seed, parameters, notes and source type that a picture carries, as JSON.

    Exit codes: 2 the file cannot be read; 3 it carries no metadata of Imagen.
    """
    output = Output(as_json=False)
    with ending(output):
        found = read_metadata(_read(file))
    if not found:
        output.say(f"{file} carries no metadata of Imagen.", "yellow")
        raise typer.Exit(_NONE)
    output.show(json.dumps(found, indent=2, ensure_ascii=False))


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"The picture cannot be read: {error.strerror}.", value=file, remedy="Name a file."
        ) from error
