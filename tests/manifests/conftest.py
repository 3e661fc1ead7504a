"""What the tests of the manifests share: each overlay is built once."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deployments.settings import ROOT
from kuberay.checks.manifests import Manifests, build
from kuberay.render.files import Files, render
from tests.manifests.schemas import Schemas

if TYPE_CHECKING:
    from collections.abc import Callable

SOURCE, FOLDER = ROOT / "configs" / "gke.yaml", ROOT / "kuberay"
LOCK = FOLDER / "images.lock"
OVERLAYS = sorted(path.parent.name for path in ROOT.glob("kuberay/overlays/*/kustomization.yaml"))


@pytest.fixture(scope="session")
def built() -> dict[str, Manifests]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on the PATH: no overlay can be built")
    return {name: build(FOLDER / "overlays" / name) for name in OVERLAYS}


@pytest.fixture(scope="session")
def pickled(built: dict[str, Manifests]) -> dict[str, bytes]:
    return {name: pickle.dumps(manifests.documents) for name, manifests in built.items()}


@pytest.fixture
def overlay(pickled: dict[str, bytes]) -> Callable[[str], Manifests]:
    """A copy of an overlay, which the test may change."""
    return lambda name: Manifests(name, pickle.loads(pickled[name]))


@pytest.fixture(scope="session")
def rendered() -> Files:
    """The generated files, from the source as it is committed."""
    return render(SOURCE, LOCK)


@pytest.fixture(scope="session")
def schemas() -> Schemas:
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        pytest.skip("$KUBERAY_CRDS is not set: THE FIELDS OF RAYSERVICE ARE NOT CHECKED")
    return Schemas(Path(folder).resolve())
