"""Compiles workloads in processes of their own, all at once, and loads what they compiled.

python -m benchmarks.gpu.compiling WORKLOAD FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.workloads import WORKLOADS, build

if TYPE_CHECKING:
    from collections.abc import Sequence

    Values = dict[str, Any]

COMPILED = ("enhance-1024", "comic-512")
"""Workloads whose compiled system is measured, in order of importance."""


def compile_all(
    names: Sequence[str], timeout_s: float, folder: Path | None = None
) -> dict[str, Values]:
    """Seconds and bytes of each workload's artefacts, which this process has then loaded.

    Args:
        names: of the workloads.
        timeout_s: what is not compiled by then is left out.
        folder: keeps the artefacts, and those that are there already are not compiled again.
    """
    until_s = time.monotonic() + timeout_s
    # What a stopped process leaves may still be written to.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folders = {name: (folder or Path(temporary)) / name for name in names}
        started = {name: _start(name, path) for name, path in folders.items() if not _ready(path)}
        try:
            return {
                f"{name}/compiling": _found(started.get(name), path, until_s)
                for name, path in folders.items()
            }
        finally:
            for process in started.values():
                if process.poll() is None:
                    process.kill()
                process.wait()


def _ready(folder: Path) -> bool:
    return (folder / "cell").exists()


def _found(process: subprocess.Popen[bytes] | None, folder: Path, until_s: float) -> Values:
    """What was compiled, by a process if there is one, loaded into this one."""
    if process is not None:
        try:
            failed = process.wait(max(until_s - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            return {"why": "time", "again": True}
        if failed:
            return {"why": "failed", "again": True}
    torch.compiler.load_cache_artifacts((folder / "artefacts").read_bytes())
    return json.loads((folder / "cell").read_text(encoding="utf-8"))


def _start(name: str, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.gpu.compiling", name, str(folder)]
    return subprocess.Popen(command)


def main(name: str, folder: Path) -> None:
    # Imported here, because the table of results needs no systems.
    from benchmarks.gpu.options import FULL
    from benchmarks.gpu.systems import Ours, quiet

    folder.mkdir(parents=True, exist_ok=True)
    for one in ("TORCHINDUCTOR", "TRITON"):
        os.environ[f"{one}_CACHE_DIR"] = str(folder / one)
    quiet()
    system = Ours(build(WORKLOADS[name], "cuda"), FULL)
    system.prepare()
    artefacts, _ = torch.compiler.save_cache_artifacts() or (b"", None)
    (folder / "artefacts").write_bytes(artefacts)
    cell = {"seconds": system.prepared_s, "bytes": len(artefacts)}
    (folder / "cell").write_text(json.dumps(cell), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
