"""Pods stop on SIGTERM: a head that stays delays the next one."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.manifests.conftest import OVERLAYS

if TYPE_CHECKING:
    from collections.abc import Callable

    from kuberay.checks.manifests import Manifests

    Overlay = Callable[[str], Manifests]

_KUBERAY_COMMAND = ["/bin/bash", "-c", "--"]
_KUBERAY_START = "ray kuberay-autoscaler --cluster-name imagen --cluster-namespace imagen"
_FIRST_PROCESS = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
_LONG_S = 30


@pytest.fixture
def fake_ray(tmp_path: Path) -> Path:
    """A folder with a `ray` that prints its arguments and, like the real one, ignores signals."""
    (tmp_path / "ray").write_text('#!/bin/bash\necho "ray $*"\nexec sleep 300\n')
    (tmp_path / "ray").chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_autoscaler_ends_on_sigterm(name: str, overlay: Overlay, fake_ray: Path) -> None:
    """Also as the first process of its container, which ignores signals without a handler."""
    if subprocess.run([*_FIRST_PROCESS, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no process namespace")
    options = overlay(name).of("RayService")[0]["spec"]["rayClusterConfig"]["autoscalerOptions"]
    command = [
        *options.get("command", _KUBERAY_COMMAND),
        *options.get("args", [_KUBERAY_START]),
    ]
    variables = {
        "PATH": f"{fake_ray}:{os.environ['PATH']}",
        "KUBERAY_GEN_AUTOSCALER_START_CMD": _KUBERAY_START,
    }
    with subprocess.Popen(
        [*_FIRST_PROCESS, *command], env=variables, stdout=subprocess.PIPE, text=True
    ) as namespace:
        assert namespace.stdout is not None
        assert namespace.stdout.readline() == f"{_KUBERAY_START}\n"
        [first] = Path(f"/proc/{namespace.pid}/task/{namespace.pid}/children").read_text().split()
        os.kill(int(first), signal.SIGTERM)
        try:
            namespace.wait(_LONG_S)
        except subprocess.TimeoutExpired:
            namespace.kill()
            pytest.fail(f"still there after {_LONG_S} s")


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_head_that_moves_drains_nothing(name: str, overlay: Overlay) -> None:
    """It has no requests and no replicas: a drain would only delay the next head."""
    [head] = [pod for pod in overlay(name).pods if pod.role == "head"]
    environment = {one["name"]: one.get("value") for one in head.main["env"]}
    assert environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "0"
