-- Put jobs whose worker was lost back into the queue. ARGV: namespace, attempts after which a job
-- has failed, tasks as a JSON array, lease in seconds.
-- Returns ids of jobs to end, each followed by why: 'lost' too often, or 'late'.
local half = tonumber(ARGV[4]) / 2
-- A job that kills its worker before a model begins it costs no attempt, and must end all the same.
local CLAIMS_OF_AN_ATTEMPT = 4

local function is_lost_too_often(job, attempts)
  local begun, claims = tonumber(job.attempts or 0), tonumber(job.claim)
  return begun >= attempts or claims >= attempts * CLAIMS_OF_AN_ATTEMPT
end

-- While Redis is away, no worker can renew a claim. A long time without a call of this script, which
-- workers make every second, means that it was away, and that they come first. The call itself may
-- have waited in a Redis that hung.
local function is_early()
  local seen, at = redis.call('HMGET', key('reaper'), 'last', 'from'), now()
  local last, from = tonumber(seen[1] or at), tonumber(seen[2] or 0)
  if at - last > half and last >= from then
    from = at + half
  end
  redis.call('HSET', key('reaper'), 'last', string.format('%.6f', at), 'from', string.format('%.6f', from))
  return at < from
end

local over = {}
for _, task in ipairs(is_early() and {} or cjson.decode(ARGV[3])) do
  local lost = redis.call('ZRANGEBYSCORE', key('running', task), '-inf', now(), 'LIMIT', 0, 100)
  for _, id in ipairs(lost) do
    local job = load(id)
    if not job or job.status ~= 'processing' then
      redis.call('ZREM', key('running', task), id)
    elseif is_lost_too_often(job, tonumber(ARGV[2])) then
      over[#over + 1] = id
      over[#over + 1] = 'lost'
    else
      redis.call('ZREM', key('running', task), id)
      set_status(id, job, 'queued')
      push(id, job)
      emit_status(id, 'queued')
    end
  end
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', key('deadlines'), '-inf', now(), 'LIMIT', 0, 100)) do
  over[#over + 1] = id
  over[#over + 1] = 'late'
end
return over
