"""A process that pulls one model and says at which stage it is; made to be killed.

    python -m tests.store.crash ROOT URL MANIFEST STAGE [bytes per second]

It writes `ready` and waits for a line before it begins.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from deployments.store import cache, staging
from deployments.store.manifest import Manifest
from deployments.store.web import WebReader
from tests.store import common

SYNC_S = 0.02
"""A disk that takes its time, so that kills land while a folder is published."""


METHODS = {
    (staging.Staging, "_adopt"): "adopt",
    (staging.Staging, "_fetch_twice"): "fetch",
    (cache.Store, "_publish"): "publish",
    (cache.Store, "_set_ref"): "ref",
    (staging.Staging, "reap"): "reap",
}
"""The methods that begin a stage, and its name."""


def report_stages(file: Path) -> None:
    """Write each stage to a file before it begins."""

    def reporting(method: Any, stage: str) -> Any:
        def report(*arguments: Any) -> Any:
            file.write_text(stage)
            return method(*arguments)

        return report

    for (owner, name), stage in METHODS.items():
        setattr(owner, name, reporting(getattr(owner, name), stage))


def main() -> None:
    root, url, manifest_path, stage, *rate = sys.argv[1:]
    manifest = Manifest.model_validate_json(Path(manifest_path).read_bytes())
    sync = cache.sync_path

    def slow(path: Path | str) -> None:
        time.sleep(SYNC_S)
        sync(path)

    if rate:
        cache.sync_path = staging.sync_path = slow
    settings = common.settings_of(Path(root), max_bytes_per_s=float(rate[0]) if rate else None)
    store = cache.Store(settings)
    report_stages(Path(stage))
    source = WebReader(url)
    print("ready", flush=True)
    sys.stdin.readline()
    Path(stage).write_text("lock")
    store.pull(manifest, {f.path: (source, f.path) for f in manifest.files})


if __name__ == "__main__":
    main()
