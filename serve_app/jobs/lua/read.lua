-- Jobs with their place in the queue. ARGV: namespace, then ids.
-- Returns for each: its record (as HGETALL gives it; empty if there is none), its position (0
-- unless queued), running jobs of its task, mean seconds of a job of its task ('' if unknown).

-- The lanes of a line: when each was served last, and how many interactive and batch jobs it has.
local seen = {}
local function lanes_of(line)
  if not seen[line] then
    seen[line] = {}
    local tags = redis.call('ZRANGE', key('lanes', line), 0, -1, 'WITHSCORES')
    for i = 1, #tags, 2 do
      local lane = key('lane', line, tags[i])
      local quick = redis.call('ZCOUNT', lane, 0, 0)
      local first = quick > 0 and WEIGHT[0] or WEIGHT[1]
      seen[line][tags[i]] = {tags[i + 1] - first, quick, redis.call('ZCARD', lane) - quick}
    end
  end
  return seen[line]
end

-- How many of so many jobs, whose tags follow `from` at equal distances, have one below `tag`.
local function below(tag, from, distance, most)
  return math.max(0, math.min(most, math.ceil((tag - from) / distance) - 1))
end

local function position_of(id, job)
  local line = line_of(job)
  local lanes = lanes_of(line)
  local from, quick = unpack(lanes[job.owner])
  local place = redis.call('ZRANK', key('lane', line, job.owner), id) + 1
  local tag = from + math.min(place, quick) * WEIGHT[0] + math.max(place - quick, 0) * WEIGHT[1]
  for owner, lane in pairs(lanes) do
    if owner ~= job.owner then
      local start, interactive, batch = unpack(lane)
      place = place + below(tag, start, WEIGHT[0], interactive)
      place = place + below(tag, start + interactive * WEIGHT[0], WEIGHT[1], batch)
    end
  end
  return place
end

local found = {}
for i = 2, #ARGV do
  local id = ARGV[i]
  local job = load(id)
  local position, running, pace = 0, 0, ''
  if job and job.status == 'queued' then
    position = position_of(id, job)
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
