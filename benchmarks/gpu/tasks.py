"""The measurements in order of importance, and how they fill the result file in limited time."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu import options as speed
from benchmarks.gpu.bench import (
    COMPILE_S,
    ROUNDS,
    Bench,
    NotMeasured,
    best,
    company,
    headline,
    headline_cells,
    network_rows,
    option_task,
    winners,
)
from benchmarks.gpu.options import OPTIONS
from benchmarks.gpu.systems import quiet
from benchmarks.gpu.workloads import WORKLOADS
from deployments.engine.engine import is_fatal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.gpu.bench import Budget
    from benchmarks.gpu.workloads import Workload

    Values = dict[str, Any]

_SECONDS = {"headline": 90, "company": 40, "unet": 10, "winners": 90, "option": 25}


@dataclass(frozen=True, slots=True)
class Task:
    """A measurement that fills cells.

    Attributes:
        name: `workload/what`.
        fill: returns the cells, named without the workload.
        cells: their names.
        expected_s: it is not started with less time left.
    """

    name: str
    fill: Callable[[Bench], dict[str, Values]]
    cells: tuple[str, ...]
    expected_s: float = 0.0


def tasks(workloads: Sequence[Workload]) -> list[Task]:
    """All measurements: the first workload with its most promising options, then the systems on
    the other workloads, then all options, then the rest.
    """
    made = [(workload, task) for workload in workloads for task in _tasks(workload)]
    phases: list[list[Task]] = [[] for _ in range(5)]
    for workload, task in made:
        phases[_phase(workload, task, first=workload is workloads[0])].append(task)
    # Repeated when all options are known, unless they change nothing.
    phases[2] += [task for task in phases[0] if task.fill is best]
    return [task for phase in phases for task in phase]


def _phase(workload: Workload, task: Task, *, first: bool) -> int:
    what = task.name.partition("/")[2]
    if first:
        later = [f"option:{name}" for name in list(OPTIONS)[speed.FIRST :]]
        return 2 if what in ("company", *later) else 0
    if workload.brief:
        return 4
    if what in ("headline", "unet"):
        return 1
    return 3 if workload.tuned_by is None else 4


def _tasks(workload: Workload) -> list[Task]:
    name = workload.name
    systems = ("flops", *headline_cells(workload))
    made = [
        Task(f"{name}/headline", headline, systems, _SECONDS["headline"]),
        Task(f"{name}/unet", network_rows, ("unet",), _SECONDS["unet"]),
    ]
    if workload.tuned_by is None:
        for option in speed.applicable(workload):
            expected_s = COMPILE_S.get(option, _SECONDS["option"])
            cells = (f"option:{option}",)
            made.append(Task(f"{name}/option:{option}", option_task(option), cells, expected_s))
        made.append(Task(f"{name}/company", company, ("company",), _SECONDS["company"]))
    mixed = bool(workload.mixed) and not workload.brief
    cells = ("winners", "winners-mixed") if mixed else ("winners",)
    made.append(Task(f"{name}/winners", best, cells, _SECONDS["winners"]))
    return made


def run(
    work: Sequence[Task],
    result: Values,
    budget: Budget,
    write: Callable[[], None],
    *,
    device: str,
    tiny: bool,
    rounds: int = ROUNDS,
) -> None:
    """Do what is missing while time allows; write after every task.

    Raises:
        BaseException: the device is unusable; everything measured is written.
    """
    quiet()
    cells, bench = result["cells"], None
    for task in work:
        if done(task, cells):
            continue
        if budget.left_s < (0 if tiny else task.expected_s):
            _put(cells, task, {}, "time", again=True)
            continue
        workload = _workload(task)
        if bench is None or bench.workload.name != workload.name:
            if bench is not None:
                bench.release()
            workload = workload.tiny() if tiny else workload
            bench = Bench(
                workload, device=device, tiny=tiny, cells=cells, budget=budget, rounds=rounds
            )
        start_s = time.monotonic()
        try:
            _do(task, bench)
        finally:
            seconds = time.monotonic() - start_s
            print(f"{task.name}, {seconds:.0f} s: {_one_line(task, cells)}", file=sys.stderr)
            write()
    if bench is not None:
        bench.release()
    write()


def _one_line(task: Task, cells: dict[str, Values]) -> str:
    """A task's results for the terminal."""
    parts: list[str] = []
    for name in task.cells:
        cell = cells.get(_key(task, name), {})
        if "images_per_s" in cell:
            parts.append(f"{name} {cell['images_per_s']:.3g}/s")
        elif cell.get("why"):
            parts.append(f"{name} {cell['why']}")
    return ", ".join(parts)


def done(task: Task, cells: dict[str, Values]) -> bool:
    """Whether repeating the task would add nothing."""
    found = [cells.get(_key(task, cell), {"again": True}) for cell in task.cells]
    if any(cell.get("again") for cell in found):
        return False
    # Options may have been tried after it.
    return task.fill is not best or found[0].get("options") == winners(_workload(task), cells)


def _do(task: Task, bench: Bench) -> None:
    reasons = LastError()
    logger = logging.getLogger("ray.serve.imagen.engine")
    logger.addHandler(reasons)
    try:
        # A task leaves out the cells of systems that ran out of memory.
        _put(bench.cells, task, task.fill(bench), "out of memory")
        return
    except NotMeasured as error:
        _put(bench.cells, task, {}, str(error), again=True)
        return
    except torch.OutOfMemoryError:
        why = "out of memory"
    # Libraries raise all kinds of errors, and the next task may succeed.
    except Exception as error:
        if is_fatal(error) and not _works(bench.device):
            _put(bench.cells, task, {}, "the GPU failed", again=True)
            raise
        why = f"failed: {reasons.text or repr(error)}"[:300]
    finally:
        logger.removeHandler(reasons)
    _put(bench.cells, task, {}, why)
    bench.release()


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


def _key(task: Task, cell: str) -> str:
    return f"{task.name.partition('/')[0]}/{cell}"


def _workload(task: Task) -> Workload:
    return WORKLOADS[task.name.partition("/")[0]]


def _put(
    cells: dict[str, Values],
    task: Task,
    found: dict[str, Values],
    why: str,
    *,
    again: bool = False,
) -> None:
    """Fill a task's cells. A missing one states the reason, and whether to try again; a figure
    from an earlier call stays.
    """
    for cell in task.cells:
        if cell in found:
            cells[_key(task, cell)] = {"status": "measured", **found[cell]}
        elif cells.get(_key(task, cell), {}).get("status") != "measured" or not again:
            gap: Values = {"status": "not measured", "why": why, "again": again}
            cells[_key(task, cell)] = gap
