-- Forget jobs whose time is over. ARGV: namespace. Returns their ids.
local gone = {}
for _, member in ipairs(redis.call('ZRANGEBYSCORE', key('expiry'), '-inf', now(), 'LIMIT', 0, 100)) do
  local id, owner = string.match(member, '^(%x+):(.*)$')
  local digest = redis.call('HGET', key('job', id), 'idempotency')
  if digest then
    redis.call('DEL', key('idempotency', owner, digest))
  end
  redis.call('DEL', key('job', id), key('events', id))
  redis.call('ZREM', key('dead'), id)
  redis.call('ZREM', key('jobs', owner), id)
  for _, status in ipairs(ENDED) do
    redis.call('ZREM', key('jobs', owner, status), id)
  end
  redis.call('ZREM', key('expiry'), member)
  gone[#gone + 1] = id
end
return gone
