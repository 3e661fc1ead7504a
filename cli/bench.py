"""`imagen bench`: sends a load to a server and reports what it measured.

The report goes to stdout, everything else to stderr.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.console import Output
from cli.ending import INTERRUPTED, ending
from deployments.errors import ConfigError

if TYPE_CHECKING:
    from benchmarks.load import Plan, Report

_NOTHING_SUCCEEDED = 1
Paths = Annotated[
    list[str] | None,
    typer.Option("--path", metavar="TASK=PATH", help="The server's path of a task; repeatable"),
]


def bench(
    plan: Annotated[Path, typer.Argument(help="A YAML file, as in benchmarks/plans")],
    url: Annotated[
        str | None, typer.Option(help="The server's address; default: the plan's")
    ] = None,
    protocol: Annotated[
        Literal["multipart", "raw", "kserve"] | None, typer.Option(help="Default: the plan's")
    ] = None,
    paths: Paths = None,
    seed: Annotated[int | None, typer.Option(help="Default: the plan's")] = None,
    key: Annotated[
        str | None,
        typer.Option(envvar="IMAGEN_KEY", show_envvar=True, help="An API key; not in the report"),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a PNG here; needs matplotlib")] = None,
    unloaded: Annotated[
        Path | None, typer.Option(help="A report whose unloaded latencies to use")
    ] = None,
    price_per_gpu_hour: Annotated[
        float | None, typer.Option(min=0, help="In USD, for the cost of 1,000 images")
    ] = None,
) -> None:
    """Send the requests of a plan to a server, and report latencies, refusals and batches.

    Exit codes: 1 no request succeeded; 2 the plan or an option is wrong; 3 no server at the
    address; 130 stopped early.
    """
    output = Output(as_json=False)
    with ending(output):
        chosen = _plan(plan, url=url, protocol=protocol, paths=paths, seed=seed)
        _check_files(json_file, plot)
        report = _run(chosen, unloaded, price_per_gpu_hour, key, output)
        _write(report, output, json_file, plot)
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not report.succeeded:
        raise typer.Exit(_NOTHING_SUCCEEDED)


# Functions import benchmarks, so that other commands start without aiohttp.


def _plan(path: Path, *, paths: list[str] | None, seed: int | None, **target: Any) -> Plan:
    from benchmarks.load import load_plan

    plan = load_plan(path)
    given = {key: value for key, value in target.items() if value is not None}
    if paths:
        given["paths"] = plan.target.paths | dict(_pair(text) for text in paths)
    return plan.change(target=given, **({} if seed is None else {"seed": seed}))


def _pair(text: str) -> tuple[str, str]:
    task, equals, path = text.partition("=")
    if not equals:
        raise ConfigError(
            "--path needs a task and its path.", value=text, remedy="Write --path comic=/v1/comic."
        )
    return task, path


def _check_files(json_file: Path | None, plot: Path | None) -> None:
    """Raise ConfigError before a long run whose report could not be written."""
    from cli import bench_tables as show

    for file in (json_file, plot):
        if file and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise ConfigError(
                "The report cannot be written there.",
                value=file,
                remedy="Name a file in a folder that exists.",
            )
    if plot:
        show.check_plot()


def _run(
    plan: Plan, unloaded: Path | None, price: float | None, key: str | None, output: Output
) -> Report:
    from benchmarks.load import run, unloaded_of

    unloaded_s = unloaded_of(unloaded, plan) if unloaded else None
    # A status line is shown on a terminal only.
    with output.notes.status(f"{plan.name}: starting") as status:
        return run(
            plan,
            unloaded_s=unloaded_s,
            usd_per_gpu_hour=price,
            api_key=key,
            progress=lambda phase, done: status.update(
                f"{plan.name}: {phase}, {done} done; Ctrl-C stops and reports"
            ),
        )


def _write(report: Report, output: Output, json_file: Path | None, plot: Path | None) -> None:
    from cli import bench_tables as show

    for part in (show.title(report), *show.tables(report), *show.lines(report)):
        output.show(part)
    try:
        if json_file:
            json_file.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
            output.say(f"wrote {json_file}")
        if plot:
            show.plot(report, plot)
            output.say(f"wrote {plot}")
    except OSError as error:
        raise ConfigError(
            "The report cannot be written.", value=error.filename, remedy="Name another file."
        ) from error
