-- Begins every script. ARGV[1] is the namespace. Times are Redis's own, in seconds since 1970.
local ns = ARGV[1]
local WEIGHT = {interactive = 1, batch = 10}

local function key(...)
  return ns .. ':' .. table.concat({...}, ':')
end

local function now()
  local time = redis.call('TIME')
  return time[1] + time[2] / 1000000
end

local function signal(text)
  redis.call('PUBLISH', key('signal'), text)
end

-- Event streams are short: clients who resume want the last ones, and progress can be lost.
local function emit(id, event, data)
  redis.call('XADD', key('events', id), 'MAXLEN', '~', '200', '*', 'event', event, 'data', data)
  signal('event ' .. id)
end

local function emit_status(id, status)
  emit(id, status, cjson.encode({job_id = id, status = status}))
end

local function lane_of(job)
  return job.priority .. ':' .. job.owner
end

-- Weighted fair queueing (Demers, Keshav and Shenker, 1989): each lane, which is one owner's jobs
-- of one priority, has a tag; the lane with the lowest tag is served next, and pays with its weight.
local function push(id, job)
  local lane, lanes = lane_of(job), key('lanes', job.task)
  redis.call('ZADD', key('lane', job.task, lane), job.created, id)
  redis.call('ZADD', key('queued', job.task), job.created, id)
  if not redis.call('ZSCORE', lanes, lane) then
    local turn = tonumber(redis.call('GET', key('turn', job.task)) or 0)
    redis.call('ZADD', lanes, turn + WEIGHT[job.priority], lane)
  end
  signal('wake')
end

local function remove(id, job)
  local lane = lane_of(job)
  redis.call('ZREM', key('lane', job.task, lane), id)
  redis.call('ZREM', key('queued', job.task), id)
  if redis.call('EXISTS', key('lane', job.task, lane)) == 0 then
    redis.call('ZREM', key('lanes', job.task), lane)
  end
end

local function pop(task)
  local next_lane = redis.call('ZRANGE', key('lanes', task), 0, 0, 'WITHSCORES')
  local lane, tag = next_lane[1], next_lane[2]
  if not lane then
    return nil
  end
  local id = redis.call('ZRANGE', key('lane', task, lane), 0, 0)[1]
  redis.call('SET', key('turn', task), tag)
  redis.call('ZINCRBY', key('lanes', task), WEIGHT[string.match(lane, '^%a+')], lane)
  return id
end

local function load(id)
  local flat, job = redis.call('HGETALL', key('job', id)), {}
  for i = 1, #flat, 2 do
    job[flat[i]] = flat[i + 1]
  end
  return job.status and job or nil
end

local function set_status(id, job, status)
  redis.call('HSET', key('job', id), 'status', status)
  if job.status then
    redis.call('ZREM', key('jobs', job.owner, job.status), id)
  end
  redis.call('ZADD', key('jobs', job.owner, status), 0, id)
end

local function notify(id, job, status, data)
  if not string.find(',' .. (job.webhook_events or '') .. ',', ',' .. status .. ',', 1, true) then
    return
  end
  local number = redis.call('HINCRBY', key('job', id), 'webhook_count', 1)
  local message = '{"id":' .. cjson.encode('msg_' .. id .. '_' .. number)
    .. ',"url":' .. cjson.encode(job.webhook) .. ',"owner":' .. cjson.encode(job.owner)
    .. ',"type":"job.' .. status .. '","created":' .. string.format('%.3f', now())
    .. ',"data":' .. data .. '}'
  redis.call('RPUSH', key('hooks', id), message)
  redis.call('ZADD', key('outbox'), 'NX', now(), id)
end
