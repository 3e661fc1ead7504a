"""What commands show: tables and JSON on stdout; notes, log lines and progress on stderr."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import threading
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table

if TYPE_CHECKING:
    from deployments.errors import ImagenError
    from deployments.store.events import Event

_LINE_S = 5.0
"""Between two lines of progress."""
_SHORT_WAIT_S = 1.0
"""Shorter waits for other processes are not reported."""
_NO_TERMINAL_COLUMNS = 160
_WIDEST = 1000
Row = dict[str, Any]


class Output:
    """The output of a command: tables or one JSON object on stdout, everything else on stderr.

    Args:
        as_json: whether stdout gets the JSON object instead of tables.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._tables = _console(stderr=False)
        self.notes = _console(stderr=True)

    def say(self, text: str, style: str = "") -> None:
        """Print a line for people, on stderr."""
        self.notes.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def show(self, table: Table | str) -> None:
        """Print a result for people, unless --json is set."""
        if self.as_json:
            return
        if isinstance(table, str):
            self._tables.print(table, markup=False, highlight=False, soft_wrap=True)
            return
        # Names and hashes are never cut on narrow terminals, because people copy them.
        options = self._tables.options.update(width=_WIDEST)
        needed = self._tables.measure(table, options=options).maximum if table.show_header else 0
        self._tables.width = max(needed, self._tables.width)
        self._tables.print(table, markup=False, highlight=False)

    def emit(self, values: Row) -> None:
        """Print a result for programs, if --json is set."""
        if self.as_json:
            sys.stdout.write(json.dumps(values, indent=2) + "\n")

    def fail(self, error: ImagenError, name: str = "") -> None:
        """An error, in red, after the name of what failed."""
        self.say(f"{name}: {error}" if name else str(error), "red")


def make_table(*names: str, title: str | None = None) -> Table:
    """A table with these columns."""
    columns = [Column(name, max_width=24 if name == "Licence" else None) for name in names]
    return Table(*columns, title=title, title_justify="left", box=SIMPLE, pad_edge=False, padding=0)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr)
    if not console.is_terminal:
        # Rich would take 80 columns, but logs of a Job are wider. $COLUMNS still counts.
        console.width = shutil.get_terminal_size((_NO_TERMINAL_COLUMNS, 25)).columns
    return console


class LogLines(logging.Handler):
    """Prints log lines above the progress bars rather than across them."""

    def __init__(self, output: Output) -> None:
        super().__init__(logging.WARNING)
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        style = "red" if record.levelno >= logging.ERROR else "yellow"
        self._output.say(record.getMessage(), style)


class Meter:
    """Shows the store's progress: bars on a terminal, else a line per model every few seconds."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=output.notes,
            disable=not output.notes.is_terminal,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._fetched: dict[str, int] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Meter:
        self._bars.start()
        if not self._output.notes.is_terminal:
            self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._bars.stop()

    def fetched(self, name: str) -> int | None:
        """Bytes that were fetched for a model; None if it was already in the store."""
        return self._fetched.get(name)

    def on_event(self, event: Event) -> None:
        """Listen to the store."""
        name, amount = event.model, int(event.amount)
        with self._lock:
            if event.kind == "miss":
                self._tasks[name] = self._bars.add_task(name, total=amount)
                self._fetched[name] = 0
            elif event.kind == "waited" and event.amount > _SHORT_WAIT_S:
                self._output.say(f"{name}: waited {amount} s for another process that pulled it")
            elif name not in self._tasks:
                return
            elif event.kind == "bytes":
                self._fetched[name] += amount
                self._bars.advance(self._tasks[name], amount)
            elif event.kind == "adopted":
                self._bars.advance(self._tasks[name], amount)
            elif event.kind == "verify_failure":  # it is fetched once more
                self._bars.reset(self._tasks[name])
            elif event.kind == "done":
                task = self._tasks[name]
                self._bars.update(task, completed=self._bars.tasks[task].total)

    def _tick(self) -> None:
        while not self._ended.wait(_LINE_S):
            for task in self._bars.tasks:
                if not task.finished:
                    self._output.say(_line(task))


def _line(task: Task) -> str:
    done, total = decimal(int(task.completed)), decimal(int(task.total or 0))
    speed = f", {decimal(int(task.speed))}/s" if task.speed else ""
    left_s = task.time_remaining
    left = f", {left_s:.0f} s left" if left_s is not None else ""
    return f"{task.description}: {min(task.percentage, 100):.0f} %, {done} of {total}{speed}{left}"
