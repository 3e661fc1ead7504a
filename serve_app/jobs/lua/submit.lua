-- Accept a job. ARGV: namespace, id, fields of the record as a JSON object, tasks as a JSON array,
-- most jobs in the queue, most of this owner, Idempotency-Key's digest or '', seconds to keep that,
-- 1 to change nothing and only tell what would become of it.
-- Returns 'queued', or the id of the first job with the same key and 'same' or 'conflict', or
-- 'full', or 'share'.
local id, job, tasks = ARGV[2], cjson.decode(ARGV[3]), cjson.decode(ARGV[4])
if redis.call('EXISTS', key('job', id)) == 1 then
  return {'queued', id} -- sent again, because the connection broke before the answer came
end
local first = ARGV[7] ~= '' and key('idempotency', job.owner, ARGV[7]) or nil
if first then
  local found = redis.call('HMGET', first, 'id', 'fingerprint')
  if found[1] then
    return {found[2] == job.fingerprint and 'same' or 'conflict', found[1]}
  end
end
local total = 0
for _, task in ipairs(tasks) do
  total = total + redis.call('ZCARD', key('queued', task))
end
if total >= tonumber(ARGV[5]) then
  return {'full', tostring(total)}
end
local own = redis.call('ZCARD', key('jobs', job.owner, 'queued'))
if own >= tonumber(ARGV[6]) then
  return {'share', tostring(own)}
end
if ARGV[9] == '1' then
  return {'queued', id}
end
job.created = string.format('%.6f', now())
for field, value in pairs(job) do
  redis.call('HSET', key('job', id), field, value)
end
redis.call('ZADD', key('jobs', job.owner), 0, id)
set_status(id, job, 'queued')
redis.call('ZADD', key('deadlines'), now() + job.deadline_s, id)
if first then
  redis.call('HSET', first, 'id', id, 'fingerprint', job.fingerprint)
  redis.call('EXPIRE', first, ARGV[8])
end
push(id, job)
local data = cjson.encode({job_id = id, status = 'queued'})
-- Without a signal: nobody knows this id yet.
redis.call('XADD', key('events', id), '*', 'event', 'queued', 'data', data)
return {'queued', id}
