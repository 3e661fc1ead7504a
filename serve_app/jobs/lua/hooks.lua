-- Begins the scripts of the outbox, after common.lua.
local outbox = key('outbox')

local function read(event)
  local parsed = cjson.decode(event)
  return string.match(parsed.url, '^%a+://([^/?#]*)') .. '', parsed.owner .. ''
end

-- The deliveries at this moment to the event's host, and of its owner.
local function places(event)
  local readable, host, owner = pcall(read, event)
  -- The deliverer fails on what cannot be read; here it must not hold up other jobs.
  if not readable then
    host, owner = '', ''
  end
  return {key('hooks-busy', 'host', host), key('hooks-busy', 'owner', owner)}
end
