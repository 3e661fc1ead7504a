"""Calls whose clients left are freed: each would keep about a kibibyte otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks glibc what is in use")
SCRIPT = Path(__file__).with_name("cancelled_calls.py")


def measured(*arguments: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.cancelled_calls", *arguments],
        cwd=SCRIPT.parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("way", ["explicitly", "with-its-task"])
def test_a_cancelled_call_keeps_nothing_and_calls_back_once(way: str) -> None:
    found = measured(way, "repaired")
    assert found["kept_bytes"] < 300
    assert found["called_back"] == 1  # Serve counts requests by it


def test_grpcio_still_needs_the_repair() -> None:
    kept = measured("explicitly")["kept_bytes"]
    assert kept > 600, "grpcio frees cancelled calls itself now: delete serve_app/grpc_repair.py"
