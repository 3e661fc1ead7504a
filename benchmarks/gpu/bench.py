"""The measurements of a workload: each function returns cells of the result file."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu import measure
from benchmarks.gpu import options as speed
from benchmarks.gpu.options import BASE, OPTIONS, Options
from benchmarks.gpu.pipelines import drive, make_row
from benchmarks.gpu.systems import Ours, Stock, items
from benchmarks.gpu.workloads import Item, build, random_inputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.gpu.systems import System
    from benchmarks.gpu.workloads import Parts, Workload
    from deployments.engine.row import Pixels

    Values = dict[str, Any]
    Make = Callable[[Parts], System]

ROUNDS = 3
SWEEP = (1, 2, 4, 8, 16)
UNET_ROWS = (1, 2, 4, 8, 16)
LEAST_GAIN = 1.02
"""A smaller gain counts as noise."""
COMPILE_S = {"compile": 90, "compile_reduce_overhead": 120, "compile_max_autotune": 300}
"""Seconds that an option takes to compile and measure."""
_SWEEP_GAIN = 1.03
_COMPANY_SEEDS = 4
_PROBE_SEED = 7


class NotMeasured(Exception):
    """Why a figure is missing. The result file states it, and a later call tries again."""


class Budget:
    """The remaining time.

    Args:
        seconds: from now.
        clock: seconds, monotonic.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until_s = clock() + seconds

    @property
    def left_s(self) -> float:
        return self._until_s - self._clock()


@dataclass(slots=True)
class Bench:
    """What the tasks of one workload share; its networks are built on first use.

    Attributes:
        cells: of the whole file, by `workload/what`.
        rounds: of interleaved runs.
    """

    workload: Workload
    device: str
    tiny: bool
    cells: dict[str, Values]
    budget: Budget
    rounds: int = ROUNDS
    known: Parts | None = None
    kept: dict[str, tuple[System, Values]] = field(default_factory=dict)
    picture: Pixels | None = None

    @property
    def parts(self) -> Parts:
        if self.known is None:
            self.known = build(self.workload, self.device, tiny=self.tiny)
        return self.known

    @property
    def reference(self) -> Pixels | None:
        """Stock's picture of the probe; None if it does not fit the device."""
        if self.picture is None:
            with suppress(torch.OutOfMemoryError):
                self.picture = Stock(self.parts).run([self.probe])[0]
        return self.picture

    @property
    def probe(self) -> Item:
        return Item(self.workload.request, _PROBE_SEED)

    def release(self) -> None:
        for system, _ in self.kept.values():
            system.close()
        self.kept, self.known, self.picture = {}, None, None
        measure.free_memory()


def headline_cells(workload: Workload) -> list[str]:
    """The systems that are compared on a workload."""
    if not workload.mixed:
        return ["stock", "stock-best", "ours"]
    fair = ["old-safe-vae"] if workload.upcast else []
    mixed = [] if workload.brief else ["old-mixed", "ours-mixed"]
    return ["old", *fair, "stock", "stock-best", "ours", *mixed]


def headline(bench: Bench) -> dict[str, Values]:
    """The old worker loop, stock diffusers and ours, in turns."""
    batch, sweep = best_batch(bench)
    upcast = bench.workload.upcast
    makes: dict[str, Make] = {
        "old": lambda parts: Stock(parts, sliced=True, upcast=upcast),
        "old-safe-vae": lambda parts: Stock(parts, sliced=True),
        "stock": Stock,
        "stock-best": lambda parts: Stock(parts, batch),
        "ours": ours,
        "old-mixed": lambda parts: Stock(parts, load="mixed", sliced=True, upcast=upcast),
        "ours-mixed": lambda parts: Ours(parts, BASE, load="mixed"),
    }
    found = compare(bench, {name: makes[name] for name in headline_cells(bench.workload)})
    if "stock-best" in found:
        found["stock-best"]["sweep"] = sweep
    return found | {"flops": measure.image_flops(bench.workload, tiny=bench.tiny)}


def ours(parts: Parts) -> Ours:
    """Ours as deployments/ has it."""
    return Ours(parts, BASE)


def best_batch(bench: Bench) -> tuple[int, dict[int, float]]:
    """Stock's fastest batch, doubled until it gains nothing, and images a second by batch."""
    rates: dict[int, float] = {}
    for batch in SWEEP[:2] if bench.tiny else SWEEP:
        try:
            system = Stock(bench.parts, batch)
            work = partial(system.run, items(bench.parts, "uniform", batch))
            # The first calls are slower.
            seconds = min(measure.timed(work) for _ in range(3 if bench.parts.timed else 1))
        except torch.OutOfMemoryError:
            break
        former, rates[batch] = max(rates.values(), default=0), batch / seconds
        if rates[batch] < _SWEEP_GAIN * former:
            break
    measure.free_memory()
    if not rates:
        raise NotMeasured("out of memory")
    return max(rates, key=rates.__getitem__), rates


def compare(bench: Bench, makes: dict[str, Make]) -> dict[str, Values]:
    """Run several systems in turns; returns a cell for each."""
    opened: dict[str, System] = {}
    cells: dict[str, Values] = {}
    try:
        for name, make in makes.items():
            with suppress(torch.OutOfMemoryError):
                opened[name], cells[name] = _open(bench, name, make)
        runs = measure.interleaved(
            bench.parts, opened, bench.rounds, lambda: bench.budget.left_s < 0
        )
        for name, system in opened.items():
            cells[name] |= measure.summary(runs[name]) | _single_picture(bench, system)
            cells[name]["times"] = {
                other: measure.ratio(runs[name].rates, runs[other].rates)
                for other in opened
                if other != name
            }
        return cells
    finally:
        for name, system in opened.items():
            if name not in bench.kept:
                system.close()
        opened.clear()
        measure.free_memory()


def _open(bench: Bench, name: str, make: Make) -> tuple[System, Values]:
    """A warm system, and its warm-up and memory. The baseline of all options stays open."""
    if name in bench.kept:
        system, took = bench.kept[name]
        return system, dict(took)
    parts = bench.parts
    footprint = measure.Footprint(bench.device)
    system = make(parts)
    start_s = time.perf_counter()
    try:
        system.warm_up()
        took = {"warm_up_s": time.perf_counter() - start_s}
        load = items(parts, system.load, system.batch)
        took |= footprint.measure(partial(system.run, load), system.shared_bytes)
    except BaseException:
        system.close()
        raise
    if name == "ours":
        bench.kept[name] = (system, took)
    return system, dict(took)


def _single_picture(bench: Bench, system: System) -> Values:
    """Seconds of a single request, and how its picture differs from stock's."""
    values: Values = {"load": system.load, "batch": system.batch, "grouped": system.grouped}
    pictures: list[Pixels] = []
    probe = [bench.probe]
    values["alone_s"] = measure.timed(lambda: pictures.extend(system.run(probe)))
    reference = bench.reference
    alike = None if reference is None else measure.likeness(pictures[0], reference)
    return values | {"likeness": alike}


def network_rows(bench: Bench) -> dict[str, Values]:
    """Seconds of one pass, by its number of rows."""
    parts, seconds = bench.parts, dict[int, float]()
    for rows in UNET_ROWS[:2] if bench.tiny else UNET_ROWS:
        work = _pass(parts, rows)
        try:
            seconds[rows] = measure.device_seconds(work, bench.device)
        except torch.OutOfMemoryError:
            break
    measure.free_memory()
    if not seconds:
        raise NotMeasured("out of memory")
    return {"unet": {"seconds_by_rows": seconds}}


def _pass(parts: Parts, rows: int) -> Callable[[], Any]:
    if parts.unet is None:
        side = parts.workload.size_px
        x = torch.rand(rows, 3, side, side, device=parts.device).to(parts.dtype)
        return torch.inference_mode()(partial(parts.network, x))
    inputs = random_inputs(parts.workload.model, parts.unet, rows, parts.workload.size_px)
    return torch.inference_mode()(partial(parts.unet, **inputs))


def company(bench: Bench) -> dict[str, Values]:
    """How far a picture depends on rows in the same passes, and what avoiding that costs."""
    group = bench.workload.group
    levels = {
        "default": Options(group=group),
        "padded": Options(group=group, padded=True, one_size=True),
        "exact": Options(exact=True),
    }
    differences = {
        name: _differences(bench, Ours(bench.parts, options)) for name, options in levels.items()
    }
    makes: dict[str, Make] = {
        name: partial(Ours, options=levels[name]) for name in ("padded", "exact")
    }
    cells = _require(compare(bench, {"ours": ours, **makes}), "ours", *makes)
    entries: Values = {"default": {"levels": differences["default"], "times_ours": (1.0, 1.0)}}
    for name in makes:
        times = cells[name]["times"]["ours"]
        entries[name] = {"levels": differences[name], "times_ours": times}
    return {"company": {"by_level": entries, "group": group}}


def _differences(bench: Bench, system: Ours) -> int:
    """The largest difference, in 8-bit levels, between pictures made alone and in groups."""
    try:
        system.warm_up()
        singles = items(bench.parts, "uniform", _COMPANY_SEEDS)
        alone = [drive(system.pipeline, [make_row(bench.parts, item)])[0] for item in singles]
        load = items(bench.parts, "uniform", 4 * max(system.batch, 2), _COMPANY_SEEDS)
        pictures = system.run(load)
        pairs = zip(load, pictures, strict=True)
        return max(measure.likeness(p, alone[item.seed])["levels"] for item, p in pairs)
    finally:
        system.close()
        measure.free_memory()


def _require(cells: dict[str, Values], *names: str) -> dict[str, Values]:
    """The cells, if all of these names have one.

    Raises:
        NotMeasured: one did not fit the device.
    """
    if not set(names) <= set(cells):
        raise NotMeasured("out of memory")
    return cells


def option_task(name: str) -> Callable[[Bench], dict[str, Values]]:
    """The measurement of one option against ours without it."""

    def fill(bench: Bench) -> dict[str, Values]:
        if why := speed.missing(name, bench.device):
            raise NotMeasured(why)
        key = f"option:{name}"
        makes: dict[str, Make] = {"ours": ours, key: partial(Ours, options=OPTIONS[name])}
        return {key: _require(compare(bench, makes), "ours", key)[key]}

    return fill


def best(bench: Bench) -> dict[str, Values]:
    """Every option that gains, together, against ours without them and the old worker loop."""
    workload, names = bench.workload, winners(bench.workload, bench.cells)
    if not names:
        raise NotMeasured("no option is known to gain")
    if bench.device == "cuda" and bench.budget.left_s < sum(COMPILE_S.get(n, 0) for n in names):
        raise NotMeasured("time")
    options = speed.combine(names)
    makes: dict[str, Make] = {"ours": ours, "winners": partial(Ours, options=options)}
    if workload.mixed:
        makes["old"] = partial(Stock, sliced=True, upcast=workload.upcast)
    if workload.mixed and not workload.brief:
        makes["winners-mixed"] = partial(Ours, options=options, load="mixed")
        makes["old-mixed"] = partial(Stock, load="mixed", sliced=True, upcast=workload.upcast)
    cells = _require(compare(bench, makes), "ours", "winners")
    found = {name: cells[name] for name in ("winners", "winners-mixed") if name in cells}
    return {name: cell | {"options": names} for name, cell in found.items()}


def winners(workload: Workload, cells: dict[str, Values]) -> list[str]:
    """The options that gain, among those tried so far."""
    gains: dict[str, float] = {}
    for name in OPTIONS:
        cell = cells.get(f"{workload.tunes}/option:{name}", {})
        if cell.get("status") == "measured":
            middle, lowest = cell["times"]["ours"]
            gains[name] = middle if lowest > 1 else 0.0
    known = speed.winners(gains, LEAST_GAIN)
    return [name for name in known if name in speed.applicable(workload)]
