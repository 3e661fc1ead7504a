"""One run in a process of its own: `python -m benchmarks.store.worker WAY TARGET < job.json`."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.store import loads, pulls
from benchmarks.store.pulls import MB


def work(way: str, job: dict[str, object], target: Path) -> dict[str, float]:
    """Do one run.

    Returns:
        `seconds` as called; `fsync`, until every byte of a pull is on the disk, or `read`, until
        every weight of a load was read; and `peak_mb`, the most resident memory.
    """
    load = way in loads.LOADS
    run = loads.prepare(way, job) if load else pulls.prepare(way, job, target)
    start_s = time.perf_counter()
    result = run()  # kept alive until its weights were read
    seconds = time.perf_counter() - start_s
    rest = partial(loads.read, loads.weights()) if load else partial(_sync_files, target)
    start_s = time.perf_counter()
    rest()
    all_s = seconds + time.perf_counter() - start_s
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB
    del result
    return {"seconds": seconds, "read" if load else "fsync": all_s, "peak_mb": peak_mb}


def _sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


if __name__ == "__main__":
    print(json.dumps(work(sys.argv[1], json.load(sys.stdin), Path(sys.argv[2]))))
