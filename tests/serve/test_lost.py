"""kill -9 of each process under light load: what clients see, and what `/readyz` says of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import httpx
import pytest

from benchmarks.recovery import Watch, process_of
from tests.serve.conftest import FURTHER
from tests.serve.test_http import jpeg, post

if TYPE_CHECKING:
    import psutil

    from benchmarks.recovery import Answer

pytestmark = pytest.mark.slow
LIMIT_S = 300
QUIET_S = 4
"""After so long without a failure it has recovered."""


def kill_now(kind: str) -> psutil.Process:
    victim = process_of(kind)
    assert victim is not None
    victim.kill()
    return victim


def kill(kind: str, address: str) -> tuple[list[Answer], list[Answer]]:
    """Answers from the kill on, of the image route and of `/readyz`, until all is well again."""
    with Watch(address, jpeg()) as watch:
        time.sleep(2)
        killed_s = time.monotonic()
        victim = kill_now(kind)
        watch.settle(kind, victim, LIMIT_S, QUIET_S)
    both = watch.pictures, watch.readiness
    pictures, readiness = ([one for one in answers if one.came_s >= killed_s] for answers in both)
    return pictures, readiness


def outcomes(answers: list[Answer]) -> set[str]:
    return {one.outcome for one in answers}


def states(answers: list[Answer], task: str) -> set[str]:
    return {one.models[task] for one in answers if one.models}


OTHERS = ["upscale", "enhance", "comic", "aged"]


def test_a_lost_replica_is_a_problem_that_says_when_and_is_starting_until_it_is_back(
    address: str,
) -> None:
    pictures, readiness = kill("replica", address)
    assert outcomes(pictures) <= {"200", "503 not_ready"}
    assert states(readiness, "background") == {"ready", "starting"}
    for task in OTHERS:
        assert states(readiness, task) == {"ready"}
    # The new one has to load its model first: sooner is a promise nobody can keep.
    told = [one.retry_after_s for one in (*pictures, *readiness) if one.outcome != "200"]
    assert told
    assert all(seconds is not None and 5 < seconds < LIMIT_S for seconds in told[:1])


def test_a_lost_ingress_costs_only_the_requests_inside_it(address: str) -> None:
    pictures, readiness = kill("ingress", address)
    # Serve's proxy answers for them, and cannot be told how.
    assert outcomes(pictures) <= {"200", "500 plain text"}
    assert sum(one.outcome != "200" for one in pictures) <= 2
    assert outcomes(readiness) <= {"200", "500 plain text", "503"}
    assert "failed" not in {state for one in readiness for state in one.models.values()}


def test_a_lost_proxy_is_refused_or_unknown_until_it_is_back(address: str) -> None:
    pictures, readiness = kill("proxy", address)
    passing = {"200", "refused", "cut off", "404 plain text"}
    assert outcomes(pictures) <= passing
    assert outcomes(readiness) <= passing


def test_a_lost_controller_is_noticed_by_nobody(address: str) -> None:
    pictures, readiness = kill("controller", address)
    assert outcomes(pictures) == {"200"}
    assert outcomes(readiness) == {"200"}


def test_while_the_controller_does_not_answer_readyz_says_what_the_replicas_say(
    address: str,
) -> None:
    controller = process_of("controller")
    assert controller is not None
    controller.suspend()
    try:
        for _ in range(3):
            answer = httpx.get(f"{address}/readyz", timeout=30)
            assert answer.json()["models"] == dict.fromkeys(
                [*OTHERS, "background", "generate", FURTHER], "ready"
            )
            time.sleep(1)
        kill_now("replica")
        deadline_s = time.monotonic() + 60
        while (answer := httpx.get(f"{address}/readyz", timeout=30)).status_code == 200:
            assert time.monotonic() < deadline_s
            time.sleep(0.5)
        assert answer.json()["models"]["background"] == "starting"
        assert int(answer.headers["retry-after"]) > 5
    finally:
        controller.resume()
    deadline_s = time.monotonic() + LIMIT_S
    while httpx.get(f"{address}/readyz", timeout=30).status_code != 200:
        assert time.monotonic() < deadline_s
        time.sleep(1)
    assert post(address, "background", jpeg()).status_code == 200
