"""Where benchmarks print, and where they write their results."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console

from deployments.settings import ROOT

if TYPE_CHECKING:
    from pathlib import Path

RESULTS: Final = ROOT / "benchmarks/results"
# A table that goes to a file or a pipe is not cut to 80 columns.
console = Console(width=None if sys.stdout.isatty() else 130)


def today() -> str:
    """The date in UTC, as in names of result files."""
    return datetime.now(UTC).date().isoformat()


def write_result(name: str, document: dict[str, Any], path: Path | None = None) -> None:
    """Write a result file and print its path.

    Args:
        name: the benchmark; it names the file when no path is given.
        document: what was measured.
        path: where to write; None writes `benchmarks/results/<name>-<date>.json`.
    """
    path = path or RESULTS / f"{name}-{today()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console.print(f"Results: {path}")
