"""Workers come with the first job and go after the last, whatever Redis does meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from deployments.settings import ROOT

if TYPE_CHECKING:
    from pathlib import Path


def test_workers_follow_the_queue_from_zero_and_back(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.chaos.workers_from_zero", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["at_first"] == 0
    assert found["ended"] == ["completed", 1, None]
    assert found["while_it_ran"] == [1], "a worker with its last job is not scaled away"
    assert found["while_frozen"] == 1, "nobody knew how much work there was"
    assert found["controller_answered_within_s"] < 3
    assert found["scaled_down"] == ["completed", 1, None], "a worker finishes its jobs"
    assert found["then"] == 0, "or this test could not tell"
