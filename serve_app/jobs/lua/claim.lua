-- Give jobs to a worker. ARGV: namespace, lease in seconds, then pairs of task and how many.
-- Returns a flat array of id and record (as HGETALL gives it).
local found = {}
for i = 3, #ARGV, 2 do
  for _ = 1, tonumber(ARGV[i + 1]) do
    local id = pop(ARGV[i])
    if not id then
      break
    end
    local job = load(id)
    remove(id, job)
    set_status(id, job, 'processing')
    redis.call('HINCRBY', key('job', id), 'claim', 1)
    redis.call('HSETNX', key('job', id), 'started', string.format('%.6f', now()))
    redis.call('ZADD', key('running', job.task), now() + ARGV[2], id)
    emit_status(id, 'processing')
    if tonumber(job.claim or 0) == 0 then
      local data = {job_id = id, status = 'processing', task = job.task}
      notify(id, job, 'processing', cjson.encode(data))
    end
    found[#found + 1] = id
    found[#found + 1] = redis.call('HGETALL', key('job', id))
  end
end
return found
