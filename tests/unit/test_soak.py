"""What the soak of leaving clients sends, and what it calls a fault."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.load.report import Machine, Record, Report, derive
from benchmarks.load.workload import requests
from benchmarks.soak_clients import (
    CLIENTS,
    JUDGED_REQUESTS,
    LEAVERS,
    MOST_LEAVERS,
    WARM_UP,
    Memory,
    default_requests,
    judge_processes,
    leavers,
    plan,
    send_leavers,
    slow_after,
)

if TYPE_CHECKING:
    from benchmarks.load import Plan

MACHINE = Machine(
    processor="none",
    platform="none",
    python="3",
    cores=1,
    load_before=0,
    load_after=0,
    generator_cpu_share=0,
)


def report(of: Plan, *outcomes: Any, latency_s: float = 1.0) -> Report:
    """The report of a plan whose requests end in these ways, in turn."""
    records = [
        Record(
            index=request.index,
            task=request.label,
            size=request.size,
            parameters=dict(request.parameters),
            due_s=0,
            sent_s=0,
            latency_s=latency_s,
            leaves=request.leaves_after_s is not None,
            outcome=outcomes[request.index % len(outcomes)],
        )
        for request in requests(of)
    ]
    return Report(
        plan=of,
        url="http://127.0.0.1:1",
        protocol="multipart",
        started="2026-11-21T00:00:00+00:00",
        interrupted=False,
        wall_s=1,
        machine=MACHINE,
        unloaded_s={},
        records=tuple(records),
        **derive(records, 1, None),
    )


def test_the_soak_has_thousands_of_sizes_and_three_in_ten_leave() -> None:
    made = list(requests(plan(20_000)))
    assert len(made) == 20_000
    assert len({request.size for request in made if request.task == "background"}) > 5000
    assert len({request.size for request in made if request.task == "upscale"}) > 5000
    leaving = sum(request.leaves_after_s is not None for request in made)
    assert leaving / len(made) == pytest.approx(0.3, abs=0.02)


def test_the_leavers_all_leave_a_hundred_steps_and_come_a_few_at_a_time() -> None:
    made = list(requests(leavers(0)))
    assert len(made) == leavers(0).concurrency == CLIENTS
    assert all(request.leaves_after_s is not None for request in made)
    assert {request.parameters["steps"] for request in made} == {100}
    assert made != list(requests(leavers(1)))


@pytest.mark.parametrize(
    ("outcomes", "left", "sent"),
    [
        (["disconnected"], LEAVERS, LEAVERS),
        (["disconnected", "refused"], LEAVERS, 2 * LEAVERS),
        (["refused"], 0, MOST_LEAVERS),
    ],
)
def test_leavers_come_until_enough_have_left_or_too_many_were_sent(
    outcomes: list[str], left: int, sent: int
) -> None:
    found = send_leavers(lambda each: report(each, *outcomes))
    assert (found["disconnected"], found.total()) == (left, sent)


@pytest.mark.parametrize(
    ("left", "after", "after_s", "fault"),
    [
        (LEAVERS, "ok", 1.9, None),
        (LEAVERS, "ok", 2.1, "took 2.10 s, above 2 times the 1.00 s"),
        (LEAVERS, "timeout", 60, "got no picture"),
        (LEAVERS - 1, "ok", 1.0, "only 199 of 800 clients left"),
    ],
)
def test_work_that_leavers_leave_behind_is_a_fault(
    left: int, after: str, after_s: float, fault: str | None
) -> None:
    found = slow_after(
        report(default_requests(5), "ok"),
        Counter(disconnected=left, refused=MOST_LEAVERS - left),
        report(default_requests(1), after, latency_s=after_s),
    )
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]


@pytest.mark.parametrize("task", ["background", "upscale"])
def test_a_process_is_judged_on_memory_only_if_its_task_had_enough_requests(task: str) -> None:
    load = report(plan(WARM_UP + JUDGED_REQUESTS, tasks=[task]), "ok")
    memory = Memory(len(load.records))
    memory.requests = list(range(0, len(load.records) + 1, 50))
    memory.mib = {
        name: [100 + done * mib_per_request for done in memory.requests]
        for name, mib_per_request in (("ProxyActor", 0), ("Upscale", 0.01), ("Enhance", 0.01))
    }
    found = judge_processes(memory, load, warm_up=WARM_UP, tolerance=0.5)
    assert {name: process["verdict"] for name, process in found.items()} == {
        "ProxyActor": "flat",
        "Upscale": "grows" if task == "upscale" else "not judged",
        "Enhance": "not judged",
    }
    assert found["Enhance"]["requests"] == 0
    short = judge_processes(memory, load, warm_up=WARM_UP - 1, tolerance=0.5)
    assert {process["verdict"] for process in short.values()} == {"not judged"}
