"""The result files, and gpu.md, which is made of them."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import options as speed
from benchmarks.gpu.bench import LEAST_GAIN, UNET_ROWS, headline_cells
from benchmarks.gpu.workloads import WORKLOADS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from benchmarks.gpu.workloads import Workload

    Values = dict[str, Any]

NOT_MEASURED = "not measured"
GIB = 2**30
TARGET = 4.0
TARGET_DB = 40.0
MOST_COST = 0.05
SYSTEMS = {
    "old": "old worker loop",
    "old-safe-vae": "old worker loop, with our autoencoder",
    "stock": "stock, batch 1",
    "stock-best": "stock, best batch",
    "ours": "ours",
    "winners": "ours, with what gains",
    "old-mixed": "old worker loop, mixed",
    "ours-mixed": "ours, mixed",
    "winners-mixed": "ours, with what gains, mixed",
}
LEVELS = {"exact": "every row alone", "padded": "padded to one size", "default": "as they come"}
"""Strictest first."""

INTRODUCTION = """\
# GPU

The production architectures at full size with random weights: what a pass costs does not depend on
the values. Text encoders are left out of every system: all get embeddings. Made by
`make bench-gpu`, see [docs/benchmarks.md](../../docs/benchmarks.md#gpu). Nothing here is estimated:
what was not measured says so.

- **old worker loop**: stock diffusers, one request at a time, attention slicing, and the
  autoencoder of the model's own repository, which the refiner casts to float32 and back.
- **stock**: stock diffusers as it comes; the refiner with the float16-safe autoencoder. The best
  batch is the one that makes most images a second. Networks without steps: plain forward passes.
- **ours**: the denoiser and the autoencoder of `deployments/` behind the engine, two passes' worth
  of clients waiting; **mixed**: strength, steps and guidance differ from request to request, which
  no stock batch can hold, and the images are not as much work as those of a uniform load.
- **x old**: images a second against the old worker loop under the same load, the median of runs
  in turns within the same minute, and the lowest of them. **alone**: seconds of a lone request.
- **GiB**: most memory allocated, and reserved, weights included. **peak**: arithmetic of UNet and
  autoencoder over the best measured matrix product.
"""


def write_json(result: Values, path: Path) -> None:
    """Replace the file at once: a run may be stopped at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def write_table(folder: Path) -> Path:
    """Write `gpu.md` of a folder from its result files; returns its path."""
    files = sorted(folder.glob("gpu-*.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    path = folder / "gpu.md"
    path.write_text(render(results), encoding="utf-8")
    return path


def render(results: Sequence[Values]) -> str:
    """The whole page; a figure without a result is 'not measured'."""
    sections = [_section(result) for result in results or [{}]]
    return "\n".join([INTRODUCTION, *sections])


def _section(result: Values) -> str:
    # A dry run times tiny networks on a processor.
    cells: Values = {} if result.get("dry_run") else result.get("cells", {})
    peak = 0.0 if result.get("dry_run") else _peak(result)
    parts = [_heading(result, peak), _acceptance(cells), _systems(cells, peak), _rows(cells, peak)]
    parts += [_options(cells), _company(cells)]
    return "\n".join(parts)


def _peak(result: Values) -> float:
    return max((entry["flops"] for entry in result.get("peak", {}).values()), default=0.0)


def _heading(result: Values, peak: float) -> str:
    machine = result.get("machine", {})
    name = machine.get("gpu") or "No GPU"
    said = [f"measured matrix peak: {f'{peak / 1e12:.0f} TFLOP/s' if peak else NOT_MEASURED}"]
    for key in ("driver", "cuda", "torch", "diffusers", "transformers", "xformers"):
        said.append(f"{key} {machine.get(key) or NOT_MEASURED}")
    dates = sorted({session["date"] for session in result.get("sessions", [])})
    commits = sorted({s["commit"] for s in result.get("sessions", []) if s["commit"]})
    said += [f"measured on {', '.join(dates)}"] if dates and peak else []
    said += [f"commit {', '.join(commits)}"] if commits and peak else []
    note = "Dry run with tiny networks on a processor: only that the harness works.\n\n"
    return f"## {name}\n\n{note if result.get('dry_run') else ''}{'; '.join(said)}.\n"


def _acceptance(cells: Values) -> str:
    best = {name: _times(cells, f"enhance-1024/{name}", "old") for name in ("winners", "ours")}
    said = "; ".join(f"{SYSTEMS[name]}: {times}" for name, times in best.items())
    return (
        f"**Enhance (refiner, 1024 px, 30 steps at strength 0.3), images a second against the old"
        f" worker loop** (target {TARGET:g}): {said}.\n"
    )


def _systems(cells: Values, peak: float) -> str:
    rows: list[list[str]] = []
    for workload in WORKLOADS.values():
        names = headline_cells(workload)
        names.insert(names.index("ours") + 1, "winners")
        names += ["winners-mixed"] if "ours-mixed" in names else []
        rows += [_system(cells, workload, name, peak) for name in names]
    heads = ["workload", "system", "images/s", "spread", "s/image", "alone, s", "most in a pass"]
    heads += ["GiB", "GiB reserved", "peak", "x old", "x stock", "PSNR to stock, dB"]
    return f"### Systems\n\n{_table(heads, rows, left=2)}"


def _system(cells: Values, workload: Workload, name: str, peak: float) -> list[str]:
    key = f"{workload.name}/{name}"
    cell, first = cells.get(key, {}), [workload.name, SYSTEMS[name]]
    if cell.get("status") != "measured":
        return [*first, *[_gap(cell)] * 11]
    mixed = name.endswith("mixed")
    return [
        *first,
        f"{cell['images_per_s']:.3g}",
        f"{cell['spread']:.1%}",
        f"{cell['seconds_per_image']:.3g}",
        f"{cell['alone_s']:.3g}",
        str(cell["grouped"]),
        _gib(cell["peak_bytes"]),
        _gib(cell["reserved_bytes"]),
        _share(cells, workload, cell, peak, mixed=mixed),
        _times(cells, key, "old-mixed" if mixed else "old"),
        _times(cells, key, "stock") if not mixed else "",
        _likeness(cell["likeness"]),
    ]


def _likeness(found: Values | None) -> str:
    if found is None:
        return NOT_MEASURED
    psnr_db = found["psnr_db"]
    below = f" (below {TARGET_DB:g})" if psnr_db is not None and psnr_db < TARGET_DB else ""
    return "equal" if psnr_db is None else f"{psnr_db:.1f}{below}"


def _share(cells: Values, workload: Workload, cell: Values, peak: float, *, mixed: bool) -> str:
    flops = cells.get(f"{workload.name}/flops", {})
    amount = flops.get("image_mixed" if mixed else "image")
    return f"{amount * cell['images_per_s'] / peak:.1%}" if amount and peak else NOT_MEASURED


def _times(cells: Values, key: str, other: str) -> str:
    cell = cells.get(key, {})
    if cell.get("status") != "measured":
        return _gap(cell)
    if other == key.partition("/")[2]:
        return "1"
    if other not in cell["times"]:
        return "" if key.partition("/")[0] in _WITHOUT_OLD or other == "stock" else NOT_MEASURED
    middle, lowest = cell["times"][other]
    return f"{middle:.2f} ({lowest:.2f})"


_WITHOUT_OLD = {workload.name for workload in WORKLOADS.values() if not workload.mixed}


def _rows(cells: Values, peak: float) -> str:
    rows: list[list[str]] = []
    for workload in WORKLOADS.values():
        cell = cells.get(f"{workload.name}/unet", {})
        flops = cells.get(f"{workload.name}/flops", {}).get("row")
        known = cell.get("seconds_by_rows", {})
        line = [workload.name, f"{flops / 1e12:.2f}" if flops else NOT_MEASURED]
        for count in UNET_ROWS:
            seconds = known.get(str(count))
            line.append(_row(seconds, count, flops, peak) if seconds else _gap(cell))
        rows.append(line)
    heads = ["workload", "TFLOP a row", *(f"{count} rows" for count in UNET_ROWS)]
    about = (
        "One pass of the network alone: milliseconds a row, and share of the matrix peak. Guidance"
        " makes two rows of a picture. Text and time inputs are random.\n"
    )
    return f"### Passes\n\n{about}\n{_table(heads, rows, left=1)}"


def _row(seconds: float, count: int, flops: float | None, peak: float) -> str:
    share = f" ({flops * count / seconds / peak:.0%})" if flops and peak else ""
    return f"{seconds / count * 1000:.3g}{share}"


def _options(cells: Values) -> str:
    tried = [workload for workload in WORKLOADS.values() if workload.tuned_by is None]
    rows = [
        [title, *(_option(cells, workload, name) for workload in tried)]
        for name, title in speed.TITLES.items()
    ]
    on = [_switched_on(cells, workload) for workload in tried]
    rows.append(["**with what gains**", *on])
    about = (
        "Images a second of ours with the option over ours without it: the median of runs in"
        f" turns, and the lowest. An option gains if the median is at least {LEAST_GAIN} and no run"
        " lost.\n"
    )
    return f"### Options\n\n{about}\n{_table(['option', *(w.name for w in tried)], rows, left=1)}"


def _option(cells: Values, workload: Workload, name: str) -> str:
    if name not in speed.applicable(workload):
        return "does not apply"
    cell = cells.get(f"{workload.name}/option:{name}", {})
    if cell.get("status") != "measured":
        return _gap(cell)
    gain, lowest = cell["times"]["ours"]
    gains = gain >= LEAST_GAIN and lowest > 1
    return f"{gain:.3f} ({lowest:.3f}), {'gains' if gains else 'no gain'}"


def _switched_on(cells: Values, workload: Workload) -> str:
    cell = cells.get(f"{workload.name}/winners", {})
    if cell.get("status") != "measured":
        return _gap(cell)
    gain, lowest = cell["times"]["ours"]
    titles = ", ".join(speed.TITLES[name] for name in cell["options"])
    return f"{gain:.3f} ({lowest:.3f}): {titles}"


def _company(cells: Values) -> str:
    rows: list[list[str]] = []
    for workload in WORKLOADS.values():
        if workload.tuned_by is None:
            cell = cells.get(f"{workload.name}/company", {})
            rows += [_level(cell, workload.name, level) for level in LEVELS]
            rows.append([workload.name, f"strictest at {MOST_COST:.0%} at most", *_strictest(cell)])
    about = (
        "The largest difference, in 8-bit levels, between a picture made alone and the same picture"
        " made by the engine in changing company, and what that costs in images a second.\n"
    )
    heads = ["workload", "passes", "levels", "cost"]
    return f"### Company\n\n{about}\n{_table(heads, rows, left=2)}"


def _level(cell: Values, workload: str, level: str) -> list[str]:
    entry = cell.get("by_level", {}).get(level)
    if entry is None:
        return [workload, LEVELS[level], _gap(cell), _gap(cell)]
    return [workload, LEVELS[level], str(entry["levels"]), f"{_cost(entry):.1%}"]


def _strictest(cell: Values) -> list[str]:
    entries = cell.get("by_level", {})
    for level in LEVELS:
        if level in entries and _cost(entries[level]) <= MOST_COST:
            return [LEVELS[level], f"{_cost(entries[level]):.1%}"]
    return [_gap(cell)] * 2


def _cost(entry: Values) -> float:
    return 1 / entry["times_ours"][0] - 1


def _gap(cell: Values) -> str:
    why = cell.get("why")
    return f"{NOT_MEASURED} ({why})".replace("|", "/") if why else NOT_MEASURED


def _gib(amount_bytes: int | None) -> str:
    return NOT_MEASURED if amount_bytes is None else f"{amount_bytes / GIB:.1f}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> str:
    rule = ["---"] * left + ["--:"] * (len(heads) - left)
    line: Callable[[Sequence[str]], str] = lambda row: f"| {' | '.join(row)} |"  # noqa: E731
    return "\n".join([line(heads), f"|{'|'.join(rule)}|", *map(line, rows)]) + "\n"
