"""The counts behind limits: one algorithm, once for Redis and once for this process's memory.

A bucket is a single time, `due`: when it will be full again. Taking an amount moves that time on by
what the amount costs, and is refused if it would then lie further ahead than a whole bucket. (This
is the generic cell rate algorithm.) Times are whole microseconds.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from redis.exceptions import NoScriptError

if TYPE_CHECKING:
    from collections.abc import Callable

    from redis.asyncio import Redis

LEASE_S = 30.0
"""A picture's place that is not renewed for so long is free again: its process was killed."""
_LEASE_US: Final = int(LEASE_S * 1e6)


class Bucket(NamedTuple):
    """A limited rate.

    Attributes:
        name: of the count.
        burst: the most that may be taken at once.
        per_s: what is added each second.
    """

    name: str
    burst: float
    per_s: float

    @property
    def unit_us(self) -> float:
        """What one unit costs."""
        return 1e6 / self.per_s


class Places(NamedTuple):
    """A limited number of places, each held by a lease.

    Attributes:
        name: of the count.
        most: how many there are.
        lease: the id of the holder.
    """

    name: str
    most: int
    lease: str


class Decision(NamedTuple):
    """What a limit says.

    Attributes:
        wait_us: until the same would be allowed; 0 if it is, and was taken.
        used_us: until the bucket is full again.
        placed: False if no place was free.
    """

    wait_us: int
    used_us: int
    placed: bool = True


class Counters(Protocol):
    """Counts that several limits share."""

    async def take(self, bucket: Bucket, amount: float, places: Places | None = None) -> Decision:
        """Take an amount, then a place if some are named.

        An amount above the whole bucket is taken from a full one, which it overdraws.
        """
        ...

    async def give(self, bucket: Bucket, amount: float) -> None:
        """Put back what was taken."""
        ...

    async def renew(self, places: Places) -> None:
        """Hold the place for another `LEASE_S`, unless it was given back."""
        ...

    async def leave(self, places: Places) -> None:
        """Give the place back."""
        ...


class MemoryCounters:
    """The counts of this process. As many names are kept as were ever used.

    Args:
        clock_s: seconds, never backwards.
    """

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._due_us: dict[str, int] = {}
        self._ends_us: dict[str, dict[str, int]] = {}

    async def take(self, bucket: Bucket, amount: float, places: Places | None = None) -> Decision:
        now_us = self._now_us()
        due_us = max(now_us, self._due_us.get(bucket.name, 0))
        cost_us, room_us = amount * bucket.unit_us, bucket.burst * bucket.unit_us
        wait_us = due_us - now_us + min(cost_us, room_us) - room_us
        if wait_us >= 1:
            return Decision(int(wait_us), due_us - now_us)
        due_us = round(due_us + cost_us)
        self._due_us[bucket.name] = due_us
        return Decision(0, due_us - now_us, places is None or self._enter(places, now_us))

    async def give(self, bucket: Bucket, amount: float) -> None:
        self._due_us[bucket.name] = round(
            self._due_us.get(bucket.name, 0) - amount * bucket.unit_us
        )

    async def renew(self, places: Places) -> None:
        held = self._ends_us[places.name]
        if places.lease in held:
            held[places.lease] = self._now_us() + _LEASE_US

    async def leave(self, places: Places) -> None:
        self._ends_us[places.name].pop(places.lease, None)

    def _enter(self, places: Places, now_us: int) -> bool:
        held = self._ends_us.setdefault(places.name, {})
        for lease in [lease for lease, end_us in held.items() if end_us <= now_us]:
            del held[lease]
        if len(held) >= places.most:
            return False
        held[places.lease] = now_us + _LEASE_US
        return True

    def _now_us(self) -> int:
        return int(self._clock_s() * 1e6)


class _Script(NamedTuple):
    """A Lua script of Redis, and the hash that Redis knows it by."""

    text: str
    sha: str

    @classmethod
    def of(cls, body: str) -> _Script:
        text = _NOW + body
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


# Redis' own clock, so that all replicas count by the same one.
_NOW: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
"""
# The keys are the bucket and the places; the arguments are amount, burst, cost of a unit, most,
# lease and its length. Without a lease no place is taken.
_TAKE: Final = _Script.of("""
local due = math.max(now, tonumber(redis.call('GET', KEYS[1]) or '0'))
local cost, room = ARGV[1] * ARGV[3], ARGV[2] * ARGV[3]
local wait = due - now + math.min(cost, room) - room
if wait >= 1 then return {wait, due - now, 1} end
due = math.floor(due + cost + 0.5)
redis.call('SET', KEYS[1], string.format('%.0f', due), 'PX', math.ceil((due - now) / 1000) + 1)
if ARGV[5] == '' then return {0, due - now, 1} end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
if redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[4]) then return {0, due - now, 0} end
redis.call('ZADD', KEYS[2], now + ARGV[6], ARGV[5])
redis.call('PEXPIRE', KEYS[2], math.ceil(ARGV[6] / 1000))
return {0, due - now, 1}
""")
_GIVE: Final = _Script.of("""
local due = tonumber(redis.call('GET', KEYS[1]) or '0') - ARGV[1]
if due <= now then return redis.call('DEL', KEYS[1]) end
redis.call('SET', KEYS[1], string.format('%.0f', due), 'PX', math.ceil((due - now) / 1000))
""")
# XX: a place that was given back meanwhile stays free.
_RENEW: Final = _Script.of("""
redis.call('ZADD', KEYS[1], 'XX', now + ARGV[2], ARGV[1])
redis.call('PEXPIRE', KEYS[1], math.ceil(ARGV[2] / 1000))
""")


class RedisCounters:
    """Counts that all processes share. Each method is one round trip; names expire when full.

    Args:
        redis: the server.
        prefix: begins every name there.
    """

    def __init__(self, redis: Redis, prefix: str) -> None:
        self._redis = redis
        self._prefix = prefix

    async def take(self, bucket: Bucket, amount: float, places: Places | None = None) -> Decision:
        names = [bucket.name, places.name if places else bucket.name]
        place = (places.most, places.lease) if places else (0, "")
        rate = amount, bucket.burst, bucket.unit_us
        wait_us, used_us, placed = await self._run(_TAKE, names, *rate, *place, _LEASE_US)
        return Decision(wait_us, used_us, bool(placed))

    async def give(self, bucket: Bucket, amount: float) -> None:
        await self._run(_GIVE, [bucket.name], round(amount * bucket.unit_us))

    async def renew(self, places: Places) -> None:
        await self._run(_RENEW, [places.name], places.lease, _LEASE_US)

    async def leave(self, places: Places) -> None:
        await self._redis.zrem(self._prefix + places.name, places.lease)

    async def _run(self, script: _Script, names: list[str], *values: float | str) -> Any:
        redis: Any = self._redis
        rest = len(names), *(self._prefix + name for name in names), *values
        try:
            return await redis.evalsha(script.sha, *rest)
        except NoScriptError:  # a Redis that started since
            return await redis.eval(script.text, *rest)
