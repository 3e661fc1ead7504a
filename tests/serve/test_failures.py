"""What clients see when a model is full, late, lost, broken or never starts."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.serve.test_http import is_problem, jpeg


def ask(address: str, prompt: str, task: str = "enhance") -> httpx.Response:
    return httpx.post(
        f"{address}/api/v1/images/{task}",
        files={"image": jpeg()},
        data={"prompt": prompt},
        timeout=60,
    )


def test_two_ingress_replicas_behave_as_one(scripted: str) -> None:
    answers = [ask(scripted, "") for _ in range(8)]
    assert [a.status_code for a in answers] == [200] * 8
    assert {a.content for a in answers} == {jpeg()}


def test_a_full_queue_says_when_to_come_back(scripted: str) -> None:
    async def many() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            url = f"{scripted}/api/v1/images/style/comic"
            calls = (
                client.post(url, files={"image": jpeg()}, data={"prompt": "sleep 1"})
                for _ in range(16)
            )
            return await asyncio.gather(*calls)

    answers = asyncio.run(many())
    refused = [a for a in answers if a.status_code == 429]
    assert refused
    assert all(is_problem(a, 429) for a in refused)
    assert {a.headers["retry-after"] for a in refused} == {"7"}
    assert {a.status_code for a in answers} == {200, 429}


def test_a_late_answer_is_504(scripted: str) -> None:
    assert is_problem(ask(scripted, "sleep 30"), 504)


@pytest.mark.slow
def test_no_header_of_a_client_keeps_a_request_beyond_the_deadline(scripted: str) -> None:
    """Serve itself would honour both."""
    url = f"{scripted}/api/v1/images/enhance"
    endless: dict[str, Any] = {"files": {"image": jpeg()}, "data": {"prompt": "sleep 300"}}
    unbound = {"x-request-timeout-seconds": "0", "x-request-disconnect-disabled": "?1"}
    assert is_problem(httpx.post(url, **endless, headers=unbound, timeout=60), 504)

    with suppress(httpx.ReadTimeout):
        httpx.post(url, **endless, headers=unbound, timeout=2)
    assert requests_inside(scripted, "enhance") == 1
    deadline_s = time.monotonic() + 60
    while requests_inside(scripted, "enhance"):
        assert time.monotonic() < deadline_s


def requests_inside(address: str, task: str) -> int:
    replicas = httpx.get(f"{address}/readyz", timeout=30).json()["replicas"]
    return sum(replica["requests"] for replica in replicas[task])


def test_a_row_that_fails_keeps_its_error(scripted: str) -> None:
    answer = ask(scripted, "fail")
    assert is_problem(answer, 503)
    assert answer.json()["remedy"] == "Do not ask for it."


def test_an_unforeseen_error_tells_nothing_of_the_server(scripted: str) -> None:
    answer = ask(scripted, "break")
    assert is_problem(answer, 503)
    assert "secret" not in answer.text
    assert "ZeroDivision" not in answer.text


def test_a_lost_replica_is_503_and_replaced(scripted: str) -> None:
    answer = ask(scripted, "die", "style/aged")
    assert is_problem(answer, 503)
    assert "retry-after" in answer.headers
    deadline_s = time.monotonic() + 60
    while ask(scripted, "", "style/aged").status_code != 200:
        assert time.monotonic() < deadline_s


def test_a_model_that_never_starts_is_failed(broken: str) -> None:
    deadline_s = time.monotonic() + 90
    while True:
        ready = httpx.get(f"{broken}/readyz", timeout=30)
        if '"comic":"failed"' in ready.text:
            break
        assert time.monotonic() < deadline_s, ready.text
        time.sleep(1)
    assert ready.status_code == 503
    assert is_problem(ask(broken, "", "style/comic"), 503)
    assert httpx.get(f"{broken}/healthz", timeout=30).status_code == 200
