-- Give jobs to a worker. ARGV: namespace, lease in seconds, how many of lines that are not named here
-- and how many seconds ago these must have been submitted, then pairs of lines (separated by spaces)
-- and how many of them together, which may be 0.
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

-- A job of a line that was submitted by then. In a lane the older of two of a score comes first.
local function any_by(line, latest)
  for _, owner in ipairs(redis.call('ZRANGE', key('lanes', line), 0, -1)) do
    for score = 0, 1 do
      local lane = key('lane', line, owner)
      local id = redis.call('ZRANGEBYSCORE', lane, score, score, 'LIMIT', 0, 1)[1]
      if id and tonumber(redis.call('HGET', key('job', id), 'created')) <= latest then
        return id
      end
    end
  end
end

-- One of each line in turn, until there is no room or no job.
local function take_of(lines, room, next_of)
  local i = 1
  while room > 0 and #lines > 0 do
    i = i > #lines and 1 or i
    local id = next_of(lines[i])
    if id then
      take(id)
      room, i = room - 1, i + 1
    else
      table.remove(lines, i)
    end
  end
end

for i = 5, #ARGV, 2 do
  local lines = {}
  for line in string.gmatch(ARGV[i], '%S+') do
    named[line], lines[#lines + 1] = true, line
  end
  take_of(lines, tonumber(ARGV[i + 1]), pop)
end
local others = {}
for _, line in ipairs(redis.call('SMEMBERS', key('lines'))) do
  if not named[line] then
    others[#others + 1] = line
  end
end
local latest = now() - ARGV[4]
take_of(others, tonumber(ARGV[3]), function(line)
  return any_by(line, latest)
end)
return found
