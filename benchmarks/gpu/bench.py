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
from benchmarks.gpu.compiling import COMPILED
from benchmarks.gpu.options import OPTIONS, Options
from benchmarks.gpu.systems import Ours, Stock, items
from benchmarks.gpu.workloads import Item, build, random_inputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.gpu.systems import Load, System
    from benchmarks.gpu.workloads import Parts, Workload
    from deployments.engine.row import Pixels

    Values = dict[str, Any]
    Make = Callable[[Parts], System]

ROUNDS = 1
"""One is enough for ratios above 1.2: runs of this length differ by 3 % or so."""
BATCHES = (1, 2, 4, 8)
UNET_ROWS = (1, 2, 4, 8, 16)
LEAST_GAIN = 1.02
"""A smaller gain counts as noise."""
_BATCH_GAIN = 1.03
_COMPANY_SEEDS = 4
_PROBE_SEED = 7


class NotMeasured(Exception):
    """Why a figure is missing. The result file states it, and a later call tries again."""


@dataclass(slots=True)
class Bench:
    """What the tasks of one workload share; its networks are built on first use.

    Attributes:
        cells: of the whole file, by `workload/what`.
        until_s: the end of the budget, on the monotonic clock.
        rounds: of interleaved runs.
    """

    workload: Workload
    device: str
    tiny: bool
    cells: dict[str, Values]
    until_s: float
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
    def left_s(self) -> float:
        return self.until_s - time.monotonic()

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
        """Let go of everything on the device."""
        for system, _ in self.kept.values():
            system.close()
        self.kept, self.known, self.picture = {}, None, None
        measure.free_memory()


def headline_cells(workload: Workload) -> list[str]:
    """The systems that are compared on a workload; with `-mixed`, under its mixed load."""
    if not workload.mixed:
        return ["stock", "stock-best", "plain", "ours"]
    mixed = [] if workload.brief else ["old-mixed", "ours-mixed"]
    return ["old", "stock", "stock-best", "plain", "ours", *mixed]


def compiled_cells(workload: Workload) -> list[str]:
    """The systems whose networks are compiled."""
    if workload.name not in COMPILED:
        return []
    return ["full", "full-mixed"] if workload.mixed else ["full"]


def headline(bench: Bench) -> dict[str, Values]:
    """The old worker loop, stock diffusers and ours, in turns."""
    makes = _makes(bench.workload) | {"stock-best": partial(Stock, batch=best_batch(bench))}
    names = headline_cells(bench.workload)
    found = compare(bench, {name: makes[name.removesuffix("-mixed")] for name in names})
    return found | {"flops": measure.image_flops(bench.workload, tiny=bench.tiny)}


def compiled(bench: Bench) -> dict[str, Values]:
    """Ours with compiled networks, in turns with the old worker loop or with stock."""
    if bench.device != "cuda":
        raise NotMeasured("needs a GPU")
    if "seconds" not in bench.cells.get(f"{bench.workload.name}/compiling", {}):
        raise NotMeasured("not compiled in time")
    workload, makes = bench.workload, _makes(bench.workload)
    names = compiled_cells(workload)
    # One is enough beside it, because a lease is short: the headline has the others.
    beside = ["old"] if workload.mixed else ["stock"]
    cells = compare(
        bench, {name: makes[name.removesuffix("-mixed")] for name in (*names, *beside)}, *names[:1]
    )
    return {name: cells[name] for name in names}


def _makes(workload: Workload) -> dict[str, Make]:
    return {
        "old": partial(Stock, sliced=True, upcast=workload.upcast),
        "stock": Stock,
        "plain": partial(Ours, options=speed.PLAIN),
        "ours": Ours,
        "full": partial(Ours, options=speed.FULL),
    }


def best_batch(bench: Bench) -> int:
    """Stock's fastest batch, doubled until it gains nothing."""
    rates: dict[int, float] = {}
    for batch in BATCHES[:2] if bench.tiny else BATCHES:
        try:
            system = Stock(bench.parts, batch)
            work = partial(system.run, items(bench.parts, "uniform", batch))
            # The first calls are slower.
            seconds = min(measure.timed(work) for _ in range(2 if bench.parts.timed else 1))
        except torch.OutOfMemoryError:
            break
        former, rates[batch] = max(rates.values(), default=0), batch / seconds
        if rates[batch] < _BATCH_GAIN * former:
            break
    measure.free_memory()
    if not rates:
        raise NotMeasured("out of memory")
    return max(rates, key=rates.__getitem__)


def compare(bench: Bench, makes: dict[str, Make], *needed: str) -> dict[str, Values]:
    """Run several systems in turns; returns a cell for each that fits the device.

    Args:
        makes: by name of the cell; `-mixed` runs the same system under the mixed load.
        needed: cells without which the others mean nothing.

    Raises:
        NotMeasured: one of the needed ones does not fit.
    """
    opened: dict[str, System] = {}
    cells: dict[str, Values] = {}
    try:
        for name in dict.fromkeys(name.removesuffix("-mixed") for name in makes):
            with suppress(torch.OutOfMemoryError):
                opened[name], cells[name] = _open(bench, name, makes[name])
        if not set(needed) <= set(opened):
            raise NotMeasured("out of memory")
        runs: dict[str, tuple[System, Load]] = {
            name: (opened[base], "mixed" if name != base else "uniform")
            for name in makes
            if (base := name.removesuffix("-mixed")) in opened
        }
        rates = measure.interleaved(bench.parts, runs, bench.rounds, lambda: bench.left_s < 0)
        return {
            name: cells[name.removesuffix("-mixed")]
            | measure.summary(bench.workload, name, load, rates)
            | _single_picture(bench, system)
            for name, (system, load) in runs.items()
        }
    finally:
        for name, system in opened.items():
            if name not in bench.kept:
                system.close()
        opened.clear()
        measure.free_memory()


def _open(bench: Bench, name: str, make: Make) -> tuple[System, Values]:
    """A warm system, its memory and its preparation. The baseline of all options stays open."""
    if name not in bench.kept:
        parts, before = bench.parts, measure.memory()
        system = make(parts)
        try:
            system.warm_up()
            load = items(parts, "uniform", system.batch)
            took = measure.footprint(partial(system.run, load), before, system.shared_bytes)
            took["prepared_s"] = system.prepared_s
        except BaseException:
            system.close()
            raise
        if name != "ours":
            return system, took
        bench.kept[name] = (system, took)
    system, took = bench.kept[name]
    return system, dict(took)


def _single_picture(bench: Bench, system: System) -> Values:
    """Seconds of a single request, and how its picture differs from stock's."""
    pictures: list[Pixels] = []
    alone_s = measure.timed(lambda: pictures.extend(system.run([bench.probe])))
    reference = bench.reference
    psnr_db = None if reference is None else measure.psnr_db(pictures[0], reference)
    return {"grouped": system.grouped, "alone_s": alone_s, "psnr_db": psnr_db}


def network_rows(bench: Bench) -> dict[str, Values]:
    """Seconds of one pass, by its number of rows."""
    seconds: dict[int, float] = {}
    for rows in UNET_ROWS[:2] if bench.tiny else UNET_ROWS:
        try:
            seconds[rows] = measure.device_seconds(_pass(bench.parts, rows), bench.device)
        except torch.OutOfMemoryError:
            break
    measure.free_memory()
    if not seconds:
        raise NotMeasured("out of memory")
    return {"unet": {"seconds_by_rows": seconds}}


def gaps(bench: Bench) -> dict[str, Values]:
    """How much longer a step takes than its pass of the UNet, as a share of the pass."""
    found: dict[str, dict[int, float]] = {}
    for name, options in (("plain", speed.PLAIN), ("ours", speed.BASE)):
        system = Ours(bench.parts, options)
        try:
            if bench.parts.timed:
                system.prepare()
            counts = dict.fromkeys((1, bench.workload.group))
            found[name] = {count: _gap(bench, system, count) for count in counts}
        finally:
            system.close()
            measure.free_memory()
    return {"gaps": {"shares": found}}


def _gap(bench: Bench, system: Ours, count: int) -> float:
    rows = system.begun(count)
    step_s = measure.device_seconds(partial(system.pipeline.step, rows), bench.device)
    network = torch.inference_mode()(system.pipeline.pass_of(rows))
    return step_s / measure.device_seconds(network, bench.device) - 1


def _pass(parts: Parts, rows: int) -> Callable[[], Any]:
    side = parts.workload.size_px
    if parts.unet is None:
        x = torch.rand(rows, 3, side, side, device=parts.device).to(parts.dtype)
        return torch.inference_mode()(partial(parts.network, x))
    inputs = random_inputs(parts.workload.model, parts.unet, rows, side)
    return torch.inference_mode()(partial(parts.unet, **inputs))


def company(bench: Bench) -> dict[str, Values]:
    """How far a picture depends on rows in the same passes, in 8-bit levels."""
    system = Ours(bench.parts, Options(group=bench.workload.group))
    try:
        system.warm_up()
        singles = items(bench.parts, "uniform", _COMPANY_SEEDS)
        alone = [system.run_together([item])[0] for item in singles]
        load = items(bench.parts, "uniform", 4 * max(system.batch, 2), _COMPANY_SEEDS)
        pairs = zip(load, system.run(load), strict=True)
        levels = max(measure.levels(picture, alone[item.seed]) for item, picture in pairs)
    finally:
        system.close()
        measure.free_memory()
    return {"company": {"levels": levels}}


def option(name: str, bench: Bench) -> dict[str, Values]:
    """One option against ours without it."""
    if why := speed.missing(name, bench.device):
        raise NotMeasured(why)
    key = f"option:{name}"
    makes: dict[str, Make] = {"ours": Ours, key: partial(Ours, options=OPTIONS[name])}
    return {key: compare(bench, makes, *makes)[key]}
