"""The client needs httpx and standardwebhooks, and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from deployments.settings import ROOT

if TYPE_CHECKING:
    from pathlib import Path

CLIENT = ROOT / "imagen_client.py"
NEEDS = ("httpx", "standardwebhooks")
TRY = """
import json, sys
import imagen_client
from importlib.metadata import distributions
with imagen_client.Imagen("http://127.0.0.1:1", retries=0) as imagen:
    try:
        imagen.run("style/comic", b"")
    except imagen_client.ConnectionFailed:
        print(imagen_client.__file__, *sorted({d.name for d in distributions()}))
"""


def test_the_client_imports_only_what_it_needs() -> None:
    found: set[str] = set()
    for node in ast.walk(ast.parse(CLIENT.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add((node.module or "").partition(".")[0])
    assert found - sys.stdlib_module_names == set(NEEDS)


@pytest.mark.slow  # it asks a package index, which `make test` does without
def test_a_copy_of_the_client_works_beside_only_what_it_needs(tmp_path: Path) -> None:
    home, app = tmp_path / "venv", tmp_path / "app"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.run([*pip, "--constraint", ROOT / "constraints.txt", *NEEDS], check=True)
    app.mkdir()
    (app / CLIENT.name).write_bytes(CLIENT.read_bytes())
    done = subprocess.run(
        [python, "-W", "error", "-c", TRY], cwd=app, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    where, *installed = done.stdout.split()
    assert where == str(app / CLIENT.name)
    assert set(NEEDS) < set(installed)
    assert not {"imagen", "pydantic", "starlette", "ray"} & set(installed)
