"""A test's folder is its marker; tests of several nodes are slow. What -n runs side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no failure.
settings.register_profile("imagen", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("imagen")

HERE = Path(__file__).parent
CLUSTERS = ("chaos/", "scale/", "serve/")
COMMANDS = ("serve/run/", "test_readme.py")
_YIELDING = 15


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        item.add_marker("readme" if folder == "test_readme.py" else folder)
        if folder == "scale":
            item.add_marker("slow")
    # The longest work first, and the other work with Ray when nothing else is left to do beside it.
    order = {"clusters": 0, "commands": 2}
    items.sort(key=lambda item: order.get(_unit(item.path), 1))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """With -n, let no test starve those with deadlines: the workers of Ray have this niceness."""
    has_deadlines = _unit(item.path) in ("clusters", "commands")
    if "PYTEST_XDIST_WORKER" in os.environ and not has_deadlines:
        os.nice(max(_YIELDING - os.nice(0), 0))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """With -n, one process gets a file as a whole, and each kind of work with Ray as a whole."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _unit(config.rootpath / super()._split_scope(nodeid))

    config.option.loadscopereorder = False  # else the files with the most tests come first
    return Scheduling(config, log)


def _unit(file: Path) -> str:
    """What one process runs as a whole: tests on clusters, those of commands that serve, a file."""
    place = file.relative_to(HERE).as_posix()
    if place.startswith(COMMANDS):
        return "commands"
    return "clusters" if place.startswith(CLUSTERS) else place
