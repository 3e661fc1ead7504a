"""Loading a model once, in another process without a network, before others rely on it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from deployments.errors import ModelCorrupt
from deployments.settings import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from deployments.registry import ModelSpec

_TIMEOUT_S = 900


def smoke_load(spec: ModelSpec, folder: Path, verdict: str) -> None:
    """Load a model on the CPU, in another process that cannot reach the network.

    Args:
        spec: of the model.
        folder: its files.
        verdict: what a failure means, after the model's name.

    Raises:
        ModelCorrupt: it does not load.
    """
    work = json.dumps({"spec": spec.model_dump(mode="json"), "folder": str(folder)})
    command = [sys.executable, "-m", "deployments.smoke_load"]
    try:
        done = subprocess.run(  # noqa: S603 - ourselves
            command,
            input=work,
            text=True,
            capture_output=True,
            cwd=ROOT,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _unloadable(spec, verdict, f"not finished after {_TIMEOUT_S} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise _unloadable(spec, verdict, lines[-1])


def _unloadable(spec: ModelSpec, verdict: str, reason: str) -> ModelCorrupt:
    return ModelCorrupt(
        f"{spec.name} {verdict}: {reason}",
        remedy="Correct the entry in the model registry (files, family, variant, times, convert).",
    )
