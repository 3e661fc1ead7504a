"""Where benchmarks print, and where they write their results."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from deployments.settings import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS: Final = ROOT / "benchmarks/results"
# A table that goes to a file or a pipe is not cut to 80 columns.
console = Console(width=None if sys.stdout.isatty() else 130)


def make_table(title: str, names: Sequence[str], figures: Sequence[str]) -> Table:
    """An empty table.

    Args:
        title: above it.
        names: columns of text, on the left.
        figures: columns of numbers, on the right.
    """
    table = Table(title=title)
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right")
    return table


def write_result(name: str, versions: dict[str, Any], **measured: Any) -> None:
    """Write `benchmarks/results/<name>-<date>.json` and print its path.

    Args:
        name: of the benchmark.
        versions: of the packages that its figures depend on.
        measured: what was measured.
    """
    now = datetime.now(UTC)
    facts = machine.describe() | {"load": machine.load_average(), "versions": versions}
    document = {"date": now.isoformat(timespec="seconds"), "machine": facts, **measured}
    path = RESULTS / f"{name}-{now.date().isoformat()}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console.print(f"{facts['processor']}, {facts['cores']} cores, load {facts['load']:.1f}")
    console.print(f"Results: {path}")
