-- Give a due event to a deliverer. ARGV: namespace, lease in seconds, most deliveries to a host, most
-- of an owner, a factor around 1 that spreads load.
-- Returns the job, its event and the number of the attempt; nothing if no job is due; or an empty
-- list if all the jobs that it looked at wait for their host or owner, and more may be due.
local lease, limits, jitter = tonumber(ARGV[2]), {tonumber(ARGV[3]), tonumber(ARGV[4])}, ARGV[5]

-- Seconds after which there may be room, or nil if there is room.
local function wait_for(place, limit)
  redis.call('ZREMRANGEBYSCORE', place, '-inf', now())
  if redis.call('ZCARD', place) < limit then
    return nil
  end
  local oldest = redis.call('ZRANGE', place, 0, 0, 'WITHSCORES')
  -- The longer they take, the less often it is asked for; at the end of a lease there is room.
  local age, left = now() + lease - oldest[2], oldest[2] - now()
  return math.max(0.1, math.min((age + 0.5) * jitter, left))
end

local function claim(id, event, taken)
  for _, place in ipairs(taken) do
    redis.call('ZADD', place, now() + lease, id)
    redis.call('PEXPIRE', place, math.ceil(lease * 1000))
  end
  redis.call('HSETNX', key('hooks-try', id), 'first', string.format('%.6f', now()))
  redis.call('ZADD', outbox, now() + lease, id)
  return {id, event, redis.call('HINCRBY', key('hooks-try', id), 'attempts', 1)}
end

local due = redis.call('ZRANGEBYSCORE', outbox, '-inf', now(), 'LIMIT', 0, 100)
for _, id in ipairs(due) do
  local event = redis.call('LINDEX', key('hooks', id), 0)
  if not event then
    redis.call('ZREM', outbox, id)
    redis.call('DEL', key('hooks-try', id))
  else
    local taken = places(event)
    local wait = wait_for(taken[1], limits[1]) or wait_for(taken[2], limits[2])
    if not wait then
      return claim(id, event, taken)
    end
    redis.call('ZADD', outbox, now() + wait, id)
  end
end
return #due == 100 and {} or nil
