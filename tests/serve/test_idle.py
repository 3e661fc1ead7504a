"""A node that was filled with models may sleep again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from deployments.settings import ROOT

pytestmark = pytest.mark.slow


def test_a_node_counts_as_idle_after_its_init_actor_ran(tmp_path: Path) -> None:
    script = Path(__file__).with_name("idle_node.py")
    own = {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    # Short, because Ray keeps sockets there.
    with tempfile.TemporaryDirectory(prefix="idle") as ray_folder:
        ended = subprocess.run(
            [sys.executable, str(script), str(tmp_path / "models")],
            env={**os.environ, **own, "RAY_TMPDIR": ray_folder},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["pulled"] == 5
    assert found["after_pull_s"] > 3
    assert found["with_a_living_actor_s"] == 0, "or this test could not tell"
