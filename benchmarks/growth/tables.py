"""The tables of docs/growth.md, in Markdown, from results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.growth.limits import Front

Values = dict[str, Any]


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], *, text: int = 1) -> str:
    """A table whose first columns are text and whose others are figures."""
    marks = ["---"] * text + ["--:"] * (len(names) - text)
    return "\n".join(f"| {' | '.join(line)} |" for line in (names, marks, *rows))


def comparison(rows: Iterable[Values]) -> str:
    """Real replicas, and how far the simulation is from them."""
    names = ["replicas", "load", "requests", "load average"]
    for figure in ("p50, s", "p95, s", "images/s"):
        names += [figure, "off by"]
    lines: list[list[str]] = []
    for row in rows:
        load = f"{row['load_average']:.1f}"
        cells = [str(row["replicas"]), row["load"], str(row["requests"]), load]
        for key in ("p50_s", "p95_s", "images_per_s"):
            cells += [f"{row['measured'][key]:.2f}", f"{row['error'][key]:+.0%}"]
        lines.append(cells)
    return _table(names, lines)


def growth(rows: Iterable[Values], asked: Iterable[Values]) -> str:
    """How many GPUs hold the percentile, and how many where routers ask replicas each time."""
    names = ["H100", "requests/s", "of what they can do", "p50, s", "p95, s", "ingress pods"]
    names += ["asked each time: requests/s", "of what they can do"]
    lines: list[list[str]] = []
    for row, other in zip(rows, asked, strict=True):
        cells = [str(row["gpus"]), *_rate(row), f"{row['p50_s']:.2f}", f"{row['p95_s']:.2f}"]
        lines.append([*cells, str(row["pods"]), *_rate(other)])
    return _table(names, lines, text=0)


def _rate(row: Values) -> list[str]:
    rate = f"{row['rate']:.3g}" if row["rate"] < 100 else f"{row['rate']:,.0f}"
    return [rate, f"{row['load']:.0%}"]


def _outcomes(row: Values) -> list[str]:
    return [f"{row[name]:.1%}" for name in ("ok", "refused", "late", "lost")]


def mornings(rows: Iterable[Values]) -> str:
    """The same sudden morning with different beginnings."""
    names = ["", "pictures", "429", "504", "lost", "p50, s", "p95, s", "GPU hours", "most GPUs"]
    return _table(
        names,
        [
            [
                row["variant"],
                *_outcomes(row),
                *(f"{row[key]:.1f}" for key in ("p50_s", "p95_s", "gpu_hours")),
                str(row["most_gpus"]),
            ]
            for row in rows
        ],
    )


def spots(rows: Iterable[Values]) -> str:
    """A fleet on spot machines."""
    names = ["mean life of a node", "GPUs", "pictures", "429", "504", "lost", "p50, s", "p95, s"]
    names.append("nodes lost in half an hour")
    return _table(
        names,
        [
            [
                f"{row['mean_life_h']} h" if row["mean_life_h"] else "none is lost",
                str(row["gpus"]),
                *(f"{row[name]:.2%}" for name in ("ok", "refused", "late", "lost")),
                f"{row['p50_s']:.2f}",
                f"{row['p95_s']:.2f}",
                f"{row['lost_nodes']:.0f}",
            ]
            for row in rows
        ],
    )


def limits(front: Front) -> str:
    """What stands before the GPUs, measured, and where it is the limit."""
    rows = (
        (
            "Serve's proxy",
            f"{front.proxy_s * 1000:.1f} ms of a core a request",
            f"{front.proxy_per_s:.0f} requests/s a pod",
        ),
        (
            "Ingress replica",
            f"{front.ingress_s * 1000:.1f} ms of a core a request",
            f"{front.ingress_per_s:.0f} requests/s a pod",
        ),
        (
            "Serve's controller",
            f"{front.controller_share:.1%} of a core, and"
            f" {front.controller_share_of_replica:.2%} for each replica",
            f"{front.controller_replicas:.0f} replicas of models",
        ),
        (
            "Redis, of jobs",
            f"{front.redis_jobs_per_s:,.0f} whole jobs/s, from one to the other end of the queue",
            f"{front.redis_jobs_per_s:,.0f} jobs/s, or more",
        ),
    )
    return _table(["what", "measured", "70 % of a core"], rows, text=3)
