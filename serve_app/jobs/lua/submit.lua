-- Accept a job. ARGV: namespace, id, fields of the record as a JSON object, tasks as a JSON array,
-- most jobs in the queue, most of this owner, Idempotency-Key's digest or '', 1 to change nothing and
-- only tell what would become of it.
-- Returns 'queued', 'same' or 'conflict' with the id and the status of the job, which is the first
-- one with that key; or 'full' or 'share' with how many wait.
local id, job, tasks = ARGV[2], cjson.decode(ARGV[3]), cjson.decode(ARGV[4])
local before = load(id)
if before then
  return {'queued', id, before.status} -- sent again: the connection broke before the answer came
end
local first = ARGV[7] ~= '' and key('idempotency', job.owner, ARGV[7]) or nil
if first then
  local found = redis.call('GET', first)
  local theirs = found and load(found)
  if theirs then
    return {theirs.fingerprint == job.fingerprint and 'same' or 'conflict', found, theirs.status}
  end
  job.idempotency = ARGV[7] -- the key ends with the job
end
local total = 0
for _, task in ipairs(tasks) do
  total = total + redis.call('ZCARD', key('queued', task))
end
if total >= tonumber(ARGV[5]) then
  return {'full', tostring(total), ''}
end
local own = redis.call('ZCARD', key('jobs', job.owner, 'queued'))
if own >= tonumber(ARGV[6]) then
  return {'share', tostring(own), ''}
end
if ARGV[8] == '1' then
  return {'queued', id, 'queued'}
end
job.created = string.format('%.6f', now())
for field, value in pairs(job) do
  redis.call('HSET', key('job', id), field, value)
end
redis.call('ZADD', key('jobs', job.owner), 0, id)
set_status(id, job, 'queued')
redis.call('ZADD', key('deadlines'), now() + job.deadline_s, id)
if first then
  redis.call('SET', first, id)
end
push(id, job)
local data = cjson.encode({job_id = id, status = 'queued'})
-- Without a signal: nobody knows this id yet.
redis.call('XADD', key('events', id), '*', 'event', 'queued', 'data', data)
return {'queued', id, 'queued'}
