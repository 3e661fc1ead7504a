"""Admission by time: a request that cannot end before its deadline is refused at once.

Each request has to pass two tests, based on the times that earlier ones took on this replica:

- Could an idle replica finish it in time? If not, no retry helps: `TooMuchWork` (422), see
  `estimate.py`.
- Can this replica, after what it has accepted? If not, only the queue is in the way: `Full` (429).

The second is the feasibility test of earliest-deadline-first scheduling (Liu and Layland, 1973) on
one processor. `grouping.choose` changes to that order when a deadline comes near.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deployments.errors import Full, TooLate

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from deployments.engine.row import Row

_QUEUE_RESERVE = 1.5
"""Estimates are multiplied by this, because requests in a queue slow each other down."""
MAX_REQUESTS = 64
"""Accepted by a replica at a time, so that their files fit its memory."""
_ROUNDING_S = 1e-6
"""A request that has exactly as long as it needs is in time, whatever the last digit of a sum."""
_WINDOW = 16
_LEAST_SLOWDOWN, _MOST_SLOWDOWN = 0.5, 10.0


@dataclass(slots=True, eq=False)
class Ticket:
    """An accepted request.

    Attributes:
        seconds: of work on an idle replica; 0 if unknown.
        deadline_s: on the clock of `time.monotonic`.
        give_up: ends the wait of a request that has no row yet.
        whole_s: that such a request has in all.
        rows: of the engine, once there are some.
        refusal: the error of a request that was given up.
        counted_s: seconds of work that `Admission.slowdown` has counted already.
    """

    seconds: float
    deadline_s: float
    give_up: Callable[[], None]
    whole_s: float
    rows: Sequence[Row] = ()
    refusal: Full | None = None
    counted_s: float = 0.0

    @property
    def seconds_left(self) -> float:
        """Seconds of work left, at most."""
        steps = sum(row.progress.steps for row in self.rows)
        if not steps:
            return self.seconds
        return self.seconds * sum(row.progress.steps_left for row in self.rows) / steps

    def newly_done_s(self) -> float:
        """Seconds of work done since the last call."""
        before_s, self.counted_s = self.counted_s, self.seconds - self.seconds_left
        return self.counted_s - before_s


class Admission:
    """What a replica has accepted, and whether it can accept more. For one event loop.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tickets: dict[Ticket, None] = {}
        self._since_s = 0.0
        self._window: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._announced: deque[tuple[float, float]] = deque(maxlen=MAX_REQUESTS)

    @contextmanager
    def admit(
        self, seconds: float | None, timeout_s: float, give_up: Callable[[], None], whole_s: float
    ) -> Generator[Ticket]:
        """Hold a place for a request until the end of the context.

        Args:
            seconds: of work on an idle replica; None if unknown: such a request is always admitted.
            timeout_s: until the request's deadline.
            give_up: called once if the work before an accepted request takes longer than estimated;
                `Ticket.refusal` then holds the error to raise.
            whole_s: that such a request has in all, when it comes again.

        Raises:
            Full: it would end too late, or make an accepted request end too late.
            TooLate: the replica is idle, and still too little time is left.
        """
        now_s = self._clock()
        ticket = Ticket(seconds or 0.0, now_s + timeout_s, give_up, whole_s)
        if not self._tickets and ticket.seconds > timeout_s:
            raise TooLate(
                "Too little of the request's time is left to finish it.",
                value=f"about {ticket.seconds:.0f} s of work with {timeout_s:.0f} s left",
                remedy="Try again. The upload, or waiting for a replica, took the rest.",
            )
        if not self._has_room(ticket, now_s):
            raise self._full(ticket, now_s)
        if not self._tickets:
            self._since_s = now_s
        self._tickets[ticket] = None
        try:
            yield ticket
        finally:
            del self._tickets[ticket]
            self._record_end(ticket)
            self._give_up_late()

    def takes(self, seconds: float, timeout_s: float) -> bool:
        """Whether `admit` would take such a request now."""
        now_s = self._clock()
        ticket = Ticket(seconds, now_s + timeout_s, lambda: None, timeout_s)
        if not self._tickets:
            return seconds <= timeout_s
        return self._has_room(ticket, now_s)

    @property
    def slowdown(self) -> float:
        """Time that work takes at present over the time it takes on an idle replica."""
        spent_s = sum(spent for spent, _ in self._window)
        done_s = sum(done for _, done in self._window)
        if done_s <= 0:
            return 1.0
        return min(max(spent_s / done_s, _LEAST_SLOWDOWN), _MOST_SLOWDOWN)

    def _has_room(self, new: Ticket, now_s: float) -> bool:
        return len(self._tickets) < MAX_REQUESTS and self._fits(new, now_s)

    def _fits(self, new: Ticket, now_s: float) -> bool:
        """Whether the new request ends in time, and makes no request of later deadline late."""
        if not self._tickets or not new.seconds:
            return True
        new_s = self.slowdown * new.seconds
        accepted_s = 0.0
        for ticket in sorted([*self._tickets, new], key=lambda one: one.deadline_s):
            if ticket is not new:
                accepted_s += self.slowdown * ticket.seconds_left
            if ticket.deadline_s < new.deadline_s:
                continue  # goes before the new one
            left_s = ticket.deadline_s - now_s
            # A request that is late in any case is no reason to refuse the new one.
            is_late = ticket is not new and accepted_s > left_s + _ROUNDING_S
            if (accepted_s + new_s) * _QUEUE_RESERVE > left_s and not is_late:
                return False
        return True

    def _give_up_late(self) -> None:
        """Refuse waiting requests that have become late, rather than let them wait in vain."""
        now_s, ahead_s = self._clock(), 0.0
        for ticket in sorted(self._tickets, key=lambda one: one.deadline_s):
            work_s = self.slowdown * ticket.seconds_left
            if not ticket.rows and ahead_s + work_s > ticket.deadline_s - now_s:
                if ticket.refusal is None:
                    ticket.refusal = self._full(ticket, now_s)
                    ticket.give_up()
            else:
                ahead_s += work_s

    def _full(self, refused: Ticket, now_s: float) -> Full:
        ahead_s = self.slowdown * sum(ticket.seconds_left for ticket in self._tickets)
        return Full(
            "Too many requests are waiting for this model.",
            value=f"{len(self._tickets)} requests, about {ahead_s:.0f} s of work",
            remedy="Try again after Retry-After seconds.",
            retry_after_s=self._retry_after_s(refused, ahead_s, now_s),
        )

    def _retry_after_s(self, refused: Ticket, ahead_s: float, now_s: float) -> float:
        """When there is room for the request, after all that were told to come back before it."""
        own_s = self.slowdown * refused.seconds
        before_s = sum(seconds for back_s, seconds in self._announced if back_s > now_s)
        room_s = refused.whole_s / _QUEUE_RESERVE - own_s
        if len(self._tickets) >= MAX_REQUESTS:
            room_s = min(room_s, ahead_s * (1 - 1 / len(self._tickets)))
        retry_s = min(max(ahead_s + before_s - room_s, 1.0), refused.whole_s)
        self._announced.append((now_s + retry_s, own_s))
        return retry_s

    def _record_end(self, ticket: Ticket) -> None:
        """Record the work done, and the time spent, since the last request ended.

        A request that its client gave up is left out: what it took besides steps is unknown.
        """
        now_s = self._clock()
        done_s = sum(one.newly_done_s() for one in (*self._tickets, ticket))
        if ticket.seconds and not ticket.seconds_left:
            self._window.append((now_s - self._since_s, done_s))
        self._since_s = now_s
