"""The one ending of every command: our errors become a red message and an exit code."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from cli.console import LogLines
from deployments.errors import ImagenError, SetupError

if TYPE_CHECKING:
    from collections.abc import Generator

    from cli.console import Output, Row

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
_USAGE = 2


@contextmanager
def ending(output: Output) -> Generator[None]:
    """A context for the body of a command.

    An ImagenError is printed in red on stderr and, with --json, as an object on stdout. It ends the
    command with its exit code, or 2 if it is no SetupError. Ctrl-C ends the command with 130.
    Meanwhile, log lines of Imagen appear on stderr.
    """
    handler = LogLines(output)
    logger = logging.getLogger("ray.serve.imagen")
    logger.addHandler(handler)
    try:
        yield
    except ImagenError as error:
        output.fail(error)
        output.emit({"error": error_row(error), "exit_code": exit_code(error)})
        raise typer.Exit(exit_code(error)) from error
    except KeyboardInterrupt as error:
        output.say("Stopped.", "yellow")
        raise typer.Exit(INTERRUPTED) from error
    finally:
        logger.removeHandler(handler)


def exit_code(error: ImagenError) -> int:
    """The exit code of a command that ends with this error."""
    return error.exit_code if isinstance(error, SetupError) else _USAGE


def error_row(error: ImagenError) -> Row:
    """An error as --json shows it."""
    return {
        "code": error.code,
        "exit_code": exit_code(error),
        "message": error.message,
        "value": error.value,
        "remedy": error.remedy,
    }
