"""Overlays as kustomize builds them, once."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deployments.settings import ROOT
from kuberay.checks.crd import Schemas
from kuberay.checks.manifests import Manifests, build

if TYPE_CHECKING:
    from collections.abc import Callable

OVERLAYS = sorted(path.parent.name for path in ROOT.glob("kuberay/overlays/*/kustomization.yaml"))


@pytest.fixture(scope="session")
def built() -> dict[str, Manifests]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on the PATH: no overlay can be built")
    return {name: build(ROOT / "kuberay" / "overlays" / name) for name in OVERLAYS}


@pytest.fixture
def overlay(built: dict[str, Manifests]) -> Callable[[str], Manifests]:
    """A copy of an overlay, to spoil."""
    return lambda name: Manifests(name, copy.deepcopy(built[name].documents))


@pytest.fixture(scope="session")
def crds() -> Path:
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        pytest.skip("$KUBERAY_CRDS is not set: THE FIELDS OF RAYSERVICE ARE NOT CHECKED")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def schemas(crds: Path) -> Schemas:
    return Schemas(crds)
