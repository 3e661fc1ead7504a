"""`imagen metadata`: what a picture says of how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deployments.errors import ImagenError
from deployments.images import read_metadata

console = Console()


def metadata(file: Annotated[Path, typer.Argument(help="A picture made by Imagen")]) -> None:
    """Print the model, seed and parameters a picture carries, as JSON."""
    try:
        found = read_metadata(file.read_bytes())
    except (OSError, ImagenError) as error:
        console.print(f"{file} cannot be read: {error}", style="red", markup=False)
        raise typer.Exit(2) from error
    if not found:
        console.print(f"{file} carries no metadata of Imagen.", style="yellow", markup=False)
        raise typer.Exit(3)
    console.print_json(data=found)
