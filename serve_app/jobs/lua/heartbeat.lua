-- Keep a worker's claims. ARGV: namespace, lease in seconds, then for each job: id, claim, event
-- ('', 'progress' or 'preview'), its data, and fields of the record to set, as a JSON object.
-- Returns the ids of the jobs that the worker has no longer.
local lost = {}
for i = 3, #ARGV, 5 do
  local id = ARGV[i]
  local job = redis.call('HMGET', key('job', id), 'status', 'claim', 'task')
  if job[1] == 'processing' and job[2] == ARGV[i + 1] then
    redis.call('ZADD', key('running', job[3]), now() + ARGV[2], id)
    for field, value in pairs(cjson.decode(ARGV[i + 4])) do
      redis.call('HSET', key('job', id), field, tostring(value))
    end
    if ARGV[i + 2] == 'preview' then
      -- Not kept: only who watches at this moment gets it, so that no picture stays in Redis.
      redis.call('SET', key('preview', id), ARGV[i + 3], 'EX', 30)
      signal('event ' .. id)
    elseif ARGV[i + 2] ~= '' then
      emit(id, ARGV[i + 2], ARGV[i + 3])
    end
  else
    lost[#lost + 1] = id
  end
end
return lost
