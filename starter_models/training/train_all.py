"""Train background, enhance and upscale at once on one GPU, for a set time.

`python -m starter_models.training.train_all --out DIR --minutes 4.3`. Each model is a process of
its own. Every few seconds, what a model has saved is packed into `DIR/NAME.tar`, so that a run that
is cut off keeps its last weights; logs are `DIR/NAME.log`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

MODELS = {"background": "matting", "enhance": "enhancer", "upscale": "upscaler"}
SHARES = {"upscale": 0.6}
"""Of the time, where a model needs less: the others then have more of the GPU."""
EVERY_S = 10
GRACE_S = 25


def main() -> None:
    """Train; ends at most `GRACE_S` after the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batch", type=int, help="for a quick try")
    given = parser.parse_args()
    ends_s = time.monotonic() + given.minutes * 60
    scratch = Path(tempfile.mkdtemp())
    given.out.mkdir(parents=True, exist_ok=True)
    running = {name: _start(name, scratch, given, ends_s) for name in given.models.split(",")}
    packed: dict[str, float] = {}
    while any(process.poll() is None for process in running.values()):
        time.sleep(min(EVERY_S, 2 if time.monotonic() > ends_s else EVERY_S))
        for name in running:
            _pack(scratch / name, given.out / f"{name}.tar", packed)
        if time.monotonic() > ends_s + GRACE_S:
            break
    for name, process in running.items():
        if process.poll() is None:
            process.kill()
        whole = process.wait() == 0
        _pack(scratch / name, given.out / f"{name}.tar", packed, whole=whole)
        last = (given.out / f"{name}.log").read_text(encoding="utf-8").splitlines()[-3:]
        print(f"== {name}: exit code {process.wait()}", *last, sep="\n", flush=True)


def _start(
    name: str, scratch: Path, given: argparse.Namespace, ends_s: float
) -> subprocess.Popen[bytes]:
    left_s = (ends_s - time.monotonic()) * SHARES.get(name, 1.0)
    command = [
        sys.executable, "-m", f"starter_models.training.{MODELS[name]}", "--out", scratch / name,
        "--until", f"{time.time() + left_s:.1f}", "--device", given.device,
        *(() if given.batch is None else ("--batch", str(given.batch))),
    ]  # fmt: skip
    log = (given.out / f"{name}.log").open("wb")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=dict(os.environ))


def _pack(folder: Path, target: Path, packed: dict[str, float], *, whole: bool = False) -> None:
    """Pack a folder again if a file in it is new, and `whole` or so old that it must be whole."""
    files = [p for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []
    newest = max((p.stat().st_mtime for p in files), default=0.0)
    if newest <= packed.get(folder.name, 0.0) or (not whole and time.time() - newest < 1):
        return
    partial = target.with_name(f".{target.name}")
    with tarfile.open(partial, "w") as archive:
        archive.add(folder, folder.name)
    partial.replace(target)
    packed[folder.name] = newest


if __name__ == "__main__":
    main()
