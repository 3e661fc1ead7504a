"""The outbox of webhooks in Redis, and the loop that delivers what is in it.

The transition of a job writes its event in the same script, so an event exists exactly if its
transition happened:

    RPUSH {namespace}:hooks:{job}   the event, JSON (webhooks.Event)
    ZADD  {namespace}:outbox NX     when the job's first event is due, and the job

Keys of this file only:

    {namespace}:hooks-try:{job}     attempts at the first event, and when the first one began
    {namespace}:hooks-busy:…        the deliveries to one host, or of one owner, at this moment
    {namespace}:hooks-dead          the last events that were given up

A deliverer claims a job by moving its due time to the end of a lease. If the deliverer dies, the
job is due again by itself, and the receiver gets the same id and content once more.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from deployments.errors import JobsUnavailable
from serve_app.jobs.connection import answered
from serve_app.jobs.webhooks import AT_A_TIME, Event, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from redis.asyncio import Redis

    from deployments.settings import WebhookSettings
    from serve_app.jobs.webhooks import Sender

logger = logging.getLogger("ray.serve.imagen.webhooks")  # Serve gives its children a handler

RETRY_S = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Pauses after the first failure and each further one, as Standard Webhooks suggests."""
PER_HOST = 8
"""Deliveries to one host at a time, over all processes."""
PER_OWNER = 32
"""Deliveries of one owner at a time, so that none can take all of a process."""
DEAD = 1000
"""Events that were given up and are kept for operators."""
_JITTER = 0.2
_MARGIN_S = 2.0
_POLL_S = 0.5
_LONGEST_PAUSE_S = 5.0

Settled = Literal["lost", "waits", "ended"]
"""lost: the claim is another's by now, and nothing changed; waits: it is tried again; ended: the
event is out of the outbox."""

# Time is Redis's own: the clocks of deliverers may differ.
_COMMON = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local prefix = ARGV[1]
local outbox = prefix .. 'outbox'

local function read(event)
  local parsed = cjson.decode(event)
  return string.match(parsed.url, '^%a+://([^/?#]*)') .. '', parsed.owner .. ''
end

local function places(event)
  local readable, host, owner = pcall(read, event)
  -- The deliverer fails on what cannot be read; here it must not hold up other jobs.
  if not readable then host, owner = '', '' end
  return {prefix .. 'hooks-busy:host:' .. host, prefix .. 'hooks-busy:owner:' .. owner}
end
"""

# Answers with a claim; with nothing if no job is due; or with an empty list if all the jobs that it
# looked at have to wait for their host or owner, and more may be due.
_CLAIM = (
    _COMMON
    + """
local lease, limits, jitter = tonumber(ARGV[2]), {tonumber(ARGV[3]), tonumber(ARGV[4])}, ARGV[5]

-- Seconds after which there may be room, or nil if there is room.
local function wait_for(place, limit)
  redis.call('ZREMRANGEBYSCORE', place, '-inf', now)
  if redis.call('ZCARD', place) < limit then return nil end
  local oldest = redis.call('ZRANGE', place, 0, 0, 'WITHSCORES')
  -- The longer they take, the less often it is asked for; at the end of a lease there is room.
  local age, left = now + lease - oldest[2], oldest[2] - now
  return math.max(0.1, math.min((age + 0.5) * jitter, left))
end

local function claim(job, event, taken)
  for _, place in ipairs(taken) do
    redis.call('ZADD', place, now + lease, job)
    redis.call('PEXPIRE', place, math.ceil(lease * 1000))
  end
  local tries = prefix .. 'hooks-try:' .. job
  redis.call('HSETNX', tries, 'first', string.format('%.6f', now))
  redis.call('ZADD', outbox, now + lease, job)
  return {job, event, redis.call('HINCRBY', tries, 'attempts', 1)}
end

local due = redis.call('ZRANGEBYSCORE', outbox, '-inf', now, 'LIMIT', 0, 100)
for _, job in ipairs(due) do
  local event = redis.call('LINDEX', prefix .. 'hooks:' .. job, 0)
  if not event then
    redis.call('ZREM', outbox, job)
    redis.call('DEL', prefix .. 'hooks-try:' .. job)
  else
    local taken = places(event)
    local wait = wait_for(taken[1], limits[1]) or wait_for(taken[2], limits[2])
    if not wait then return claim(job, event, taken) end
    redis.call('ZADD', outbox, now + wait, job)
  end
end
return #due == 100 and {} or nil
"""
)

# A claim is known by its event and the number of its attempt. An empty reason means delivered.
_SETTLE = (
    _COMMON
    + """
local job, event, attempt, reason = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local pause, give_up, dead = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local hooks, tries = prefix .. 'hooks:' .. job, prefix .. 'hooks-try:' .. job
if redis.call('LINDEX', hooks, 0) ~= event or redis.call('HGET', tries, 'attempts') ~= attempt then
  return 'lost'
end
for _, place in ipairs(places(event)) do redis.call('ZREM', place, job) end
if reason ~= '' then
  local last = redis.call('HGET', tries, 'first') + give_up
  if now < last then
    redis.call('ZADD', outbox, math.min(now + pause, last), job)
    return 'waits'
  end
  redis.call('LPUSH', prefix .. 'hooks-dead', cjson.encode({
    job_id = job, reason = reason, attempts = tonumber(attempt), at = now, event = event}))
  redis.call('LTRIM', prefix .. 'hooks-dead', 0, dead - 1)
end
redis.call('LPOP', hooks)
redis.call('DEL', tries)
if redis.call('EXISTS', hooks) == 1 then
  redis.call('ZADD', outbox, now, job)
else
  redis.call('ZREM', outbox, job)
end
return 'ended'
"""
)


@dataclass(frozen=True)
class Claim:
    """The right to deliver the first event of a job, until the lease ends.

    Attributes:
        text: the event, as the transition wrote it.
        attempt: 1 for the first.
    """

    job_id: str
    text: str
    attempt: int


class Outbox:
    """The events that wait, ordered per job.

    Every method raises JobsUnavailable if Redis does not answer.

    Args:
        redis: with decoded answers.
        namespace: begins every key.
        settings: limits of attempts.
        lease_s: after which a claim of a dead deliverer is void. It is lengthened to outlast an
            attempt.
        retry_s: pauses between attempts.
    """

    def __init__(
        self,
        redis: Callable[[], Redis],
        namespace: str,
        settings: WebhookSettings,
        lease_s: float,
        *,
        retry_s: Sequence[float] = RETRY_S,
    ) -> None:
        self._redis = redis
        self._prefix = f"{namespace}:"
        self._settings = settings
        self._lease_s = max(lease_s, settings.timeout_s + _MARGIN_S)
        self._retry_s = retry_s

    async def claim(self) -> Claim | None:
        """The job that has been due the longest, or None.

        Jobs whose host or owner has all its deliveries in flight are put off.
        """
        jitter = random.uniform(0.5, 1.5)  # noqa: S311 (spreads load)
        args = (self._prefix, self._lease_s, PER_HOST, PER_OWNER, jitter)
        found: list[str] | None = []
        async with answered():
            script: Any = self._redis().register_script(_CLAIM)
            while found is not None and not found:
                found = await script(args=args)
        return None if found is None else Claim(found[0], found[1], int(found[2]))

    async def delivered(self, claim: Claim) -> Settled:
        """Take the event out; the next one of the job is due now."""
        return await self._end(claim, "", give_up_s=0)

    async def failed(self, claim: Claim, reason: str, *, again: bool = True) -> Settled:
        """Put the event off, or give it up if its time is over or `again` is false.

        Args:
            claim: what was tried.
            reason: for operators; not empty.
            again: whether another attempt may help.
        """
        return await self._end(
            claim, reason or "unknown", give_up_s=self._settings.give_up_s if again else 0
        )

    async def _end(self, claim: Claim, reason: str, *, give_up_s: float) -> Settled:
        pause_s = self._retry_s[min(claim.attempt, len(self._retry_s)) - 1]
        pause_s *= random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 (spreads load)
        what = (self._prefix, claim.job_id, claim.text, claim.attempt, reason)
        async with answered():
            script: Any = self._redis().register_script(_SETTLE)
            return await script(args=(*what, pause_s, give_up_s, DEAD))


async def deliver_forever(outbox: Outbox, sender: Sender, *, at_a_time: int = AT_A_TIME) -> None:
    """Deliver whatever is due, until it is cancelled.

    Deliveries that are under way when it is cancelled are dropped, and happen again after their
    lease. While Redis is away it tries again, at most every 5 s.

    Args:
        outbox: what to deliver.
        sender: how.
        at_a_time: deliveries at a time.
    """
    running: set[asyncio.Task[None]] = set()
    pause_s = _POLL_S
    async with asyncio.TaskGroup() as group:
        while True:
            claim = None
            try:
                if len(running) < at_a_time:
                    claim = await outbox.claim()
                if pause_s > _POLL_S:
                    logger.info("webhooks go on: Redis answers again")
                pause_s = _POLL_S
            except JobsUnavailable as error:
                if pause_s == _POLL_S:
                    logger.warning("webhooks wait: Redis does not answer (%s)", error.value)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if claim:
                task = group.create_task(_deliver(outbox, sender, claim))
                running.add(task)
                task.add_done_callback(running.discard)
            elif running:
                await asyncio.wait(running, timeout=pause_s, return_when="FIRST_COMPLETED")
            else:
                await asyncio.sleep(pause_s)


async def _deliver(outbox: Outbox, sender: Sender, claim: Claim) -> None:
    try:
        outcome = await sender.send(Event.model_validate_json(claim.text))
    except Exception:  # one event must not stop the others, whatever is wrong with it
        logger.exception("webhook of job %s: the attempt broke", claim.job_id)
        outcome = Outcome("failed", "internal error")
    try:
        if outcome.kind == "delivered":
            await outbox.delivered(claim)
        elif await outbox.failed(claim, outcome.reason, again=outcome.kind == "failed") == "ended":
            logger.warning(
                "webhook of job %s: given up after %d attempts (%s)",
                claim.job_id,
                claim.attempt,
                outcome.reason,
            )
    except JobsUnavailable:
        # The loop says that Redis is away. After the lease the same event is sent again.
        pass
