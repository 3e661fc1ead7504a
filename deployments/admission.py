"""Admission by time: a request that cannot end before its deadline is refused at once.

Two questions are asked of each request, from the times that earlier ones took on this replica:

- Could an idle replica finish it in time? If not, no retry helps: `TooMuchWork` (422). The model
  deployment asks, because its remedy names parameters.
- Can this one, behind what it has accepted? If not, only the queue prevents it: `Full` (429).

The second is the feasibility test of earliest-deadline-first scheduling (Liu and Layland, 1973) on
one processor, and `grouping.choose` turns to that order when a deadline comes near.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deployments.errors import Full, TooLate

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from deployments.engine.grouping import Pace
    from deployments.engine.pipeline import Work
    from deployments.engine.row import Row

RESERVE = 1.2
"""What an idle replica takes is multiplied by this before it is held against a limit."""
_QUEUE_RESERVE = 1.5
"""Likewise for a queue, whose requests slow each other down while they arrive."""
MAX_REQUESTS = 64
"""Accepted by a replica at a time, so that their files fit its memory."""
_ROUNDING_S = 1e-6
"""A request that has exactly as long as it needs is in time, whatever the sums' last digit."""
_SAMPLES = 20
_WINDOW = 16
_LEAST_SLOWDOWN, _MOST_SLOWDOWN = 0.5, 10.0


class Forecast:
    """Seconds that a request takes on an idle replica, learned from the requests it has served.

    Args:
        pace: knows the time of network passes.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._stage_s_per_px: deque[float] = deque(maxlen=_SAMPLES)
        self._file_s_per_px: deque[float] = deque(maxlen=_SAMPLES)

    def record(self, work: Work, file_px: int, timings_s: Mapping[str, float]) -> None:
        """A request has taken so many seconds by stage, see `ImageResult.timings_s`."""
        self._stage_s_per_px.append(timings_s["vae"] / work.stage_px)
        self._file_s_per_px.append((timings_s["decode"] + timings_s["encode"]) / file_px)

    def seconds(self, work: Work, file_px: int) -> float | None:
        """About; None if the replica has timed no pass yet."""
        pass_s = self._pace.alone_s(work.step_px)
        if pass_s is None:
            return None
        # The quickest of the last ones: the others shared the machine with something.
        stage_s = min(self._stage_s_per_px, default=0.0) * work.stage_px
        file_s = min(self._file_s_per_px, default=0.0) * file_px
        return work.steps * pass_s + stage_s + file_s

    def is_certain(self, work: Work) -> bool:
        """Whether passes of this size were timed, so that nothing had to be extrapolated."""
        return self._pace.has_timed(work.step_px)


def fits(seconds: float, limit_s: float) -> bool:
    """Whether so much work surely ends within the limit on an idle replica."""
    return seconds * RESERVE <= limit_s


@dataclass(slots=True, eq=False)
class Ticket:
    """An accepted request.

    Attributes:
        seconds: of work on an idle replica; 0 if unknown.
        deadline_s: on the clock of `time.monotonic`.
        give_up: ends the wait of a request that has no row yet.
        row: of the engine, once there is one.
        refusal: why the request was given up.
    """

    seconds: float
    deadline_s: float
    give_up: Callable[[], None]
    row: Row | None = None
    refusal: Full | None = None

    @property
    def seconds_left(self) -> float:
        """Of work, at most."""
        if self.row is None or not self.row.steps:
            return self.seconds
        return self.seconds * self.row.steps_left / self.row.steps


class Admission:
    """What a replica has accepted, and whether it can take more. For one event loop.

    Args:
        timeout_s: that a client's request has in all.
        clock: seconds, monotonic.
    """

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._tickets: dict[Ticket, None] = {}
        self._since_s = 0.0
        self._window: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._announced: deque[tuple[float, float]] = deque(maxlen=MAX_REQUESTS)

    @contextmanager
    def admit(
        self, seconds: float | None, timeout_s: float, give_up: Callable[[], None]
    ) -> Generator[Ticket]:
        """Hold a place for a request until the end of the context.

        Args:
            seconds: of work on an idle replica; None if unknown, which is always admitted.
            timeout_s: until the request's deadline.
            give_up: called once if the work before an accepted request takes longer than it was
                thought to; `Ticket.refusal` then holds the error to raise.

        Raises:
            Full: it would end too late, or make an accepted one end too late.
            TooLate: nothing else is here, and still too little time is left for it.
        """
        now_s = self._clock()
        ticket = Ticket(seconds or 0.0, now_s + timeout_s, give_up)
        if not self._tickets and ticket.seconds > timeout_s:
            raise TooLate(
                "Too little of the request's time is left to finish it.",
                value=f"about {ticket.seconds:.0f} s of work with {timeout_s:.0f} s left",
                remedy="Try again. The upload, or waiting for a replica, took the rest.",
            )
        if len(self._tickets) >= MAX_REQUESTS or not self._fits(ticket, now_s):
            raise self._full(ticket, now_s)
        if not self._tickets:
            self._since_s = now_s
        self._tickets[ticket] = None
        try:
            yield ticket
        finally:
            del self._tickets[ticket]
            self._learn(ticket)
            self._give_up_late()

    @property
    def slowdown(self) -> float:
        """Time that work takes at present, over what it takes on an idle replica."""
        spent_s = sum(spent for spent, _ in self._window)
        done_s = sum(done for _, done in self._window)
        if done_s <= 0:
            return 1.0
        return min(max(spent_s / done_s, _LEAST_SLOWDOWN), _MOST_SLOWDOWN)

    def _fits(self, new: Ticket, now_s: float) -> bool:
        """Whether the new request ends in time, and makes none of later deadline end late."""
        if not self._tickets or not new.seconds:
            return True
        new_s = self.slowdown * new.seconds
        accepted_s = 0.0
        for ticket in sorted([*self._tickets, new], key=lambda one: one.deadline_s):
            if ticket is not new:
                accepted_s += self.slowdown * ticket.seconds_left
            if ticket.deadline_s < new.deadline_s:
                continue  # goes first
            left_s = ticket.deadline_s - now_s
            # A request that is late without the new one is no reason to refuse the new one.
            is_late = ticket is not new and accepted_s > left_s + _ROUNDING_S
            if (accepted_s + new_s) * _QUEUE_RESERVE > left_s and not is_late:
                return False
        return True

    def _give_up_late(self) -> None:
        """Refuse requests that wait and have become late, rather than let them wait in vain."""
        now_s, ahead_s = self._clock(), 0.0
        for ticket in sorted(self._tickets, key=lambda one: one.deadline_s):
            work_s = self.slowdown * ticket.seconds_left
            if ticket.row is None and ahead_s + work_s > ticket.deadline_s - now_s:
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
        """When there is room for the request, after all who were told to come back before it."""
        own_s = self.slowdown * refused.seconds
        before_s = sum(seconds for back_s, seconds in self._announced if back_s > now_s)
        room_s = self._timeout_s / _QUEUE_RESERVE - own_s
        if len(self._tickets) >= MAX_REQUESTS:
            room_s = min(room_s, ahead_s * (1 - 1 / len(self._tickets)))
        retry_s = min(max(ahead_s + before_s - room_s, 1.0), self._timeout_s)
        self._announced.append((now_s + retry_s, own_s))
        return retry_s

    def _learn(self, ticket: Ticket) -> None:
        """A request has left: how much work was done since the one before it left."""
        now_s = self._clock()
        done_s = ticket.seconds - ticket.seconds_left
        if ticket.seconds:
            self._window.append((now_s - self._since_s, done_s))
        self._since_s = now_s
