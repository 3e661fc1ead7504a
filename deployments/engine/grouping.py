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
_MEDIANS = 200
_GAIN = 0.95
_AGAIN = 64
_HURRY = 1.5
"""A deadline is near when less than so many times the work before it still fits."""
_OVERDUE = 4
"""Age, in twice a row's own work, from which on the oldest goes first, whatever it is."""

Closed = Literal["all", "key", "full", "exact", "budget", "pace", "memory"]
"""Why a group took no more rows: there were no others; the others have another key; it has
`max_batch_size`; rows step alone for exact results; the pixel budget; more rows at a time are no
gain; or it is a part of one that ran out of memory.
"""


class Group(NamedTuple):
    """Rows that step together."""

    rows: list[Row]
    closed: Closed


class Pass(NamedTuple):
    """A step that some rows have taken together."""

    rows: Sequence[Row]
    closed: Closed
    seconds: float


@dataclass(frozen=True, slots=True)
class GroupLimits:
    """What one pass may hold.

    Attributes:
        max_batch_size: rows.
        budget_px: network pixels, see `Pipeline.cost_px`; None for no limit.
        exact: every row steps alone, so that its bits never depend on its company.
    """

    max_batch_size: int = 4
    budget_px: int | None = None
    exact: bool = False


class Pace:
    """How long steps take, by group size, learned from the steps themselves.

    A group size is used where it costs less per pixel than a row alone: rows in a pass gain much on
    some devices and sizes, and nothing on others. A size is tried a few times, then rarely again.
    """

    def __init__(self) -> None:
        self._costs: dict[tuple[int, int], deque[float]] = defaultdict(
            lambda: deque(maxlen=_SAMPLES)
        )
        self._alone_s_per_px: dict[int, float] = {}
        self._medians: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_MEDIANS))
        self._per_px = 0.0
        self._decisions = 0

    def record(self, rows: Sequence[Row], seconds: float) -> None:
        """A step of these rows took so long."""
        per_px = seconds / sum(row.cost_px for row in rows)
        costs = self._costs[_size_class(rows[0].cost_px), len(rows)]
        costs.append(per_px)
        if len(rows) == 1 and len(costs) >= _TRIES:
            self._remember_alone(rows[0].cost_px, statistics.median(costs))
        self._per_px = per_px if not self._per_px else 0.9 * self._per_px + 0.1 * per_px

    def seconds(self, cost_px: float) -> float:
        """What so many network pixels take, about; never 0."""
        return (self._per_px or 1e-9) * cost_px

    def _remember_alone(self, cost_px: int, per_px: float) -> None:
        medians = self._medians[_size_class(cost_px)]
        medians.append(per_px)
        # The quickest of the last ones, because the others shared the machine with something.
        self._alone_s_per_px[_size_class(cost_px)] = min(medians)

    def alone_s(self, cost_px: int) -> float | None:
        """What a pass of one row takes with nothing beside it, about; from any thread.

        Taken from the nearest size that was timed; None where none was.
        """
        known = list(self._alone_s_per_px.items())
        if not known:
            return None
        wanted = _size_class(cost_px)
        return min(known, key=lambda item: abs(item[0] - wanted))[1] * cost_px

    def has_timed(self, cost_px: int) -> bool:
        """Whether passes of half to twice this size were timed often enough; from any thread."""
        wanted = _size_class(cost_px)
        return any(abs(known - wanted) <= 1 for known in list(self._alone_s_per_px))

    def best_size(self, rows: Sequence[Row]) -> int:
        """How many of these rows, first ones first, cost least per pixel together.

        What was tried too seldom comes first: a row alone, then large groups before small ones.
        """
        size_class, most = _size_class(rows[0].cost_px), len(rows)
        self._decisions += 1
        if self._decisions % _AGAIN == 0:
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
    """The rows of the next step: the most urgent one, and the most urgent of its key with it.

    Urgent is, as in shortest remaining processing time, what is nearly done and was small to begin
    with; waiting counts ever more, in units of the row's own work. A row that is overdue by that
    measure goes before all that are not, so that however many small ones come, none waits for ever.
    Once a deadline is near, the earliest deadline goes first instead.
    """

    def urgency(row: Row) -> tuple[float, float]:
        whole = pace.seconds(row.steps * row.cost_px)
        age = (now_s - row.arrived_s) / (2 * whole)
        if age > _OVERDUE:
            return -age, row.arrived_s
        left = row.steps_left * row.cost_px
        return left * row.steps * row.cost_px / (1 + age * age), row.arrived_s

    by_deadline = sorted(rows, key=lambda row: (row.deadline_s, row.arrived_s))
    hurried = _is_deadline_near(by_deadline, pace, now_s)
    order = by_deadline if hurried else sorted(rows, key=urgency)
    shared = key(order[0])
    alike = [row for row in order if key(row) == shared]
    fitting = _within(alike, limits)
    group = fitting[: pace.best_size(fitting)]
    if len(group) < len(fitting):
        return Group(group, "pace")
    if len(fitting) < len(alike):
        return Group(group, _limit(fitting, limits))
    return Group(group, "key" if len(alike) < len(rows) else "all")


def _is_deadline_near(by_deadline: Sequence[Row], pace: Pace, now_s: float) -> bool:
    """Whether a row would be late if the ones of later deadline took any more of its time."""
    ahead_s = 0.0
    for row in by_deadline:
        ahead_s += pace.seconds(row.steps_left * row.cost_px)
        left_s = row.deadline_s - now_s
        # One that is lost already is no reason to change the order for the others.
        if ahead_s <= left_s <= _HURRY * ahead_s:
            return True
    return False


def _limit(group: Sequence[Row], limits: GroupLimits) -> Closed:
    if limits.exact:
        return "exact"
    return "full" if len(group) == limits.max_batch_size else "budget"


def _within(rows: Sequence[Row], limits: GroupLimits) -> list[Row]:
    """The first rows that fit the limits together; the very first one always does."""
    most = 1 if limits.exact else limits.max_batch_size
    group, cost_px = [rows[0]], rows[0].cost_px
    for row in rows[1:]:
        if len(group) == most:
            break
        if limits.budget_px is None or cost_px + row.cost_px <= limits.budget_px:
            group.append(row)
            cost_px += row.cost_px
    return group
