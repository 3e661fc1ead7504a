"""`imagen torture`: sends small odd files to a server, and says which come back right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import Output, make_table
from cli.ending import ending
from deployments.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.torture.judge import Verdict

_WRONG = 1


def torture(
    url: Annotated[str, typer.Argument(help="The server's address")],
    paths: Annotated[
        list[str] | None,
        typer.Option("--path", metavar="TASK=PATH", help="The server's path of a task; repeatable"),
    ] = None,
    field: Annotated[str, typer.Option(help="Of the form, that holds the picture")] = "image",
    key: Annotated[
        str, typer.Option(envvar="IMAGEN_KEY", show_envvar=True, help="An API key")
    ] = "",
    pictures_only: Annotated[
        bool, typer.Option(help="Count pictures alone: another service has no notes")
    ] = False,
) -> None:
    """Send the torture set to a server, and list what comes back wrong or without its note.

    Exit codes: 1 something is wrong; 2 an option is wrong; 3 no server at the address.
    """
    output = Output(as_json=False)
    with ending(output):
        from benchmarks.torture.cases import CASES
        from benchmarks.torture.judge import Target, judge

        target = Target(url, _paths(paths or []), field, key)
        verdicts = list(judge(target, CASES))
    wrong = [one for one in verdicts if one.fault]
    untold = [one for one in verdicts if one.is_told is False and not pictures_only]
    output.show(_table([one for one in verdicts if one in wrong or one in untold]))
    asked = sum(one.is_told is not None for one in verdicts)
    output.show(f"{len(verdicts) - len(wrong)} of {len(verdicts)} answers are right.")
    if not pictures_only:
        output.show(f"{asked - len(untold)} of {asked} losses are told.")
    if wrong or untold:
        raise typer.Exit(_WRONG)


def _table(verdicts: list[Verdict]) -> Table:
    table = make_table("Case", "Wrong", "Note missing")
    for one in verdicts:
        table.add_row(one.case.name, one.fault, one.case.note if one.is_told is False else "")
    return table


def _paths(options: list[str]) -> dict[str, str]:
    found = {task: path for task, _, path in (option.partition("=") for option in options)}
    for task, path in found.items():
        if not path.startswith("/"):
            raise ConfigError(
                "A path is given as TASK=PATH.",
                value=f"{task}={path}",
                remedy="PATH begins with /.",
            )
    return found
