"""Put trained weights where the service reads them.

`python -m starter_models.training.install DIR`, where DIR holds `NAME.tar` of `train_all`. Files
that training leaves alone, as enhance's text encoder, stay.
`imagen models resolve --all --renew` then writes sizes and hashes to the lock file.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import typer

from starter_models.training.train_all import MODELS

HERE = Path(__file__).parents[1]


def main(folder: Path) -> None:
    """Unpack every model that `folder` holds."""
    archives = [p for p in sorted(folder.glob("*.tar")) if p.stem in MODELS]
    if not archives:
        raise SystemExit(f"{folder} holds none of {', '.join(f'{n}.tar' for n in MODELS)}.")
    for path in archives:
        with tarfile.open(path) as archive:
            archive.extractall(HERE, filter="data")
        for file in (HERE / path.stem).rglob("*.safetensors"):
            file.chmod(0o644)
        typer.echo(f"Installed {path.stem}.")


if __name__ == "__main__":
    typer.run(main)
