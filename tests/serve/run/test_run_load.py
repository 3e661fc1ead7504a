"""`imagen run` under large pictures, clients who leave, and more requests than it can take."""

from __future__ import annotations

import asyncio
import io
import re
import socket
import time
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.serve.test_http import ROUTES, is_problem, jpeg, opened, post

if TYPE_CHECKING:
    from tests.serve.run.conftest import Server

pytestmark = pytest.mark.slow
MB = 10**6
ONE_SIZE = [task for task in ROUTES if task != "upscale"]


@pytest.fixture(scope="module")
def server(pair: list[Server]) -> str:
    """The one whose requests have a short deadline."""
    return pair[0].address


@cache
def phone_photo() -> bytes:
    """4000 x 3000 px, a JPEG of some 6 MB, as phones take them."""
    grain = np.random.default_rng(0).normal(0, 20, (3000, 4000, 3))
    smooth = np.linspace(40, 215, 4000)[None, :, None]
    file = io.BytesIO()
    Image.fromarray((grain + smooth).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    assert 5 * MB < file.tell() < 8 * MB
    return file.getvalue()


@cache
def noise_png(width: int, height: int) -> bytes:
    """3 bytes a pixel: noise cannot be compressed."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG", compress_level=0)
    return file.getvalue()


def quick(task: str) -> dict[str, str]:
    """Not in tiles, which take more than this server's deadline."""
    return {} if task == "background" else {"detail": "working"}


@pytest.mark.parametrize("task", ONE_SIZE)
def test_a_phone_photo_comes_back_at_its_own_size(server: str, task: str) -> None:
    assert opened(post(server, task, phone_photo(), **quick(task))).size == (4000, 3000)


@pytest.mark.parametrize("task", ONE_SIZE)
def test_a_png_of_30_mb_comes_back(server: str, task: str) -> None:
    upload = noise_png(3700, 2700)
    assert 29 * MB < len(upload) < 31 * MB
    assert opened(post(server, task, upload, **quick(task))).size == (3700, 2700)


def test_the_largest_result_comes_back(server: str) -> None:
    response = post(server, "upscale", noise_png(1024, 1024))
    assert opened(response).size == (4096, 4096)
    assert len(response.content) > 20 * MB


def test_what_is_too_large_is_refused_with_the_limit(server: str) -> None:
    for upload in (phone_photo(), noise_png(3700, 2700)):
        refused = post(server, "upscale", upload)
        assert is_problem(refused, 413)
        assert "scale=2 at most" in refused.json()["remedy"]
    assert is_problem(post(server, "comic", noise_png(3500, 3300)), 413)


def leave(address: str, body: bytes, headers: str = "", after_s: float = 0.5) -> None:
    """Send a whole request for a slow picture, and hang up without its answer."""
    part = '--b\r\nContent-Disposition: form-data; name="{}"\r\n\r\n'
    form = (part.format("steps") + "100\r\n" + part.format("image")).encode()
    form += body + b"\r\n--b--\r\n"
    host = urlsplit(address)
    with socket.create_connection((host.hostname or "", host.port or 80)) as connection:
        connection.sendall(
            f"POST /api/v1/images/style/comic HTTP/1.1\r\nHost: x\r\n{headers}"
            "Content-Type: multipart/form-data; boundary=b\r\n"
            f"Content-Length: {len(form)}\r\n\r\n".encode()
        )
        connection.sendall(form)
        time.sleep(after_s)


def held(address: str) -> int:
    """Requests inside the replicas of comic."""
    replicas = httpx.get(f"{address}/readyz", timeout=30).json()["replicas"]
    return sum(replica["requests"] for replica in replicas["comic"])


def wait_until_held(address: str, count: int, deadline_s: float) -> None:
    end_s = time.monotonic() + deadline_s
    while (found := held(address)) != count:
        assert time.monotonic() < end_s, f"{found} requests are inside, not {count}"


def test_clients_who_leave_take_their_work_along(server: str) -> None:
    body = noise_png(600, 600)  # far more than a proxy reads at once
    for _ in range(5):
        leave(server, body)
    wait_until_held(server, 0, deadline_s=4)  # a picture of 100 steps takes far longer
    assert opened(post(server, "comic", jpeg())).size == (96, 64)


def test_a_client_can_ask_for_its_work_to_go_on(server: str) -> None:
    # Large enough to outlast its client, and small enough to end within the deadline.
    leave(server, jpeg(320, 192), "x-request-disconnect-disabled: ?1\r\n", after_s=1)
    wait_until_held(server, 1, deadline_s=4)
    wait_until_held(server, 0, deadline_s=60)  # until it is done, or late


def test_a_request_that_no_replica_could_finish_is_refused_with_what_fits(server: str) -> None:
    photo = jpeg(512, 512)
    assert opened(post(server, "comic", photo))
    slow = {"strength": "1", "guidance_scale": "7"}
    answer = post(server, "comic", photo, steps="150", **slow)
    if answer.status_code == 200:
        pytest.skip("This machine makes 150 steps in 20 s.")
    assert is_problem(answer, 422)
    assert answer.json()["code"] == "too_much_work"
    fitting = re.search(r"steps=(\d+)", answer.json()["remedy"])
    assert fitting, answer.text
    half = str(int(fitting[1]) // 2)  # a busy machine may take twice as long
    assert opened(post(server, "comic", photo, steps=half, **slow)).size == (512, 512)


def test_of_many_at_once_each_gets_its_picture_or_a_time_to_come_back(server: str) -> None:
    async def burst() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            url = f"{server}/api/v1/images/style/comic"
            calls = [client.post(url, files={"image": jpeg(512, 512)}) for _ in range(80)]
            return await asyncio.gather(*calls)

    answers = asyncio.run(burst())
    assert {answer.status_code for answer in answers} == {200, 429}
    for refused in (answer for answer in answers if answer.status_code == 429):
        assert is_problem(refused, 429)
        assert 1 <= int(refused.headers["retry-after"]) <= 20
