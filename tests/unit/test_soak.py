"""What the soak of leaving clients asks for, and what it calls a fault."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.load.report import Machine, Record, Report, derive
from benchmarks.load.workload import requests
from benchmarks.soak_clients import default_requests, leavers, plan, slow_after

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


def report(of: Plan, outcome: Any, latency_s: float = 1.0) -> Report:
    """What a run of a plan would tell if each request ended alike."""
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
            outcome=outcome,
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


def test_the_leavers_all_leave_a_hundred_steps() -> None:
    made = list(requests(leavers(8)))
    assert len(made) == 200
    assert all(request.leaves_after_s is not None for request in made)
    assert {request.parameters["steps"] for request in made} == {100}


@pytest.mark.parametrize(
    ("left", "after", "after_s", "fault"),
    [
        ("disconnected", "ok", 1.9, None),
        ("disconnected", "ok", 2.1, "took 2.10 s, above 2 times the 1.00 s"),
        ("disconnected", "timeout", 60, "got no picture"),
        ("refused", "ok", 1.0, "only 0 of 200 clients left"),
    ],
)
def test_work_that_leavers_leave_behind_is_a_fault(
    left: str, after: str, after_s: float, fault: str | None
) -> None:
    found = slow_after(
        report(default_requests(5), "ok"),
        report(leavers(8), left),
        report(default_requests(1), after, after_s),
    )
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]
