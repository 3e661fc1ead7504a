"""Clients who leave: nobody else notices, and no row stays. `make soak-clients` is longer."""

from __future__ import annotations

import asyncio

from benchmarks.load import run_async
from benchmarks.soak_clients import plan


def test_many_clients_leave_and_everybody_else_is_served(address: str) -> None:
    leaving = asyncio.run(run_async(plan(150, seed=7, tasks=("background", "upscale")), address))
    outcomes = leaving.total.outcomes
    assert outcomes["ok"] + outcomes["disconnected"] == 150, (outcomes, leaving.total.refusals)
    assert outcomes["disconnected"] >= 15

    after = asyncio.run(run_async(plan(20, leaving=0, seed=8), address))
    assert after.succeeded == 20, (after.total.outcomes, after.total.refusals)
