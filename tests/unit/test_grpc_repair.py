"""Calls whose clients left are freed: each would keep about a kibibyte otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks glibc what is in use")
SCRIPT = Path(__file__).with_name("cancelled_calls.py")


def kept_bytes(*arguments: str) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.cancelled_calls", *arguments],
        cwd=SCRIPT.parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return float(done.stdout)


@pytest.mark.parametrize("way", ["explicitly", "with-its-task"])
def test_a_cancelled_call_keeps_nothing(way: str) -> None:
    assert kept_bytes(way, "repaired") < 300


def test_grpcio_still_needs_the_repair() -> None:
    kept = kept_bytes("explicitly")
    assert kept > 600, "grpcio frees cancelled calls itself now: delete serve_app/grpc_repair.py"
