"""Doing the same for several models: one row for each, and the exit code of the first failure."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import typer

from cli.ending import INTERRUPTED, error_row
from deployments.errors import SetupError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cli.console import Row
    from cli.models.session import Session
    from deployments.registry import ArtefactSpec


def for_each(
    session: Session,
    entries: Sequence[ArtefactSpec],
    work: Callable[[ArtefactSpec], Row],
    at_once: int = 1,
) -> list[Row]:
    """Call `work` for each entry; as `for_each_name`."""
    by_name = {entry.name: entry for entry in entries}
    return for_each_name(session, list(by_name), lambda name: work(by_name[name]), at_once)


def for_each_name(
    session: Session, names: Sequence[str], work: Callable[[str], Row], at_once: int = 1
) -> list[Row]:
    """Call `work` for each name, and go on after failures.

    Args:
        session: of the command.
        names: of models.
        work: returns a row, or raises SetupError.
        at_once: how many to work on at a time.

    Returns:
        A row for each name; a failure's has the status `failed` and an `error`.
    """

    def one(name: str) -> Row:
        try:
            return {"name": name} | work(name)
        except SetupError as error:
            session.output.fail(error, name)
            return {"name": name, "status": "failed", "error": error_row(error)}

    with ThreadPoolExecutor(at_once, thread_name_prefix="model") as pool:
        tasks = [pool.submit(one, name) for name in names]
        try:
            return [task.result() for task in tasks]
        except KeyboardInterrupt:
            # At once, without waiting for downloads of other threads: the store never holds half a
            # model, whenever a pull ends.
            session.output.notes.show_cursor()
            session.output.say("\nStopped. The next pull continues where this one ended.", "yellow")
            os._exit(INTERRUPTED)


def finish(session: Session, rows: Sequence[Row], more: Row | None = None) -> None:
    """Report, and exit with the code of the first failure."""
    failed = [row for row in rows if "error" in row]
    code = failed[0]["error"]["exit_code"] if failed else 0
    session.output.emit({"models": rows, "exit_code": code} | (more or {}))
    if failed and len(rows) > 1:
        session.output.say(f"{len(failed)} of {len(rows)} failed.", "red")
    raise typer.Exit(code)
