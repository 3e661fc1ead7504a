"""A Triton server on the CPU, from the wheel nvidia-pytriton, with a Python-backend model per task.

Configured with a dynamic batcher that prefers groups of 2 and 4 (background also 8) and waits for
100 ms, and one instance a model. In its favour, a batch is decoded and encoded on two threads, as
in Imagen, and clients send binary tensors without base64.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Annotated, Final

import typer

from benchmarks.peers.work import MAX_BATCH
from deployments.settings import ROOT

_CONFIG: Final = """
name: "{task}"
backend: "python"
max_batch_size: {limit}
input [
  {{ name: "IMAGE" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "PARAMETERS" data_type: TYPE_STRING dims: [ 1 ] }}
]
output [ {{ name: "IMAGE" data_type: TYPE_STRING dims: [ 1 ] }} ]
dynamic_batching {{
  preferred_batch_size: [ {preferred} ]
  max_queue_delay_microseconds: 100000
}}
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
"""


def write_repository(folder: Path) -> None:
    """Write a model repository with the five tasks."""
    for task, limit in MAX_BATCH.items():
        preferred = ", ".join(str(size) for size in (2, 4, 8) if size <= limit)
        (folder / task / "1").mkdir(parents=True)
        text = _CONFIG.format(task=task, limit=limit, preferred=preferred)
        (folder / task / "config.pbtxt").write_text(text, encoding="utf-8")
        shutil.copy(Path(__file__).with_name("triton_model.py"), folder / task / "1/model.py")


def write_backend(triton: Path, folder: Path) -> None:
    """Copy the Python backend, and the stub of this Python version to where Triton looks for it."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copytree(triton / "backends", folder)
    shutil.copytree(
        triton / "python_backend_stubs" / version, folder / "python", dirs_exist_ok=True
    )


def main(
    port: int,
    folder: Annotated[Path, typer.Argument(help="An empty folder for the model repository")],
) -> None:
    """Replace this process by a Triton server."""
    site = Path(sysconfig.get_path("purelib"))
    triton = site / "pytriton/tritonserver"
    write_repository(folder / "models")
    write_backend(triton, folder / "backends")
    libraries = [site / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    environment = os.environ | {
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        # The stub embeds the first Python in PATH, and ignores PYTHONPATH.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    os.chdir(ROOT)  # the stub imports our modules from here
    command = [
        str(triton / "bin/tritonserver"),
        f"--model-repository={folder / 'models'}",
        f"--backend-directory={folder / 'backends'}",
        "--http-address=127.0.0.1",
        f"--http-port={port}",
        "--allow-grpc=false",
        "--allow-metrics=false",
        "--exit-timeout-secs=10",
    ]
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    typer.run(main)
