"""An application under attack: where it is, how it is, and what it logged."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import psutil

from deployments.settings import KeyLimits
from deployments.tasks import Task
from serve_app.access.editing import create_key, revoke_key
from tests.jobs.application import picture
from tests.jobs.redis_server import RedisServer

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

_NO_LIMITS = KeyLimits(
    requests_per_s=None, pictures=None, megapixels_per_minute=None, queue_share=1, wait_share=1
)
_TIGHT = KeyLimits(requests_per_s=0.5, pictures=1, megapixels_per_minute=1, queue_share=0.001)
_END_S = 20
_ALARMS = ("Traceback", "Unexpected error", "ERROR", "CRITICAL", "never awaited")


@dataclass(frozen=True)
class Target:
    """A running application.

    Attributes:
        url: of it.
        tokens: of API keys: `valid`, `tight` (with low limits), `revoked`; empty without auth.
        document: its OpenAPI document.
    """

    url: str
    tokens: dict[str, str]
    document: dict[str, Any]
    _process: subprocess.Popen[str]
    _log: Path

    @property
    def headers(self) -> dict[str, str]:
        """What a client with a good key sends."""
        return {"Authorization": f"Bearer {self.tokens['valid']}"} if self.tokens else {}

    @property
    def held_mb(self) -> float:
        """Memory that the process has to itself."""
        return psutil.Process(self._process.pid).memory_info().rss / 2**20

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def alarms(self) -> list[str]:
        """Lines of the log that nobody should ever read."""
        return [line for line in self.log().splitlines() if any(a in line for a in _ALARMS)]

    def check_service(self) -> None:
        """It still does what it should: a picture in the same call, and a job to its end."""
        route, file = Task.COMIC.route, {"image": ("photo.png", picture(0))}
        with httpx.Client(
            base_url=self.url, headers=self.headers, timeout=_END_S, trust_env=False
        ) as client:
            answer = client.post(route, files=file, data={"steps": "2"})
            assert answer.status_code == 200, answer.text
            answer = client.post(route, files=file, headers={"Prefer": "respond-async"})
            assert answer.status_code == 202, answer.text
            until_s = time.monotonic() + _END_S
            while (job := client.get(answer.headers["location"]).json())["status"] != "completed":
                assert time.monotonic() < until_s, job
                time.sleep(0.05)
            answer = client.get(job["results"][0]["url"], follow_redirects=True)
            assert answer.headers["content-type"] == "image/png"


@contextmanager
def target(folder: Path, *, keys: bool) -> Generator[Target]:
    """An application with its own Redis, below a folder.

    Args:
        folder: of all its data.
        keys: whether it asks for API keys.
    """
    tokens = _make_keys(folder / "keys.yaml") if keys else {}
    log = folder / "log"
    with RedisServer(folder / "redis") as redis, log.open("w") as errors:
        words = [redis.url, str(folder / "jobs"), *([str(folder / "keys.yaml")] if keys else [])]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.server", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdin
        assert process.stdout
        try:
            url = process.stdout.readline().strip()
            assert url, log.read_text()
            document = httpx.get(f"{url}/openapi.json", trust_env=False).json()
            yield Target(url, tokens, document, process, log)
        finally:
            process.stdin.close()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def _make_keys(path: Path) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for name in ("valid", "tight", "revoked"):
        key, tokens[name] = create_key(path, name, _TIGHT if name == "tight" else _NO_LIMITS)
    revoke_key(path, key.id)
    return tokens
