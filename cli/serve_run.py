"""`serve run` in a process of its own, because the `imagen` command runs without Ray."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ray
from ray.serve.scripts import cli


def main() -> None:
    """Serve a config file, and write the dashboard's address to a file.

    The arguments are the paths of both files.
    """
    config, dashboard = sys.argv[1:]
    # A Ray of its own: `serve run` would join a running one, and replace its application.
    context: Any = ray.init("local", namespace="serve")
    Path(dashboard).write_text(context.dashboard_url or "", encoding="utf-8")
    cli(["run", config])


if __name__ == "__main__":
    main()
