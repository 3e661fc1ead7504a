"""A report as tables, and as a plot."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from cli.console import make_table
from deployments.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

    from benchmarks.load.report import Record, Report, Spread, Summary

NOT_MEASURED = "not measured"
_BUSY = 0.8


def tables(report: Report) -> list[Table]:
    """Figures by task, then failures and batches if there are any."""
    names = ("Task", "OK", "Of", "p50 s", "p95 s", "p99 s", "Mean s", "Max s")
    slow = ("Slowdown p50", "p95", "p99") if report.total.slowdown else ()
    main = make_table(*names, *slow)
    rows = report.tasks | {"all": report.total} if len(report.tasks) != 1 else report.tasks
    for name, summary in rows.items():
        main.add_row(name, *_cells(summary, with_slowdown=bool(slow)))
    found = [main]
    if failures := _failures(report):
        table = make_table("Without a picture", "Requests", "For example")
        for name, count, detail in failures:
            table.add_row(name, str(count), detail)
        found.append(table)
    if report.batch_sizes:
        table = make_table("Batch size", "Pictures")
        for size, count in report.batch_sizes.items():
            table.add_row(str(size), str(count))
        found.append(table)
    return found


def lines(report: Report) -> list[str]:
    """The lines below the tables."""
    stages = ", ".join(f"{name} {_digits(s)} s" for name, s in report.stages_s.items())
    machine = report.machine
    found = [
        f"Images per second  {report.images_per_s:.3f} ({report.succeeded} in"
        f" {report.wall_s:.1f} s)",
        f"Mean of stages     {stages or NOT_MEASURED}",
        f"GPU-seconds        {_gpu(report)}",
        f"Sent late by       {_lag(report.send_lag_s)}",
        f"Machine            {machine.processor}, {machine.cores} cores, load"
        f" {machine.load_before:.1f} before and {machine.load_after:.1f} after",
    ]
    if report.total.outcomes["timeout"]:
        found.append("Percentiles leave out timed-out requests, so the true ones are higher.")
    if report.succeeded and machine.generator_cpu_share > _BUSY:
        found.append(
            f"The generator used {machine.generator_cpu_share:.0%} of a core, so latencies include"
            " its own delays."
        )
    if report.interrupted:
        found.append("Stopped early: the figures cover what was done until then.")
    return found


def title(report: Report) -> str:
    """The plan and the server in one line."""
    plan = report.plan
    how = f"{plan.rate_per_s:g} per s" if plan.rate_per_s else f"{plan.concurrency} clients"
    return f"{plan.name}: {plan.mode}, {how}, seed {plan.seed}, {report.protocol} {report.url}"


def _cells(summary: Summary, *, with_slowdown: bool) -> list[str]:
    latency, slowdown = summary.latency_s, summary.slowdown
    cells = [str(summary.outcomes["ok"]), str(sum(summary.outcomes.values()))]
    cells += _percentiles(latency)
    cells += [_digits(latency.mean), _digits(latency.max)] if latency else ["-", "-"]
    return cells + (_percentiles(slowdown) if with_slowdown else [])


def _percentiles(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["-"] * 3
    return [_digits(value) for value in (spread.p50, spread.p95, spread.p99)]


def _digits(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _lag(lag: Spread | None) -> str:
    if lag is None:
        return NOT_MEASURED
    return f"p99 {_digits(lag.p99)} s, at most {_digits(lag.max)} s (the generator; in latency)"


def _failures(report: Report) -> list[tuple[str, int, str]]:
    """Name, number and one example of each kind of failure; the most frequent first."""
    found: dict[str, list[Record]] = {}
    for record in report.records:
        if record.outcome != "ok":
            words = [record.outcome.replace("_", " "), *([record.code] if record.code else [])]
            found.setdefault(": ".join(words), []).append(record)
    rows = [(name, len(some), " ".join(some[0].detail.split())) for name, some in found.items()]
    return sorted(rows, key=lambda row: -row[1])


def _gpu(report: Report) -> str:
    if report.gpu_seconds is None:
        return NOT_MEASURED
    text = f"{report.gpu_seconds:.2f}, {report.gpu_seconds / report.succeeded:.3f} per picture"
    if report.usd_per_1000_images is not None:
        text += (
            f"; {report.usd_per_1000_images:.2f} USD per 1,000 pictures at"
            f" {report.usd_per_gpu_hour:g} USD per GPU-hour"
        )
    return text


def check_plot() -> None:
    """Raises ConfigError if matplotlib is missing; to be called before a long run."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "A plot needs matplotlib, which is not installed.",
            remedy="Install the extra `dev` (`make setup`), or leave out --plot.",
        )


def plot(report: Report, path: Path) -> None:
    """Draw latency by task, latency over time, and batch sizes.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check_plot()
    # pyplot would keep global state and may open a window.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title(report))
    cdf, over_time, batches = figure.subplots(1, 3)
    _draw_latencies(report, cdf, over_time)
    sizes = report.batch_sizes
    batches.bar([str(size) for size in sizes], list(sizes.values()))
    batches.set(xlabel="batch size", ylabel="pictures", title="Batches")
    if not sizes:
        batches.text(0.5, 0.5, NOT_MEASURED, ha="center", transform=batches.transAxes)
    figure.savefig(path, format="png", dpi=110)


def _draw_latencies(report: Report, cdf: Any, over_time: Any) -> None:
    for position, task in enumerate(report.tasks):
        done = [r for r in report.records if r.task == task and r.outcome == "ok"]
        due_s, latency_s = [r.due_s for r in done], [r.latency_s for r in done]
        if done:
            cdf.ecdf(latency_s, color=f"C{position}", label=task)
        over_time.scatter(due_s, latency_s, s=9, color=f"C{position}", label=task)
    failed = [r for r in report.records if r.outcome != "ok"]
    if failed:
        due_s, latency_s = [r.due_s for r in failed], [r.latency_s for r in failed]
        over_time.scatter(due_s, latency_s, s=16, marker="x", color="black", label="no picture")
    cdf.set(xlabel="latency, s", ylabel="share of pictures", title="Latency", ylim=(0, 1.02))
    over_time.set(xlabel="arrival, s after the start", ylabel="latency, s", title="Over time")
    if report.succeeded:
        cdf.set_xscale("log")  # latencies of tasks differ by a factor of a hundred
        cdf.legend()
    if report.records:
        over_time.legend()
