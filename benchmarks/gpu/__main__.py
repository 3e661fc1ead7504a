"""Measures the GPU at hand and writes benchmarks/results/gpu-<name>-<date>.json and gpu.md.

    python -m benchmarks.gpu                        all, in order of importance, for nine minutes
    python -m benchmarks.gpu --resume FILE          go on where that file ends
    python -m benchmarks.gpu --only 'enhance-1024/*' 'comic-*/headline'
    python -m benchmarks.gpu --table                gpu.md anew, from the files that are there

Without a GPU it is a dry run with tiny networks, which writes nothing unless --out says where.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.bench import ROUNDS, Budget
from benchmarks.gpu.measure import PEAK_SIZES, matrix_peak
from benchmarks.gpu.table import render, write_json, write_table
from benchmarks.gpu.tasks import run, tasks
from benchmarks.gpu.workloads import WORKLOADS

if TYPE_CHECKING:
    from collections.abc import Sequence

    Values = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
_TINY_PEAK_SIZE = 64


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="unset: cuda where there is one")
    parser.add_argument("--tiny", action="store_true", help="tiny networks: a dry run")
    parser.add_argument("--budget-s", type=float, default=540, help="begin nothing that is longer")
    parser.add_argument("--rounds", type=int, help="of runs in turns; unset: 3, of a dry run 1")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="of task names, see --list")
    parser.add_argument("--resume", type=Path, metavar="JSON", help="a file to complete")
    parser.add_argument("--retry", action="store_true", help="with --resume: what failed, too")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"unset: {RESULTS}")
    parser.add_argument("--table", action="store_true", help="only write gpu.md from the files")
    parser.add_argument("--list", action="store_true", help="only print the names of the tasks")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; without --device this is a dry run")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.tiny = args.tiny or args.device == "cpu"
    args.rounds = args.rounds or (1 if args.tiny else ROUNDS)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    budget = Budget(args.budget_s)
    work = tasks(list(WORKLOADS.values()))
    if args.only:
        work = [task for task in work if any(fnmatch(task.name, one) for one in args.only)]
    if args.list:
        print("\n".join(task.name for task in work))
    elif args.table:
        print(f"Written: {write_table(args.out or RESULTS)}", file=sys.stderr)
    else:
        measure(args, work, budget)


def measure(args: argparse.Namespace, work: Sequence[Any], budget: Budget) -> None:
    result, path = _result(args)
    folder = args.out or (None if args.tiny else RESULTS)

    def write() -> None:
        if folder is not None:
            write_json(result, folder / path)

    _add_peak(result, args)
    write()
    try:
        run(
            work,
            result,
            budget,
            write,
            device=args.device,
            tiny=args.tiny,
            rounds=args.rounds,
        )
    finally:
        if folder is None:
            print(render([result]))
        else:
            print(f"Written: {folder / path}, {write_table(folder)}", file=sys.stderr)


def _result(args: argparse.Namespace) -> tuple[Values, str]:
    """What is known so far, and the name of its file."""
    machine = describe(args.device)
    session = {"date": _today(), "commit": _git("rev-parse", "--short", "HEAD")}
    if args.resume is None:
        result: Values = {"dry_run": args.tiny, "machine": machine, "peak": {}, "sessions": []}
        result["cells"] = {}
        slug = re.sub(r"[^a-z0-9]+", "-", (machine["gpu"] or "dry-run").lower()).strip("-")
        path = f"gpu-{slug}-{session['date']}.json"
    else:
        result, path = json.loads(args.resume.read_text(encoding="utf-8")), args.resume.name
        _check_same(result, machine, dry_run=args.tiny)
    if args.retry:
        for cell in result["cells"].values():
            cell["again"] = cell["status"] != "measured"
    result["sessions"].append(session)
    return result, path


def _check_same(result: Values, machine: Values, *, dry_run: bool) -> None:
    """Figures of different machines do not belong into one file."""
    keys = [key for key in machine if result["machine"].get(key) != machine[key]]
    if keys or result["dry_run"] != dry_run:
        raise SystemExit(f"That file is of another machine or setup: {', '.join(keys)} differ.")


def _add_peak(result: Values, args: argparse.Namespace) -> None:
    if result["peak"]:
        return
    sizes = [_TINY_PEAK_SIZE] if args.tiny else PEAK_SIZES
    half = [torch.float16]
    if args.device == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        half.append(torch.bfloat16)
    for dtype in [torch.float32] if args.device == "cpu" else half:
        name = str(dtype).removeprefix("torch.")
        result["peak"][name] = matrix_peak(dtype, args.device, sizes)


def describe(device: str) -> Values:
    """The machine, as far as figures depend on it."""
    gpu = None
    if device == "cuda":
        gpu = torch.cuda.get_device_name()
    packages = ("diffusers", "transformers", "xformers", "triton")
    return {
        "gpu": gpu,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else None,
        "driver": _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else None,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _git(*arguments: str) -> str | None:
    return _ask("git", "-C", str(ROOT), *arguments)


def _ask(*command: str) -> str | None:
    """What a command says in its first line; None if there is none, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


if __name__ == "__main__":
    main()
