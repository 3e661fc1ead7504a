-- End a job, once. ARGV: namespace, id, claim that the caller holds or '' for whoever has it, final
-- status, fields of the record as a JSON object, the job as the API shows it (for a webhook),
-- seconds to keep it, 1 to list it among the dead letters, 1 to end it only if its claim is void, most
-- ended jobs of an owner.
-- Returns the status that the job has now, and whether this call set it.

-- Of too many ended jobs the oldest go with the next sweep.
local function trim(owner, most)
  local count, oldest, list = 0, nil, nil
  for _, status in ipairs(ENDED) do
    local name = key('jobs', owner, status)
    local first = redis.call('ZRANGE', name, 0, 0)[1]
    count = count + redis.call('ZCARD', name)
    if first and (not oldest or first < oldest) then
      oldest, list = first, name
    end
  end
  if count > most then
    redis.call('ZREM', list, oldest)
    redis.call('ZREM', key('jobs', owner), oldest)
    redis.call('ZADD', key('expiry'), 0, oldest .. ':' .. owner)
  end
end

local id, status, fields = ARGV[2], ARGV[4], cjson.decode(ARGV[5])
local job = load(id)
if not job then
  return {'', 0}
end
-- A worker that was taken for lost may have renewed its claim meanwhile.
if ARGV[9] == '1' and tonumber(redis.call('ZSCORE', key('running', job.task), id) or 0) > now() then
  return {job.status, 0}
end
local active = job.status == 'queued' or job.status == 'processing'
if not active or (ARGV[3] ~= '' and (job.status ~= 'processing' or job.claim ~= ARGV[3])) then
  return {job.status, 0}
end
if job.status == 'queued' then
  remove(id, job)
else
  redis.call('ZREM', key('running', job.task), id)
  if ARGV[3] == '' then
    signal('ended ' .. id) -- its worker gives it up
  end
end
set_status(id, job, status)
fields.ended = string.format('%.6f', now())
for field, value in pairs(fields) do
  redis.call('HSET', key('job', id), field, value)
end
redis.call('ZREM', key('deadlines'), id)
redis.call('DEL', key('preview', id))
redis.call('ZADD', key('expiry'), now() + ARGV[7], id .. ':' .. job.owner)
if ARGV[8] == '1' then
  redis.call('ZADD', key('dead'), now(), id)
end
if status == 'completed' and job.started then
  -- A moving average, from which the queue's ETA follows.
  local took, before = now() - job.started, redis.call('HGET', key('pace'), job.task)
  local mean = before and before * 0.8 + took * 0.2 or took
  redis.call('HSET', key('pace'), job.task, string.format('%.3f', mean))
end
trim(job.owner, tonumber(ARGV[10]))
emit_status(id, status)
notify(id, job, status, ARGV[6])
return {status, 1}
