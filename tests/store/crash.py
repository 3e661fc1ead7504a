"""A process that pulls one model and reports its stages; made to be killed.

    python -m tests.store.crash ROOT URL MANIFEST STAGE_FILE [--rate BYTES_PER_S] [--stop-at STAGE]

It writes `ready` and waits for a line before it begins. At the stage it is to stop at, it stops.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path
from typing import Any

from deployments.store import cache, staging
from deployments.store.manifest import Manifest
from deployments.store.web import WebReader
from tests.store import common

SYNC_S = 0.02
"""A slow disk, so that kills land while a folder is published."""
STAGES = {
    "adopt": (staging.Staging, "_adopt"),
    "fetch": (staging.Staging, "_fetch_twice"),
    "publish": (cache.Store, "_publish"),
    "sync": (cache, "sync_path"),
    "reap": (staging.Staging, "reap"),
    "ref": (cache.Store, "_set_ref"),
}
"""In order: the function that begins each stage."""


def report_stages(file: Path, stop_at: str | None) -> None:
    """Write each stage to a file before it begins; never begin the one to stop at."""

    def reporting(function: Any, stage: str) -> Any:
        def report(*arguments: Any) -> Any:
            new = file.with_suffix(".new")
            new.write_text(stage)
            new.replace(file)
            if stage == stop_at:
                threading.Event().wait()
            return function(*arguments)

        return report

    for stage, (owner, name) in STAGES.items():
        setattr(owner, name, reporting(getattr(owner, name), stage))


def slow_down_syncs() -> None:
    sync = cache.sync_path

    def slow(path: Path | str) -> None:
        time.sleep(SYNC_S)
        sync(path)

    cache.sync_path = staging.sync_path = slow


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("root", "url", "manifest", "stage"):
        parser.add_argument(name)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--stop-at", choices=STAGES)
    given = parser.parse_args()
    manifest = Manifest.model_validate_json(Path(given.manifest).read_bytes())
    if given.rate:
        slow_down_syncs()
    report_stages(Path(given.stage), given.stop_at)
    store = common.store_of(Path(given.root), max_bytes_per_s=given.rate)
    source = WebReader(given.url)
    print("ready", flush=True)
    sys.stdin.readline()
    Path(given.stage).write_text("lock")
    store.pull(manifest, {f.path: (source, f.path) for f in manifest.files})


if __name__ == "__main__":
    main()
