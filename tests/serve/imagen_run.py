"""`imagen run` as a process, with a configuration, ports and folders of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks.server import free_port
from deployments.settings import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Config = dict[str, Any]


@contextmanager
def imagen_run(change: Callable[[Config], None] = lambda _: None) -> Iterator[str]:
    """The URL of `imagen run` with configs/local.yaml, once it says that it is ready.

    Args:
        change: edits the configuration; the port is free already.
    """
    folder = Path(tempfile.mkdtemp(prefix="run-"))  # short: Ray puts sockets below it
    config = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
    config["http_options"]["port"] = free_port()
    change(config)
    file, log = folder / "serve.yaml", folder / "log"
    file.write_text(yaml.safe_dump(config))
    with log.open("wb") as output:
        server = subprocess.Popen(
            [str(Path(sys.executable).parent / "imagen"), "run", str(file)],
            cwd=ROOT,
            env=os.environ | {"RAY_TMPDIR": str(folder / "ray"), "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        _wait_ready(server, log)
        yield f"http://127.0.0.1:{config['http_options']['port']}"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(90)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_ready(server: subprocess.Popen[bytes], log: Path) -> None:
    while "Imagen is ready" not in (text := log.read_text()):
        assert server.poll() is None, text
        try:
            server.wait(0.5)
        except subprocess.TimeoutExpired:
            continue
