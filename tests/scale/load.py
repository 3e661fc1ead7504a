"""Clients that keep asking, and what each of them was answered."""

from __future__ import annotations

import io
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import httpx
import numpy as np
from PIL import Image

from deployments.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request.

    Attributes:
        task: it was for.
        sent_s: on `time.monotonic`.
        seconds: until the last byte, or until the client gave up.
        status: HTTP's; None where no answer came.
        retry_after: the header.
        body: of the answer, or the connection's error.
    """

    task: Task
    sent_s: float
    seconds: float
    status: int | None
    retry_after: str | None
    body: bytes

    @property
    def is_picture(self) -> bool:
        return self.status == 200 and Image.open(io.BytesIO(self.body)).width > 0

    @property
    def kind(self) -> str:
        """Its status; of a refusal, what it says too."""
        if self.status == 200:
            return "200"
        return f"{self.status} {self.body.decode(errors='replace')[:300]}"

    @property
    def is_come_back_later(self) -> bool:
        """A refusal that says when to try again."""
        return self.status == 503 and float(self.retry_after or 0) > 0


def photo(seed: int, width_px: int = 128) -> bytes:
    """A small picture that differs by seed; upscaled it is large enough for plasma (100 KB)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    size = (width_px, width_px * 3 // 4)
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def ask(client: httpx.Client, task: Task, seed: int = 0, width_px: int = 128) -> Answer:
    """One request; never raises for what a server does."""
    sent_s = time.monotonic()
    status, retry_after = None, None
    try:
        answer = client.post(task.route, files={"image": ("photo.jpg", photo(seed, width_px))})
        status, retry_after = answer.status_code, answer.headers.get("retry-after")
        body = answer.content
    except httpx.HTTPError as error:
        body = repr(error).encode()
    return Answer(task, sent_s, time.monotonic() - sent_s, status, retry_after, body)


class Load:
    """A context in which clients ask, each again soon after it is answered.

    Args:
        url: of the service.
        clients: how many.
        tasks: one of which each request is for.
        timeout_s: after which a client gives up; longer than any deadline of the service.
        seed: of the choice.
        width_px: of the pictures.
        pause_s: of a client after each answer, which leaves two cores time for what is awaited.
    """

    def __init__(
        self,
        url: str,
        clients: int,
        *,
        tasks: Sequence[Task],
        timeout_s: float,
        seed: int,
        width_px: int = 128,
        pause_s: float = 0.2,
    ) -> None:
        self.answers: list[Answer] = []
        self._url = url
        self._tasks = tasks
        self._timeout_s = timeout_s
        self._width_px = width_px
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep_asking, args=(random.Random(f"{seed} {i}"),))
            for i in range(clients)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the answers that are under way."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def served_since(self, instant_s: float) -> set[Task]:
        """Tasks of requests that were sent since then, and got a picture."""
        return {a.task for a in list(self.answers) if a.sent_s >= instant_s and a.status == 200}

    def summary(self) -> str:
        """How many of which kind, and the longest wait."""
        counts = Counter(answer.kind for answer in self.answers)
        longest_s = max(answer.seconds for answer in self.answers)
        found = "; ".join(f"{count} x {kind}" for kind, count in counts.most_common())
        return f"{len(self.answers)} requests: {found}. The longest took {longest_s:.1f} s."

    def _keep_asking(self, rng: random.Random) -> None:
        with httpx.Client(base_url=self._url, timeout=self._timeout_s, trust_env=False) as client:
            while not self._stop.wait(self._pause_s):
                task = rng.choice(self._tasks)
                self.answers.append(ask(client, task, rng.randrange(1000), self._width_px))
