"""`imagen bench`: sends the requests of a plan to any image server, and reports what it measured.

    report = run(load_plan(Path("benchmarks/plans/mixed.yaml")), "http://127.0.0.1:8000")

plan.py (what to send) → workload.py (the requests as data) → runner.py (when to send) → client.py
and protocols.py (one request) → report.py (the figures).
"""

from benchmarks.load.plan import Plan, load_plan, parse_plan
from benchmarks.load.report import Report, load_report, unloaded_of
from benchmarks.load.runner import run, run_async, run_whole
from deployments.errors import Unreachable

__all__ = [
    "Plan",
    "Report",
    "Unreachable",
    "load_plan",
    "load_report",
    "parse_plan",
    "run",
    "run_async",
    "run_whole",
    "unloaded_of",
]
