"""The result files, and gpu.md, which is made of them."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import options as speed
from benchmarks.gpu.bench import LEAST_GAIN, UNET_ROWS, compiled_cells, headline_cells
from benchmarks.gpu.compiling import COMPILED
from benchmarks.gpu.workloads import WORKLOADS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.gpu.workloads import Workload

    Values = dict[str, Any]

NOT_MEASURED = "not measured"
GIB = 2**30
SYSTEMS = {
    "old": "old worker loop",
    "stock": "stock, batch 1",
    "stock-best": "stock, best batch",
    "plain": "ours, plain passes",
    "ours": "ours, CUDA graphs",
    "full": "ours, compiled",
    "old-mixed": "old worker loop, mixed",
    "ours-mixed": "ours, CUDA graphs, mixed",
    "full-mixed": "ours, compiled, mixed",
}
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
  of clients waiting. **CUDA graphs** is a model of the registry as it is; **compiled** has
  `compile: full` besides; **plain passes** has `graphs: false`.
- **mixed**: strength, steps and guidance differ from request to request, which no stock batch can
  hold, and the images are not as much work as those of a uniform load: compare **rows/s**, the rows
  that the UNet works on a second; guidance makes two of a picture.
- **x old**: images a second against the old worker loop under the same load, the median of runs
  in turns within the same minute, and the lowest of them. **alone**: seconds of a lone request.
- **PSNR**: of one picture, over 8-bit levels; inf is the same picture.
- **GiB**: most memory allocated, and reserved, weights included. **peak**: arithmetic of UNet and
  autoencoder over the best measured matrix product. **prepare**: seconds of compiling and recording
  before the model is ready, with the compiled artefacts of `Compiling` at hand.
"""
COMPILING = """\
`compile: full` on an empty cache: seconds, and the size of the artefacts that spare another start
most of them. All at the same time on one machine, which makes each slower.
"""
PASSES = """\
One pass of the network alone: milliseconds a row, and share of the matrix peak. Guidance makes two
rows of a picture. Text and time inputs are random. **gap**: how much longer a step of the engine's
thread takes than its pass, as a share of the pass, by the number of pictures in it.
"""
OPTIONS = f"""\
Images a second of ours with the option over ours without it: the median of runs in turns, and the
lowest. An option gains if the median is at least {LEAST_GAIN} and no run lost. The last row is the
largest difference, in 8-bit levels, between a picture made alone and the same picture made in
changing company.
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
    return "\n".join([INTRODUCTION, *(_section(result) for result in results or [{}])])


def _section(result: Values) -> str:
    # A dry run times tiny networks on a processor.
    kept: Values = {} if result.get("dry_run") else result
    cells = kept.get("cells", {})
    peak = kept.get("peak", {}).get("flops", 0.0)
    parts = [_heading(result, peak), _systems(cells, peak), _compiling(cells)]
    parts += [_passes(cells, peak), _options(cells)]
    return "\n".join(parts)


def _heading(result: Values, peak: float) -> str:
    machine, sessions = result.get("machine", {}), result.get("sessions", [])
    said = [f"measured matrix peak: {f'{peak / 1e12:.0f} TFLOP/s' if peak else NOT_MEASURED}"]
    for key in ("driver", "cuda", "torch", "diffusers", "transformers", "xformers"):
        said.append(f"{key} {machine.get(key) or NOT_MEASURED}")
    if peak:
        said += sorted({each["date"] for each in sessions})
    note = "Dry run with tiny networks on a processor: only that the harness works.\n\n"
    shown = note if result.get("dry_run") else ""
    return f"## {machine.get('gpu') or 'No GPU'}\n\n{shown}{'; '.join(said)}.\n"


def _systems(cells: Values, peak: float) -> str:
    rows: list[list[str]] = []
    missing: list[str] = []
    for workload in WORKLOADS.values():
        for name in (*headline_cells(workload), *compiled_cells(workload)):
            if f"{workload.name}/{name}" in cells:
                rows.append(_system(cells, workload, name, peak))
            else:
                missing.append(f"{workload.name} {SYSTEMS[name]}")
    heads = ["workload", "system", "images/s", "rows/s", "spread", "alone, s", "most in a pass"]
    heads += ["GiB", "GiB reserved", "prepare, s", "peak", "x old", "x stock", "PSNR to stock, dB"]
    table = f"{_table(heads, rows, left=2)}\n" if rows else ""
    return f"### Systems\n\n{table}{_not_measured(missing)}"


def _not_measured(names: Sequence[str]) -> str:
    return f"Not measured: {'; '.join(names)}.\n" if names else ""


def _system(cells: Values, workload: Workload, name: str, peak: float) -> list[str]:
    key = f"{workload.name}/{name}"
    cell, first = cells.get(key, {}), [workload.name, SYSTEMS[name]]
    if "images_per_s" not in cell:
        return [*first, *[_gap(cell)] * 12]
    mixed = name.endswith("mixed")
    flops = cells.get(f"{workload.name}/flops", {}).get("image_mixed" if mixed else "image")
    return [
        *first,
        f"{cell['images_per_s']:.3g}",
        f"{cell['rows_per_s']:.3g}",
        f"{cell['spread']:.1%}",
        f"{cell['alone_s']:.3g}",
        str(cell["grouped"]),
        _number(cell["peak_bytes"], GIB),
        _number(cell["reserved_bytes"], GIB),
        _number(cell["prepared_s"]) if name in ("ours", "full") else "",
        f"{flops * cell['images_per_s'] / peak:.1%}" if flops and peak else NOT_MEASURED,
        _times(cells, key, "old-mixed" if mixed else "old"),
        "" if mixed else _times(cells, key, "stock"),
        _number(cell["psnr_db"]),
    ]


def _times(cells: Values, key: str, other: str) -> str:
    """How many times another system's images a second; empty where they were not compared."""
    cell = cells.get(key, {})
    if "times" not in cell:
        return _gap(cell)
    if other == key.partition("/")[2]:
        return "1"
    middle, lowest = cell["times"].get(other, (0, 0))
    return f"{middle:.2f} ({lowest:.2f})" if middle else ""


def _compiling(cells: Values) -> str:
    rows: list[list[str]] = []
    missing: list[str] = []
    for name in COMPILED:
        cell = cells.get(f"{name}/compiling")
        if cell is None:
            missing.append(name)
            continue
        amounts = (_number(cell.get("seconds")), _number(cell.get("bytes"), 2**20))
        rows.append([name, *(amounts if "seconds" in cell else [_gap(cell)] * 2)])
    heads = ["workload", "compile, s", "artefacts, MiB"]
    table = f"{_table(heads, rows, left=1)}\n" if rows else ""
    return f"### Compiling\n\n{COMPILING}\n{table}{_not_measured(missing)}"


def _passes(cells: Values, peak: float) -> str:
    rows: list[list[str]] = []
    missing: list[str] = []
    for name in WORKLOADS:
        if not (cell := cells.get(f"{name}/unet", {})):
            missing.append(name)
            continue
        flops = cells.get(f"{name}/flops", {}).get("row")
        line = [name, f"{flops / 1e12:.2f}" if flops else NOT_MEASURED]
        for count in UNET_ROWS:
            seconds = cell.get("seconds_by_rows", {}).get(str(count))
            share = f" ({flops * count / seconds / peak:.0%})" if seconds and flops and peak else ""
            line.append(f"{seconds / count * 1000:.3g}{share}" if seconds else _gap(cell))
        gaps = cells.get(f"{name}/gaps", {})
        line += [_shares(gaps, system) for system in ("plain", "ours")]
        rows.append(line)
    heads = ["workload", "TFLOP a row", *(f"{count} rows" for count in UNET_ROWS)]
    heads += ["gap, plain", "gap, CUDA graphs"]
    table = f"{_table(heads, rows, left=1)}\n" if rows else ""
    return f"### Passes\n\n{PASSES}\n{table}{_not_measured(missing)}"


def _shares(cell: Values, system: str) -> str:
    if not (shares := cell.get("shares", {}).get(system)):
        return _gap(cell)
    return ", ".join(f"{count}: {share:.1%}" for count, share in shares.items())


def _options(cells: Values) -> str:
    tried = [workload for workload in WORKLOADS.values() if workload.tuned_by is None]
    rows = [[name, *(_option(cells, each, name) for each in tried)] for name in speed.OPTIONS]
    if not any("/option:" in key or key.endswith("/company") for key in cells):
        return f"### Options\n\n{_not_measured(list(speed.OPTIONS))}"
    company = [cells.get(f"{each.name}/company", {}) for each in tried]
    rows.append(["**levels in company**", *(str(c.get("levels", _gap(c))) for c in company)])
    heads = ["option", *(each.name for each in tried)]
    return f"### Options\n\n{OPTIONS}\n{_table(heads, rows, left=1)}"


def _option(cells: Values, workload: Workload, name: str) -> str:
    if name not in speed.applicable(workload):
        return "does not apply"
    cell = cells.get(f"{workload.name}/option:{name}", {})
    if "times" not in cell:
        return _gap(cell)
    gain, lowest = cell["times"]["ours"]
    gains = gain >= LEAST_GAIN and lowest > 1
    return f"{gain:.3f} ({lowest:.3f}), {'gains' if gains else 'no gain'}"


def _gap(cell: Values) -> str:
    why = cell.get("why")
    return f"{NOT_MEASURED} ({why})".replace("|", "/") if why else NOT_MEASURED


def _number(amount: float | None, unit: int = 1) -> str:
    return NOT_MEASURED if amount is None else f"{amount / unit:.1f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    rule = ["---"] * left + ["--:"] * (len(heads) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *rows)) + "\n"
