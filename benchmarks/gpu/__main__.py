"""Measures this machine's GPU and writes benchmarks/results/gpu-<name>-<date>.json and gpu.md.

    python -m benchmarks.gpu                        all, in order of importance, for eight minutes
    python -m benchmarks.gpu --resume FILE          measure what that file lacks
    python -m benchmarks.gpu --only 'enhance-1024/*' 'comic-*/headline'
    python -m benchmarks.gpu --table                write gpu.md from the result files

Without a GPU it is a dry run with tiny networks, which writes nothing without --out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import machine
from benchmarks.gpu.compiling import compile_all
from benchmarks.gpu.measure import PEAK_SIZES, matrix_peak
from benchmarks.gpu.table import render, write_json, write_table
from benchmarks.gpu.tasks import is_done, run, tasks
from benchmarks.gpu.workloads import serving_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    Values = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
PACKAGES = ("diffusers", "transformers", "xformers", "triton")
_TINY_PEAK_SIZES = (64,)
COMPILE_S = 120
"""Nothing is compiled with less time left."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device)
    parser.add_argument("--minutes", type=float, default=8, help="start no task that takes longer")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="of task names; see --list")
    parser.add_argument("--resume", type=Path, metavar="JSON", help="a file to complete")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: {RESULTS}")
    parser.add_argument("--artefacts", type=Path, metavar="DIR", help="keeps what is compiled")
    parser.add_argument("--table", action="store_true", help="only write gpu.md from the files")
    parser.add_argument("--list", action="store_true", help="only print the names of the tasks")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; leave out --device for a dry run")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    patterns = args.only or ["*"]
    work = [task for task in tasks() if any(fnmatch(task.name, one) for one in patterns)]
    if args.list:
        print("\n".join(task.name for task in work))
    elif args.table:
        print(f"Written: {write_table(args.out or RESULTS)}", file=sys.stderr)
    else:
        measure(args, work)


def measure(args: argparse.Namespace, work: Sequence[Any]) -> None:
    """Do the tasks, and write or print what they found."""
    tiny, start_s = args.device == "cpu", time.monotonic()
    result, name = _result(args, dry_run=tiny)
    folder = args.out or (None if tiny else RESULTS)

    def write() -> None:
        if folder is not None:
            write_json(result, folder / name)

    if not result["peak"]:
        sizes = _TINY_PEAK_SIZES if tiny else PEAK_SIZES
        result["peak"] = matrix_peak(serving_dtype(args.device), args.device, sizes)
    write()

    def go(some: Sequence[Any]) -> None:
        left_s = 60 * args.minutes - (time.monotonic() - start_s)
        run(some, result["cells"], write, device=args.device, tiny=tiny, budget_s=left_s)

    try:
        go([task for task in work if task.phase == 0])
        left_s = 60 * args.minutes - (time.monotonic() - start_s)
        wanted = [task for task in work if task.what == "compiled"]
        todo = [task.workload.name for task in wanted if not is_done(task, result["cells"])]
        if not tiny and todo and left_s > COMPILE_S:
            compiled = compile_all(todo, left_s - COMPILE_S / 2, args.artefacts)
            result["cells"].update(compiled)
            write()
        go([task for task in work if task.phase > 0])
    finally:
        if folder is None:
            print(render([result]))
        else:
            print(f"Written: {folder / name}, {write_table(folder)}", file=sys.stderr)


def _result(args: argparse.Namespace, *, dry_run: bool) -> tuple[Values, str]:
    """The results so far, and the name of their file.

    Raises:
        SystemExit: the file to complete is of another machine or other packages.
    """
    facts = describe(args.device)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    if args.resume is None:
        slug = re.sub(r"[^a-z0-9]+", "-", (facts["gpu"] or "dry-run").lower()).strip("-")
        name = f"gpu-{slug}-{date}.json"
        result: Values = {"dry_run": dry_run, "machine": facts, "peak": {}, "sessions": []}
        result["cells"] = {}
    else:
        name, result = args.resume.name, json.loads(args.resume.read_text(encoding="utf-8"))
        if other := [key for key in facts if result["machine"].get(key) != facts[key]]:
            raise SystemExit(
                f"That file is of another machine or setup: {', '.join(other)} differ."
            )
    result["sessions"].append({"date": date})
    return result, name


def describe(device: str) -> Values:
    """The machine, as far as figures depend on it."""
    facts: Values = dict.fromkeys(("gpu", "memory_bytes", "driver", "cuda", "cudnn"))
    if device == "cuda":
        facts = {
            "gpu": torch.cuda.get_device_name(),
            "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
            "driver": machine.nvidia_smi("driver_version"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    have = dict.fromkeys(PACKAGES, "not installed") | machine.versions(PACKAGES)
    return facts | {"python": platform.python_version(), "torch": torch.__version__} | have


if __name__ == "__main__":
    main()
