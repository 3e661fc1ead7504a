-- Jobs with their place in the queue. ARGV: namespace, then ids.
-- Returns for each: its record (as HGETALL gives it; empty if there is none), its position (0
-- unless queued), running jobs of its task, mean seconds of a job of its task ('' if unknown).
local found = {}
for i = 2, #ARGV do
  local id = ARGV[i]
  local job = load(id)
  local position, running, pace = 0, 0, ''
  if job and job.status == 'queued' then
    local own = lane_of(job)
    local rank = redis.call('ZRANK', key('lane', job.task, own), id) or 0
    local tags = redis.call('ZRANGE', key('lanes', job.task), 0, -1, 'WITHSCORES')
    local mine = tonumber(redis.call('ZSCORE', key('lanes', job.task), own) or 0)
    mine = mine + rank * WEIGHT[job.priority]
    position = rank + 1
    for j = 1, #tags, 2 do
      if tags[j] ~= own then
        local weight = WEIGHT[string.match(tags[j], '^%a+')]
        local before = math.ceil((mine - tags[j + 1]) / weight)
        local waiting = redis.call('ZCARD', key('lane', job.task, tags[j]))
        position = position + math.min(math.max(before, 0), waiting)
      end
    end
  end
  if job then
    running = redis.call('ZCARD', key('running', job.task))
    pace = redis.call('HGET', key('pace'), job.task) or ''
  end
  found[#found + 1] = redis.call('HGETALL', key('job', id))
  found[#found + 1] = position
  found[#found + 1] = running
  found[#found + 1] = pace
end
return found
