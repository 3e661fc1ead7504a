"""A test's folder is its marker; tests of several nodes are slow."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no failure.
settings.register_profile("imagen", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("imagen")

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        item.add_marker("readme" if folder == "test_readme.py" else folder)
        if folder == "scale":
            item.add_marker("slow")
