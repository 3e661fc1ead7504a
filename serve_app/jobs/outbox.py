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
from serve_app.jobs.scripts import run_script
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
        self._namespace = namespace
        self._settings = settings
        self._lease_s = max(lease_s, settings.timeout_s + _MARGIN_S)
        self._retry_s = retry_s

    async def claim(self) -> Claim | None:
        """The job that has been due the longest, or None.

        Jobs whose host or owner has all its deliveries in flight are put off.
        """
        jitter = random.uniform(0.5, 1.5)  # noqa: S311 (spreads load)
        found: list[str] | None = []
        while found is not None and not found:
            found = await self._run("hooks_claim", self._lease_s, PER_HOST, PER_OWNER, jitter)
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
        what = claim.job_id, claim.text, claim.attempt, reason
        return await self._run("hooks_settle", *what, pause_s, give_up_s, DEAD)

    async def _run(self, script: str, *args: object) -> Any:
        files = "common", "hooks", script
        return await run_script(self._redis(), files, self._namespace, *args)


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
