"""The option --serve: which models an application runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from deployments.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cli.console import Output
    from deployments.catalogue import Catalogue
    from deployments.registry import ModelSpec

Serve = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TASK=NAME,…",
        help="Models of a task, the default first; may be repeated. Other tasks keep theirs",
    ),
]


def serve_of(options: list[str] | None) -> dict[str, list[str]]:
    """Names of models by task, from `upscale=a,b` and further options.

    Raises:
        ConfigError: one is malformed.
    """
    serve: dict[str, list[str]] = {}
    for option in options or ():
        task, _, names = option.partition("=")
        found = [name.strip() for name in names.split(",") if name.strip()]
        if not found:
            raise ConfigError(
                "--serve takes a task and names of its models.",
                value=option,
                remedy="Write --serve upscale=upscale-starter, or several names with commas.",
            )
        serve.setdefault(task.strip(), []).extend(found)
    return serve


def say_unaccepted(models: Iterable[ModelSpec], catalogue: Catalogue, output: Output) -> None:
    """Name the models that the registry would refuse to serve, for their licence."""
    for spec in models:
        if not spec.commercial and spec.name not in catalogue.accept_noncommercial:
            output.say(
                f"{spec.name} is planned, but the registry does not accept its licence"
                f" ({spec.licence}).",
                "yellow",
            )
