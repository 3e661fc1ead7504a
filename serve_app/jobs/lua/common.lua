-- Begins every script. ARGV[1] is the namespace. Times are Redis's own, in seconds since 1970.
local ns = ARGV[1]
local ENDED = {'completed', 'failed', 'canceled'}
local WEIGHT = {[0] = 1, [1] = 10} -- of a turn, by the score of a job in its lane

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

-- Jobs of one task that name the same model, or none, wait in one line: the queue of that model.
local function line_of(job)
  return job.line or job.task -- records of former versions have none
end

-- Weighted fair queueing (Demers, Keshav and Shenker, 1989): in each line an owner has a lane, in which
-- interactive jobs (score 0) come before batch jobs (1), and older ones before younger ones. A lane's
-- tag is when it was served last, plus the weight of its first job; the lowest tag is served next.
local function weight_of_first(lane)
  local first = redis.call('ZRANGE', lane, 0, 0, 'WITHSCORES')
  return first[1] and WEIGHT[tonumber(first[2])]
end

local function change_lane(job, command, ...)
  local line = line_of(job)
  local lane, lanes = key('lane', line, job.owner), key('lanes', line)
  local before = weight_of_first(lane)
  redis.call(command, lane, ...)
  local after = weight_of_first(lane)
  if not after then
    redis.call('ZREM', lanes, job.owner)
    if redis.call('EXISTS', lanes) == 0 then
      redis.call('SREM', key('lines'), line)
    end
    return
  end
  redis.call('SADD', key('lines'), line)
  local tag = tonumber(redis.call('GET', key('turn', line)) or 0) + after
  if before then
    local old = tonumber(redis.call('ZSCORE', lanes, job.owner))
    -- Whoever waited with a batch job has saved no turns for interactive ones.
    tag = after < before and math.min(old, math.max(old + after - before, tag)) or old + after - before
  end
  redis.call('ZADD', lanes, tag, job.owner)
end

local function push(id, job)
  change_lane(job, 'ZADD', job.priority == 'batch' and 1 or 0, id)
  redis.call('ZADD', key('queued', job.task), job.created, id)
  signal('wake')
end

local function remove(id, job)
  change_lane(job, 'ZREM', id)
  redis.call('ZREM', key('queued', job.task), id)
end

local function pop(line)
  local owner, tag = unpack(redis.call('ZRANGE', key('lanes', line), 0, 0, 'WITHSCORES'))
  if not owner then
    return nil
  end
  local lane = key('lane', line, owner)
  redis.call('SET', key('turn', line), tag)
  redis.call('ZINCRBY', key('lanes', line), weight_of_first(lane), owner)
  return redis.call('ZRANGE', lane, 0, 0)[1]
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
