"""Plain files over HTTP."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.servers.faults import Faults
from benchmarks.servers.listener import Answer, Loopback, RefusedError, Request, file_answer


class FileServer(Loopback):
    """Serves the files under `root`, with Range, If-Range and If-None-Match.

    Args:
        root: the folder.
        ranges: whether to honour Range; without, every GET gets everything.
        faults: a plan to share with another server.
    """

    def __init__(self, root: Path, *, ranges: bool = True, faults: Faults | None = None) -> None:
        super().__init__(faults)
        self.root = root.resolve()
        self.ranges = ranges
        self.url = ""

    def start(self) -> None:
        self.url = self.listen(self._answer)

    def _answer(self, request: Request) -> Answer:
        if request.method not in ("GET", "HEAD"):
            return Answer(405)
        path = (self.root / request.path.lstrip("/")).resolve()
        if not path.is_relative_to(self.root) or not path.is_file():
            raise RefusedError(Answer(404, b"no such file"))
        file = path.open("rb")
        stat = os.fstat(file.fileno())
        etag = f'"{stat.st_ino:x}-{stat.st_size:x}-{stat.st_mtime_ns:x}"'
        if request.headers.get("If-None-Match") == etag:
            file.close()
            return Answer(304, headers={"ETag": etag})
        return file_answer(request, file, {"ETag": etag}, self.ranges)
