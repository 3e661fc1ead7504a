"""Ray, once imported by other tests of the same run, keeps its children's log lines to itself."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def log_lines_reach_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
