-- Keep pictures that belong to no job. ARGV: namespace, id that their files lie under, owner, how many
-- pictures, most of an owner, seconds to keep them, 1 to change nothing and only tell.
-- Returns after how many seconds there is room for them; '0' if there is, and then they are counted.
-- Called again with an id that is kept, it only changes when they go.
local id, owner, count = ARGV[2], ARGV[3], tonumber(ARGV[4])
local kept, member = key('kept', owner), id .. ':' .. owner
redis.call('ZREMRANGEBYSCORE', kept, '-inf', now())
if not redis.call('ZSCORE', key('expiry'), member) then
  local over = redis.call('ZCARD', kept) + count - ARGV[5]
  if over > 0 then
    local last = redis.call('ZRANGE', kept, over - 1, over - 1, 'WITHSCORES')
    return string.format('%.3f', math.max(last[2] - now(), 0.001))
  end
end
if ARGV[7] == '1' then
  return '0'
end
for k = 1, count do
  redis.call('ZADD', kept, now() + ARGV[6], id .. ':' .. k)
end
redis.call('EXPIRE', kept, math.ceil(ARGV[6]) + 1)
-- The sweep forgets the files, as it does those of jobs.
redis.call('ZADD', key('expiry'), now() + ARGV[6], member)
return '0'
