"""`serve run` for `imagen run`: it tells where Ray's dashboard is, which is not always at 8265.

A module of its own, because the command itself starts without Ray.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ray
from ray.serve.scripts import cli


def main() -> None:
    """Serve the config file that the first argument names; the second is the file to write to."""
    config, told = sys.argv[1:]
    # A Ray of its own: it would else join one that runs here, and replace what that serves.
    context: Any = ray.init("local", namespace="serve")
    Path(told).write_text(context.dashboard_url or "", encoding="utf-8")
    cli(["run", config])


if __name__ == "__main__":
    main()
