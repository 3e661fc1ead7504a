"""Compiles workloads in processes of their own, all at once, and loads what they compiled.

python -m benchmarks.gpu.compiling WORKLOAD FILE
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


def compile_all(names: Sequence[str], timeout_s: float) -> dict[str, Values]:
    """Seconds and bytes of each workload's artefacts, which this process has then loaded."""
    until_s = time.monotonic() + timeout_s
    # What a stopped process leaves may still be written to.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        started = {name: _start(name, Path(folder) / name) for name in names}
        try:
            return {
                f"{name}/compiling": _found(process, Path(folder) / name, until_s)
                for name, process in started.items()
            }
        finally:
            for process in started.values():
                if process.poll() is None:
                    process.kill()
                process.wait()


def _found(process: subprocess.Popen[bytes], folder: Path, until_s: float) -> Values:
    """What a process has compiled, loaded into this one."""
    try:
        failed = process.wait(max(until_s - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        return {"why": "time", "again": True}
    if failed:
        return {"why": "failed", "again": True}
    torch.compiler.load_cache_artifacts((folder / "artefacts").read_bytes())
    return json.loads((folder / "cell").read_text(encoding="utf-8"))


def _start(name: str, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir()
    caches = {f"{one}_CACHE_DIR": str(folder / one) for one in ("TORCHINDUCTOR", "TRITON")}
    command = [sys.executable, "-m", "benchmarks.gpu.compiling", name, str(folder)]
    return subprocess.Popen(command, env={**os.environ, **caches})


def main(name: str, folder: Path) -> None:
    # Imported here, because the table of results needs no systems.
    from benchmarks.gpu.options import FULL
    from benchmarks.gpu.systems import Ours, quiet

    quiet()
    system = Ours(build(WORKLOADS[name], "cuda"), FULL)
    system.prepare()
    artefacts, _ = torch.compiler.save_cache_artifacts() or (b"", None)
    (folder / "artefacts").write_bytes(artefacts)
    cell = {"seconds": system.prepared_s, "bytes": len(artefacts)}
    (folder / "cell").write_text(json.dumps(cell), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
