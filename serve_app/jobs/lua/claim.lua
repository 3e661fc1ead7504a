-- Give jobs to a worker. ARGV: namespace, lease in seconds, how many of lines that are not named here,
-- then pairs of lines (separated by spaces) and how many of them together, which may be 0.
-- Returns a flat array of id and record (as HGETALL gives it).
local found, named = {}, {}

local function take(id)
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

-- One of each line in turn, until there is no room or no job.
local function take_of(lines, room)
  local i = 1
  while room > 0 and #lines > 0 do
    i = i > #lines and 1 or i
    local id = pop(lines[i])
    if id then
      take(id)
      room, i = room - 1, i + 1
    else
      table.remove(lines, i)
    end
  end
end

for i = 4, #ARGV, 2 do
  local lines = {}
  for line in string.gmatch(ARGV[i], '%S+') do
    named[line], lines[#lines + 1] = true, line
  end
  take_of(lines, tonumber(ARGV[i + 1]))
end
local others = {}
for _, line in ipairs(redis.call('SMEMBERS', key('lines'))) do
  if not named[line] then
    others[#others + 1] = line
  end
end
take_of(others, tonumber(ARGV[3]))
return found
