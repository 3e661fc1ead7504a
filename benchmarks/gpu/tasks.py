"""The measurements in order of importance, and how they fill the result file in limited time.

A cell of the file holds figures, or `why` there are none, and whether to try `again`.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu import bench as measurements
from benchmarks.gpu import options as speed
from benchmarks.gpu.bench import ROUNDS, Bench, NotMeasured, headline_cells
from benchmarks.gpu.systems import quiet
from benchmarks.gpu.workloads import WORKLOADS
from deployments.engine.device import is_fatal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.gpu.workloads import Workload

    Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """A measurement that fills cells.

    Attributes:
        workload: what it measures.
        what: its name, without the workload's.
        fill: returns the cells, named without the workload.
        cells: their names.
        expected_s: it is not started with less time left.
        phase: tasks of a lower one come first.
    """

    workload: Workload
    what: str
    fill: Callable[[Bench], dict[str, Values]]
    cells: tuple[str, ...]
    expected_s: float
    phase: int

    @property
    def name(self) -> str:
        return f"{self.workload.name}/{self.what}"

    def key(self, cell: str) -> str:
        """The cell's name in the file."""
        return f"{self.workload.name}/{cell}"


def tasks() -> list[Task]:
    """All measurements: the systems on the workloads that are compiled, the compiled systems, the
    other workloads, the options, the rest.
    """
    return sorted(
        (task for workload in WORKLOADS.values() for task in _tasks(workload)),
        key=lambda task: task.phase,
    )


def _tasks(workload: Workload) -> list[Task]:
    compiled = measurements.compiled_cells(workload)
    phase = 4 if workload.brief else 0 if compiled else 2
    names = ("flops", *headline_cells(workload))
    made = [
        Task(workload, "headline", measurements.headline, names, 40, phase),
        Task(workload, "unet", measurements.network_rows, ("unet",), 10, phase),
    ]
    if workload.scheduler is not None:
        made.append(Task(workload, "gaps", measurements.gaps, ("gaps",), 10, phase))
    if compiled:
        made.append(Task(workload, "compiled", measurements.compiled, tuple(compiled), 120, 1))
    if workload.tuned_by is None:
        for name in speed.applicable(workload):
            what = f"option:{name}"
            made.append(Task(workload, what, partial(measurements.option, name), (what,), 20, 3))
        made.append(Task(workload, "company", measurements.company, ("company",), 20, 3))
    return made


def run(
    work: Sequence[Task],
    cells: dict[str, Values],
    write: Callable[[], None],
    *,
    device: str,
    tiny: bool,
    budget_s: float,
) -> None:
    """Do what is missing while time allows; write after every task.

    Raises:
        BaseException: the device is unusable; everything measured is written.
    """
    quiet()
    bench, until_s = None, time.monotonic() + budget_s
    for task in work:
        if is_done(task, cells):
            continue
        if until_s - time.monotonic() < (0 if tiny else task.expected_s):
            _put(cells, task, {}, "time", again=True)
            continue
        if bench is None or bench.workload.name != task.workload.name:
            if bench is not None:
                bench.release()
            workload = task.workload.tiny() if tiny else task.workload
            bench = Bench(workload, device, tiny, cells, until_s, rounds=1 if tiny else ROUNDS)
        start_s = time.monotonic()
        try:
            _do(task, bench)
        finally:
            seconds = time.monotonic() - start_s
            filled = [cells.get(task.key(cell), {}) for cell in task.cells]
            reasons = sorted({cell["why"] for cell in filled if "why" in cell})
            print(f"{task.name}, {seconds:.0f} s", *reasons, file=sys.stderr)
            write()
    if bench is not None:
        bench.release()
    write()


def is_done(task: Task, cells: dict[str, Values]) -> bool:
    """Whether repeating the task would add nothing."""
    found = [cells.get(task.key(cell), {"again": True}) for cell in task.cells]
    return not any(cell.get("again") for cell in found)


def _do(task: Task, bench: Bench) -> None:
    reasons = LastError()
    logger = logging.getLogger("ray.serve.imagen.engine")
    logger.addHandler(reasons)
    try:
        # A task leaves out the cells of systems that ran out of memory.
        why = "out of memory" if bench.device == "cuda" else "needs a GPU"
        _put(bench.cells, task, task.fill(bench), why)
    except NotMeasured as error:
        _put(bench.cells, task, {}, str(error), again=True)
    # Libraries raise all kinds of errors, and the next task may succeed.
    except Exception as error:
        if is_fatal(error) and not _works(bench.device):
            _put(bench.cells, task, {}, "the GPU failed", again=True)
            raise
        full = isinstance(error, torch.OutOfMemoryError)
        why = "out of memory" if full else f"failed: {reasons.text or repr(error)}"[:300]
        _put(bench.cells, task, {}, why)
        bench.release()
    finally:
        logger.removeHandler(reasons)


def _works(device: str) -> bool:
    """Whether the device still computes, as it does after a CUDA graph failed to record."""
    try:
        return torch.ones(1, device=device).sum().item() == 1
    except RuntimeError:
        return False


class LastError(logging.Handler):
    """Keeps the last error: only the engine's log says why a row failed."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            error = record.exc_info[1] if record.exc_info else None
            self.text = repr(error) if error else record.getMessage().strip().splitlines()[-1]


def _put(
    cells: dict[str, Values],
    task: Task,
    found: dict[str, Values],
    why: str,
    *,
    again: bool = False,
) -> None:
    """Fill a task's cells. A missing one states the reason; a figure from an earlier call stays."""
    for cell in task.cells:
        key = task.key(cell)
        if cell in found:
            cells[key] = found[cell]
        elif not again or "why" in cells.get(key, {"why": ""}):
            cells[key] = {"why": why, "again": again}
