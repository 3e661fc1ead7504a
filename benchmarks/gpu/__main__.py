"""Measures this machine's GPU and writes benchmarks/results/gpu-<name>-<date>.json and gpu.md.

    python -m benchmarks.gpu                        all, in order of importance, for nine minutes
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
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import machine
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
PACKAGES = ("diffusers", "transformers", "xformers", "triton")
_TINY_PEAK_SIZE = 64


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    parser.add_argument("--tiny", action="store_true", help="tiny networks: a dry run")
    parser.add_argument("--budget-s", type=float, default=540, help="start no longer task")
    parser.add_argument("--rounds", type=int, help="of runs in turns; default: 3, in a dry run 1")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="of task names; see --list")
    parser.add_argument("--resume", type=Path, metavar="JSON", help="a file to complete")
    parser.add_argument("--retry", action="store_true", help="with --resume: repeat what failed")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: {RESULTS}")
    parser.add_argument("--table", action="store_true", help="only write gpu.md from the files")
    parser.add_argument("--list", action="store_true", help="only print the names of the tasks")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; leave out --device for a dry run")
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
    """The results so far, and the name of their file."""
    facts = describe(args.device)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    commit = machine.first_line("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    session = {"date": date, "commit": commit}
    if args.resume is None:
        result: Values = {"dry_run": args.tiny, "machine": facts, "peak": {}, "sessions": []}
        result["cells"] = {}
        slug = re.sub(r"[^a-z0-9]+", "-", (facts["gpu"] or "dry-run").lower()).strip("-")
        path = f"gpu-{slug}-{date}.json"
    else:
        result, path = json.loads(args.resume.read_text(encoding="utf-8")), args.resume.name
        _check_same(result, facts, dry_run=args.tiny)
    if args.retry:
        for cell in result["cells"].values():
            cell["again"] = cell["status"] != "measured"
    result["sessions"].append(session)
    return result, path


def _check_same(result: Values, facts: Values, *, dry_run: bool) -> None:
    """One file holds the figures of one machine and one setup.

    Raises:
        SystemExit: they differ.
    """
    keys = [key for key in facts if result["machine"].get(key) != facts[key]]
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
