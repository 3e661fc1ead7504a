"""The front door stays light, and the code stays readable."""

from __future__ import annotations

import ast
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from deployments.settings import ROOT

if TYPE_CHECKING:
    from pathlib import Path

SOURCES = [
    ROOT / "imagen_client.py",
    *sorted(
        path
        for name in ("cli", "serve_app", "deployments", "kuberay")
        for path in (ROOT / name).rglob("*.py")
    ),
]
MAX_FUNCTION_LINES = 40


def loaded_by(module: str) -> set[str]:
    """The top-level packages in memory after a fresh import of `module`."""
    code = f"import {module}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_application_is_described_without_torch() -> None:
    assert not loaded_by("serve_app.app") & {"torch", "diffusers", "transformers", "torchvision"}


@pytest.mark.parametrize("module", ["serve_app.api", "deployments.registry", "deployments.images"])
def test_http_and_the_contract_know_neither_ray_nor_torch(module: str) -> None:
    assert not loaded_by(module) & {"ray", "torch", "diffusers", "transformers"}


def test_the_command_starts_without_ray_or_torch() -> None:
    assert not loaded_by("cli.main") & {"ray", "torch"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_is_longer_than_a_screen(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions}
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_state_hides_in_a_global(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Global)]
