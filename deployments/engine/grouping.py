"""Which rows take the next step together."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from deployments.engine.row import Row

_SAMPLES = 5
_TRIES = 3
"""Times that a group size is tried before its cost is believed."""
_MEDIANS = 200
_GAIN = 0.95
"""A group is used only where it costs at most this much of a row alone, per pixel."""
_RETRY_EVERY = 64
"""Decisions after which the largest group is tried again."""
_DEADLINE_RESERVE = 1.5
"""A deadline is near when less time is left than this many times the work before it."""
_OVERDUE = 4
"""Age, in units of twice the row's own work, at which the oldest row goes first in any case."""

Closed = Literal["all", "key", "full", "exact", "budget", "pace", "memory"]
"""Why a group took no more rows: there were no others; the others have another key; it has
`max_batch_size`; rows step alone for exact results; the pixel budget; more rows in a pass gain
nothing; or it is a part of a group that ran out of memory.
"""


class Group(NamedTuple):
    """Rows that step together."""

    rows: list[Row]
    closed: Closed


class Pass(NamedTuple):
    """A step that rows have taken together.

    Attributes:
        rows: at least one.
        closed: why there were no more of them.
        seconds: that the step took.
    """

    rows: Sequence[Row]
    closed: Closed
    seconds: float


@dataclass(frozen=True, slots=True)
class GroupLimits:
    """What one pass may hold.

    Attributes:
        max_batch_size: rows.
        budget_px: network pixels, see `Pipeline.cost_px`; None for no limit.
        exact: every row steps alone, so that its bits never depend on other rows.
    """

    max_batch_size: int = 4
    budget_px: int | None = None
    exact: bool = False


class Pace:
    """How long steps take, by group size, learned from the steps themselves.

    A group size is used where it costs less per pixel than a row alone. On some devices and sizes
    a shared pass saves much, on others nothing. A size is tried a few times, then rarely again.
    """

    def __init__(self) -> None:
        self._costs: dict[tuple[int, int], deque[float]] = defaultdict(
            lambda: deque(maxlen=_SAMPLES)
        )
        self._alone_s_per_px: dict[int, float] = {}
        self._medians: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_MEDIANS))
        self._s_per_px = 0.0
        self._decisions = 0

    def record(self, rows: Sequence[Row], seconds: float) -> None:
        """Learn from a step of these rows."""
        s_per_px = seconds / sum(row.progress.cost_px for row in rows)
        first_px = rows[0].progress.cost_px
        costs = self._costs[_size_class(first_px), len(rows)]
        costs.append(s_per_px)
        if len(rows) == 1 and len(costs) >= _TRIES:
            self._record_alone(first_px, statistics.median(costs))
        self._s_per_px = 0.9 * self._s_per_px + 0.1 * s_per_px if self._s_per_px else s_per_px

    def seconds(self, cost_px: float) -> float:
        """About what so many network pixels take; never 0."""
        return (self._s_per_px or 1e-9) * cost_px

    def _record_alone(self, cost_px: int, s_per_px: float) -> None:
        medians = self._medians[_size_class(cost_px)]
        medians.append(s_per_px)
        # The quickest of the last ones, because the others shared the machine with something.
        self._alone_s_per_px[_size_class(cost_px)] = min(medians)

    def alone_s(self, cost_px: int) -> float | None:
        """About what a pass of one row takes on an idle machine; from any thread.

        Taken from the nearest size that was timed; None if none was.
        """
        known = list(self._alone_s_per_px.items())
        if not known:
            return None
        size_class = _size_class(cost_px)
        return min(known, key=lambda item: abs(item[0] - size_class))[1] * cost_px

    def has_timed(self, cost_px: int) -> bool:
        """Whether passes of half to twice this size were timed often enough; from any thread."""
        size_class = _size_class(cost_px)
        return any(abs(known - size_class) <= 1 for known in list(self._alone_s_per_px))

    def best_size(self, rows: Sequence[Row]) -> int:
        """How many of these rows, from the first on, cost least per pixel together.

        A size that was tried too seldom comes first: a row alone, then large groups before small.
        """
        size_class, most = _size_class(rows[0].progress.cost_px), len(rows)
        self._decisions += 1
        if self._decisions % _RETRY_EVERY == 0:
            return most
        for size in (1, *range(most, 1, -1)):
            if len(self._costs[size_class, size]) < _TRIES:
                return size
        cost = {n: statistics.median(self._costs[size_class, n]) for n in range(1, most + 1)}
        best = min(cost, key=lambda n: (cost[n], -n))
        return best if cost[best] <= _GAIN * cost[1] else 1


def _size_class(cost_px: int) -> int:
    """Rows of about the same size gain alike."""
    return round(math.log2(cost_px))


def choose(
    rows: Sequence[Row],
    key: Callable[[Row], Hashable],
    limits: GroupLimits,
    pace: Pace,
    now_s: float,
) -> Group:
    """The rows of the next step: the most urgent row, and the most urgent others of its key.

    As in shortest remaining processing time, a row is urgent if it is nearly done and was small to
    begin with. Waiting adds urgency, in units of the row's own work. A row that is overdue by that
    measure goes before all that are not, so that no number of small rows keeps it waiting for ever.
    The results of a request and their tiles count as one row, with those that are still to come.
    Once a deadline is near, the earliest deadline goes first instead.

    Args:
        rows: at least one; all have begun.
        key: see `Pipeline.key`.
        limits: of the pass.
        pace: what passes take.
        now_s: on the clock of the rows' arrival and deadlines.
    """
    order = sorted(rows, key=lambda row: (row.input.deadline_s, row.progress.arrived_s))
    if not _is_deadline_near(order, pace, now_s):
        order = sorted(rows, key=lambda row: _urgency(row, pace, now_s))
    shared = key(order[0])
    alike = [row for row in order if key(row) == shared]
    fitting = _within(alike, limits)
    group = fitting[: pace.best_size(fitting)]
    if len(group) < len(fitting):
        return Group(group, "pace")
    if len(fitting) < len(alike):
        return Group(group, _reached_limit(fitting, limits))
    return Group(group, "key" if len(alike) < len(rows) else "all")


def _urgency(row: Row, pace: Pace, now_s: float) -> tuple[float, float]:
    """The row with the lowest goes first. It is as urgent as its whole request."""
    progress, whole = row.progress, row.input.whole
    work_px, left_px, since_s = progress.work_px, progress.work_left_px, progress.arrived_s
    if whole is not None:
        left_px += work_px * whole.waiting
        work_px, since_s = work_px * whole.rows, whole.since_s
    age = (now_s - since_s) / (2 * pace.seconds(work_px))
    if age > _OVERDUE:
        return -age, progress.arrived_s
    return left_px * work_px / (1 + age * age), progress.arrived_s


def _is_deadline_near(by_deadline: Sequence[Row], pace: Pace, now_s: float) -> bool:
    """Whether a row would be late if rows of later deadline took any more of its time."""
    ahead_s, wholes = 0.0, set[int]()
    for row in by_deadline:
        ahead_s += pace.seconds(row.progress.work_left_px)
        if (whole := row.input.whole) and id(whole) not in wholes:
            wholes.add(id(whole))
            ahead_s += pace.seconds(row.progress.work_px * whole.waiting)
        left_s = row.input.deadline_s - now_s
        # A row that is late in any case is no reason to change the order of the others.
        if ahead_s <= left_s <= _DEADLINE_RESERVE * ahead_s:
            return True
    return False


def _reached_limit(group: Sequence[Row], limits: GroupLimits) -> Closed:
    if limits.exact:
        return "exact"
    return "full" if len(group) == limits.max_batch_size else "budget"


def _within(rows: Sequence[Row], limits: GroupLimits) -> list[Row]:
    """The first rows that fit the limits together; the very first one always does."""
    most = 1 if limits.exact else limits.max_batch_size
    group, cost_px = [rows[0]], rows[0].progress.cost_px
    for row in rows[1:]:
        if len(group) == most:
            break
        row_px = row.progress.cost_px
        if limits.budget_px is None or cost_px + row_px <= limits.budget_px:
            group.append(row)
            cost_px += row_px
    return group
