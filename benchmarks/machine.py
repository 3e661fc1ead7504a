"""The machine and the packages that a benchmark ran with, as every result file states them.

Uses the standard library alone, because `benchmarks.gpu` runs where little else is installed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_VERSIONS = (
    "import importlib.metadata as m, json, sys; have = {d.name.lower(): d.version for d in "
    "m.distributions()}; print(json.dumps({n: have[n] for n in sys.argv[1:] if n in have}))"
)


def describe() -> dict[str, Any]:
    """The processor, its cores that this process may use, the operating system and Python."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def processor() -> str:
    """The processor's name as Linux gives it; elsewhere its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def load_average() -> float:
    """The load average of the last minute."""
    return os.getloadavg()[0]


def nvidia_smi(field: str) -> str | None:
    """A field of `nvidia-smi --query-gpu` of the first GPU, without its unit; None if it fails."""
    return first_line("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits")


def first_line(*command: str) -> str | None:
    """The first line that a command prints; None if it prints nothing, fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def versions(packages: Sequence[str], python: Path | None = None) -> dict[str, str]:
    """The versions of those packages that are installed.

    Args:
        packages: their names on PyPI, in lower case.
        python: the interpreter of another environment; None asks this one. An interpreter that
            does not exist has no packages.
    """
    if python is None:
        have = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
        return {name: have[name] for name in packages if name in have}
    if not python.exists():
        return {}
    command = [str(python), "-c", _VERSIONS, *packages]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
