"""A simulated replica: its queue, its threads and its share of a GPU.

What decides is the product's own code on the simulated clock: `Admission` accepts and refuses,
`choose` and `Pace` group the rows of a pass. Only what takes time is simulated.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.growth.clock import Station
from deployments.admission import Admission
from deployments.engine.grouping import GroupLimits, Pace, choose
from deployments.engine.row import Row, RowInput
from deployments.errors import Full, TooLate

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.growth.clock import Clock, Then
    from benchmarks.growth.profiles import Service, Work

_WARM_UP = 3
"""Passes of a row alone before a replica is ready, as in `Host`."""


@dataclass(eq=False, slots=True)
class Request:
    """One request.

    Attributes:
        arrived_s: at the load balancer.
        deadline_s: when its client gives up.
        done: takes the outcome: ok, refused, late or lost.
        ended: whether it has one.
    """

    arrived_s: float
    deadline_s: float
    done: Callable[[Request, str], None]
    ended: bool = False

    def end(self, outcome: str) -> None:
        """Give the outcome, once."""
        if not self.ended:
            self.ended = True
            self.done(self, outcome)


@dataclass(eq=False, slots=True)
class _Held:
    """A request inside: what it holds, and how to stop it."""

    request: Request
    stack: ExitStack = field(default_factory=ExitStack)
    row: Row | None = None
    seated: bool = False
    wait: Then | None = None


class Replica:
    """Serves one model.

    Args:
        clock: of the simulation.
        work: what an image takes.
        service: limits of a replica.
        gpu: that its passes and its autoencoder take in turn; shared with others on it.

    Attributes:
        gone: whether its process was lost.
    """

    def __init__(self, clock: Clock, work: Work, service: Service, gpu: Station) -> None:
        self._clock = clock
        self._work = work
        self._timeout_s = service.timeout_s
        self._gpu = gpu
        self._pixels = Station(clock, service.pixel_threads)
        self._staging = Station(clock)
        self._seats = Station(clock, service.seats)
        self._admission = Admission(lambda: clock.now_s)
        self._limits = GroupLimits(len(work.pass_s))
        self._pace = Pace()
        for _ in range(_WARM_UP):
            self._pace.record([self._row(0.0)], work.pass_s[0])
        self._held: dict[_Held, None] = {}
        self._by_row: dict[Row, _Held] = {}
        self._rows: list[Row] = []
        self._stepping = False
        self.gone = False

    @property
    def ongoing(self) -> int:
        """Requests inside."""
        return len(self._held)

    def lose(self) -> None:
        """The process is gone, and what it held."""
        self.gone = True
        for held in list(self._held):
            self._end(held, "lost")
        self._rows.clear()

    def take(self, request: Request) -> None:
        """Accept or refuse a request."""
        held = _Held(request)
        now_s = self._clock.now_s
        admit = self._admission.admit(
            self._work.alone_s,
            request.deadline_s - now_s,
            lambda: self._give_up(held),
            self._timeout_s,
        )
        try:
            ticket = held.stack.enter_context(admit)
        except Full:
            request.end("refused")
            return
        except TooLate:
            request.end("late")
            return
        self._held[held] = None

        def seated() -> None:
            held.seated, held.wait = True, None
            self._pixels.run(self._work.file_s / 2, lambda: self._begin(held, ticket))

        held.wait = seated
        self._seats.take(seated)

    def _row(self, deadline_s: float) -> Row:
        pixels: Any = None
        row = Row(RowInput(None, pixels, 0, deadline_s))
        row.progress.steps = row.progress.steps_left = self._work.steps
        row.progress.arrived_s = self._clock.now_s
        return row

    def _begin(self, held: _Held, ticket: Any) -> None:
        if held not in self._held:
            return
        row = held.row = self._row(held.request.deadline_s)
        ticket.rows = [row]
        self._by_row[row] = held
        self._stage(self._work.begin_s, lambda: self._join(row))

    def _stage(self, seconds: float, then: Then) -> None:
        """The staging thread works on one row at a time, and on the GPU. A model without an
        autoencoder needs neither.
        """
        if not seconds:
            then()
            return

        def done() -> None:
            self._staging.free()
            then()

        self._staging.take(lambda: self._gpu.run(seconds, done))

    def _join(self, row: Row) -> None:
        if row in self._by_row:
            self._rows.append(row)
            self._step()

    def _step(self) -> None:
        """The engine's thread: one pass after the other, while there are rows."""
        if self._stepping:
            return
        now_s = self._clock.now_s
        for row in [row for row in self._rows if row.input.deadline_s <= now_s]:
            self._end(self._by_row[row], "late")
        if not self._rows:
            return
        group = choose(self._rows, _same, self._limits, self._pace, now_s).rows
        self._stepping = True
        self._gpu.run(self._work.pass_s[len(group) - 1], lambda: self._stepped(group, now_s))

    def _stepped(self, group: list[Row], start_s: float) -> None:
        self._stepping = False
        self._pace.record(group, self._clock.now_s - start_s)
        for row in group:
            row.progress.steps_left -= 1
            if not row.progress.steps_left and row in self._by_row:
                self._rows.remove(row)
                self._stage(self._work.finish_s, lambda row=row: self._encode(row))
        self._step()

    def _encode(self, row: Row) -> None:
        if held := self._by_row.get(row):
            self._pixels.run(self._work.file_s / 2, lambda: self._end(held, "ok"))

    def _give_up(self, held: _Held) -> None:
        """The admission refuses a request that waits in vain."""
        self._clock.after(0, lambda: self._end(held, "refused"))

    def _end(self, held: _Held, outcome: str) -> None:
        if held not in self._held:
            return
        del self._held[held]
        if held.row is not None and self._by_row.pop(held.row, None) and held.row in self._rows:
            self._rows.remove(held.row)
        if held.seated:
            self._seats.free()
        elif held.wait:
            self._seats.leave(held.wait)
        stack, held.stack = held.stack, ExitStack()
        stack.close()
        held.request.end(outcome)


def _same(_: Row) -> str:
    """All pictures of a profile have one size."""
    return "one size"
