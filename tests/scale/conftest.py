"""One cluster for every test of this folder; each says first whether models are to be up."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from tests.scale.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDS = int(os.environ.get("IMAGEN_SOAK_ROUNDS", "1"))


@pytest.fixture(scope="package")
def service() -> Iterator[Service]:
    if sys.platform != "linux":
        pytest.skip("processes are found by /proc")
    with Service() as service:
        yield service


@pytest.fixture(params=range(ROUNDS))
def seed(request: pytest.FixtureRequest) -> int:
    """One round of a test, or as many as IMAGEN_SOAK_ROUNDS says."""
    return request.param
