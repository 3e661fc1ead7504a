"""`serve run` in a process of its own, because the `imagen` command runs without Ray."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ray
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema
from ray.serve.scripts import cli

from deployments.settings import file_fault


def main() -> None:
    """Serve a config file, and write the dashboard's address to a file.

    The arguments are the paths of both files.
    """
    config, dashboard = sys.argv[1:]
    check(Path(config))
    # A Ray of its own: `serve run` would join a running one, and replace its application.
    context: Any = ray.init("local", namespace="serve")
    Path(dashboard).write_text(context.dashboard_url or "", encoding="utf-8")
    cli(["run", config])


def check(config: Path) -> None:
    """End with a message, before Ray starts, if Serve cannot read the file."""
    try:
        ServeDeploySchema.model_validate(yaml.safe_load(config.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        wrong = isinstance(error, ValidationError)
        reasons = error.errors() if wrong else [{"msg": file_fault(error)}]
        sys.exit(
            f"{config} is no Serve config: "
            + "; ".join(
                f"{'.'.join(map(str, one.get('loc', ())))} {one['msg']}".strip() for one in reasons
            )
        )


if __name__ == "__main__":
    main()
