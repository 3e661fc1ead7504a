-- Note what came of an attempt. ARGV: namespace, job, event and number of the attempt (which are the
-- claim), why it failed or '' if it was delivered, seconds until the next attempt, seconds after the
-- first attempt when the event is given up, most events that were given up to keep.
-- Returns 'lost' (the claim is another's by now), 'waits' or 'ended'.
local id, event, attempt, reason = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local pause, give_up, most_dead = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local hooks, tries, dead = key('hooks', id), key('hooks-try', id), key('hooks-dead')
if redis.call('LINDEX', hooks, 0) ~= event or redis.call('HGET', tries, 'attempts') ~= attempt then
  return 'lost'
end
for _, place in ipairs(places(event)) do
  redis.call('ZREM', place, id)
end
if reason ~= '' then
  local last = redis.call('HGET', tries, 'first') + give_up
  if now() < last then
    redis.call('ZADD', outbox, math.min(now() + pause, last), id)
    return 'waits'
  end
  local found = {job_id = id, reason = reason, attempts = tonumber(attempt), at = now(), event = event}
  redis.call('LPUSH', dead, cjson.encode(found))
  redis.call('LTRIM', dead, 0, most_dead - 1)
end
redis.call('LPOP', hooks)
redis.call('DEL', tries)
if redis.call('EXISTS', hooks) == 1 then
  redis.call('ZADD', outbox, now(), id)
else
  redis.call('ZREM', outbox, id)
end
return 'ended'
