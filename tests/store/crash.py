"""A process that pulls one model and says at which stage it is; made to be killed.

    python -m tests.store.crash ROOT URL MANIFEST STAGE [bytes per second]

It writes `ready` and waits for a line before it begins.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from deployments.store import cache
from deployments.store.manifest import Manifest
from deployments.store.sources import WebSource
from tests.store import common

SYNC_S = 0.02
"""A disk that takes its time, so that kills land while a folder is published."""


class Told(cache.Store):
    """Writes its stage to a file before it goes on."""

    stage: Path

    def _adopt(self, *arguments: Any) -> Any:
        return self._at("adopt", super()._adopt, *arguments)

    def _fetch_twice(self, *arguments: Any) -> Any:
        return self._at("fetch", super()._fetch_twice, *arguments)

    def _publish(self, *arguments: Any) -> Any:
        return self._at("publish", super()._publish, *arguments)

    def _set_ref(self, *arguments: Any) -> Any:
        return self._at("ref", super()._set_ref, *arguments)

    def _reap(self, *arguments: Any) -> Any:
        return self._at("reap", super()._reap, *arguments)

    def _at(self, stage: str, work: Any, *arguments: Any) -> Any:
        self.stage.write_text(stage)
        return work(*arguments)


def main() -> None:
    root, url, manifest_path, stage, *rate = sys.argv[1:]
    manifest = Manifest.model_validate_json(Path(manifest_path).read_bytes())
    sync = cache.sync_path

    def slow(path: Path | str) -> None:
        time.sleep(SYNC_S)
        sync(path)

    if rate:
        cache.sync_path = slow
    store = Told(common.settings_of(Path(root), max_bytes_per_s=float(rate[0]) if rate else None))
    store.stage = Path(stage)
    source = WebSource(url)
    print("ready", flush=True)
    sys.stdin.readline()
    store.stage.write_text("lock")
    store.pull(manifest, {f.path: (source, f.path) for f in manifest.files})


if __name__ == "__main__":
    main()
