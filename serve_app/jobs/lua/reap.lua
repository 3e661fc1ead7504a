-- Put jobs whose worker was lost back into the queue. ARGV: namespace, attempts after which a job
-- has failed, tasks as a JSON array.
-- Returns ids of jobs to end, each followed by why: 'lost' too often, or 'late'.
local over = {}
for _, task in ipairs(cjson.decode(ARGV[3])) do
  local lost = redis.call('ZRANGEBYSCORE', key('running', task), '-inf', now(), 'LIMIT', 0, 100)
  for _, id in ipairs(lost) do
    local job = load(id)
    if not job or job.status ~= 'processing' then
      redis.call('ZREM', key('running', task), id)
    elseif tonumber(job.attempts) >= tonumber(ARGV[2]) then
      over[#over + 1] = id
      over[#over + 1] = 'lost'
    else
      redis.call('ZREM', key('running', task), id)
      set_status(id, job, 'queued')
      push(id, job)
      emit_status(id, 'queued')
    end
  end
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', key('deadlines'), '-inf', now(), 'LIMIT', 0, 100)) do
  over[#over + 1] = id
  over[#over + 1] = 'late'
end
return over
