-- SPDX-License-Identifier: Apache-2.0

-- One decision of the rate limiter on all levels of a zone, or what follows it.
--
-- KEYS, level by level: the record of the rate, if the level has one, and the
-- leases of the requests in flight, if they are limited.
--
-- ARGV: what to do, the time (tests only; else empty), the cost, the name of
-- the lease, how long it lasts, when a reservation was made, what becomes of
-- it; then eight per level: algorithm (0 no rate, 1 sliding window, 2 token
-- bucket), capacity, quantum, span, tokens per second, most requests in
-- flight, penalty, longest penalty. All times are in microseconds.
--
-- A record is {blocked until, blocked since, then for a window the quantum and
-- the count of each run, oldest first, for a bucket its tokens and when it had
-- them}.

local op = ARGV[1]
local now = tonumber(ARGV[2])
local slack = 0 -- a test's time is not the one in which keys expire
if now then
	slack = 600000
else
	local time = redis.call('TIME')
	now = time[1] * 1000000 + time[2]
end
local cost = tonumber(ARGV[3])
local member = ARGV[4]
local lease = tonumber(ARGV[5])

if op == 'probe' then
	redis.call('SET', KEYS[1], '1', 'PX', 1000)
	return { 1, now }
end

local levels = {}
local key = 0
for i = 8, #ARGV, 8 do
	local l = {
		algorithm = ARGV[i],
		capacity = tonumber(ARGV[i + 1]),
		quantum = tonumber(ARGV[i + 2]),
		span = tonumber(ARGV[i + 3]),
		rate = tonumber(ARGV[i + 4]),
		inflight = tonumber(ARGV[i + 5]),
		penalty = tonumber(ARGV[i + 6]),
		longest = tonumber(ARGV[i + 7]),
	}
	if l.algorithm ~= '0' then
		key = key + 1
		l.key = KEYS[key]
	end
	if l.inflight > 0 then
		key = key + 1
		l.leases = KEYS[key]
	end
	levels[#levels + 1] = l
end

local function quantum(l, time)
	return (time - time % l.quantum) / l.quantum
end

-- forgotten is when an event of a quantum does not count anymore.
local function forgotten(l, q)
	return (q + l.span + 1) * l.quantum
end

-- load reads a record and brings it up to date.
local function load(l)
	local raw = redis.call('GET', l.key)
	local r = { 0, 0 }
	if raw then
		r = cmsgpack.unpack(raw)
	end
	if l.algorithm == '2' then
		l.tokens = l.capacity
		if r[3] then
			-- as golang.org/x/time/rate computes it, to the last bit
			local elapsed = math.max(now - r[4], 0)
			local part = elapsed % 1000000
			local seconds = (elapsed - part) / 1000000 + part * 1000 / 1000000000
			l.tokens = math.min(r[3] + seconds * l.rate, l.capacity)
		end
	else
		local oldest, first, total = quantum(l, now) - l.span, 3, 0
		while r[first] and r[first] < oldest do
			first = first + 2
		end
		if first > 3 then
			local kept = { r[1], r[2] }
			for i = first, #r do
				kept[#kept + 1] = r[i]
			end
			r = kept
		end
		for i = 4, #r, 2 do
			total = total + r[i]
		end
		l.total = total
	end
	l.record = r
end

-- store writes a record for as long as it says something.
local function store(l)
	local r, last = l.record, 0
	if l.algorithm == '2' then
		if l.tokens < l.capacity then
			last = now + math.ceil((l.capacity - l.tokens) / l.rate * 1000000) + 1
		end
	elseif r[3] then
		last = forgotten(l, r[#r - 1])
	end
	if r[2] > 0 then
		last = math.max(last, r[1])
	end
	if last <= now then
		redis.call('DEL', l.key)
		return
	end
	redis.call('SET', l.key, cmsgpack.pack(r), 'PX', math.ceil((last - now) / 1000) + slack)
end

-- charge counts n events.
local function charge(l, n)
	local r = l.record
	if l.algorithm == '2' then
		l.tokens = l.tokens - math.min(n, l.capacity)
		r[3], r[4] = l.tokens, now
		return
	end
	n = math.min(n, l.capacity - l.total)
	if n <= 0 then
		return
	end
	l.total = l.total + n
	local q = quantum(l, now)
	if r[3] and q <= r[#r - 1] then
		r[#r] = r[#r] + n
	else
		r[#r + 1] = q
		r[#r + 1] = n
	end
end

-- refund takes back what was charged at a time.
local function refund(l, n, at)
	local r = l.record
	if l.algorithm == '2' then
		l.tokens = math.min(l.tokens + n, l.capacity)
		r[3], r[4] = l.tokens, now
		return
	end
	local q = quantum(l, at)
	for i = 3, #r, 2 do
		if r[i] == q then
			n = math.min(n, r[i + 1])
			r[i + 1] = r[i + 1] - n
			l.total = l.total - n
			if r[i + 1] == 0 then
				table.remove(r, i)
				table.remove(r, i)
			end
			return
		end
	end
end

-- hold writes the lease of a request.
local function hold(l)
	redis.call('ZREMRANGEBYSCORE', l.leases, '-inf', now)
	redis.call('ZADD', l.leases, now + lease, member)
	redis.call('PEXPIRE', l.leases, math.ceil(lease / 1000) + slack)
end

-- wait is how long it takes until n events have room in a window.
local function wait(l, n)
	local r, over = l.record, l.total + n - l.capacity
	for i = 3, #r, 2 do
		over = over - r[i + 1]
		if over <= 0 then
			return math.max(forgotten(l, r[i]) - now, 1)
		end
	end
	return forgotten(l, quantum(l, now)) - now
end

-- look finds what is known of a key, and whether the request may pass.
local function look(l)
	l.blocked, l.used, l.wait, l.reset, l.flying, l.reason, l.penalized = 0, 0, 0, 0, 0, 0, 0
	local over = false
	if l.key then
		load(l)
		local r = l.record
		if r[2] > 0 and r[1] > now then
			l.blocked = r[1]
		end
		if l.algorithm == '2' then
			local lack = cost - l.tokens
			over = lack > 0 and (cost > l.capacity or lack / l.rate * 1000000000 >= 1)
			l.used = string.format('%.17g', l.tokens)
		else
			over = l.total + cost > l.capacity
			l.used = l.total
			if over then
				l.wait = wait(l, cost)
			end
			if r[3] then
				l.reset = math.max(forgotten(l, r[#r - 1]) - now, 0)
			end
		end
	end
	if l.leases then
		l.flying = redis.call('ZCOUNT', l.leases, string.format('(%.0f', now), '+inf')
	end
	if l.blocked > 0 then
		l.reason, l.wait = 3, l.blocked - now
	elseif over then
		l.reason = 1
	elseif l.leases and l.flying >= l.inflight then
		l.reason = 2
	end
end

-- punish blocks a key that is over its limit, or extends its block.
local function punish(l)
	local since, till = now, now + l.penalty
	if l.blocked > 0 then
		since = l.record[2]
	end
	if l.longest > 0 then
		till = math.min(till, since + l.longest)
	end
	till = math.max(till, l.blocked)
	if till > l.blocked then
		l.record[1], l.record[2] = till, since
		store(l)
	end
	l.penalized = till - now
end

if op == 'take' or op == 'look' then
	local allowed = 1
	for _, l in ipairs(levels) do
		look(l)
		if l.reason > 0 then
			allowed = 0
		end
	end
	local reply = { allowed, now }
	for _, l in ipairs(levels) do
		if op == 'take' and allowed == 1 then
			if l.leases then
				hold(l)
			end
			if l.key and cost > 0 then
				charge(l, cost)
				store(l)
			end
		elseif op == 'take' and l.penalty > 0 and (l.reason == 1 or l.reason == 3) then
			punish(l)
		end
		for _, v in ipairs({ l.reason, l.blocked, l.used, l.wait, l.reset, l.flying, l.penalized }) do
			reply[#reply + 1] = v
		end
	end
	return reply
end

local at, reservation = tonumber(ARGV[6]), ARGV[7]
for _, l in ipairs(levels) do
	if op == 'renew' and l.leases then
		hold(l)
	elseif op == 'forgive' and l.key then
		redis.call('DEL', l.key)
	elseif op == 'done' then
		if l.leases then
			redis.call('ZREM', l.leases, member)
		end
		if l.key and cost > 0 and reservation ~= '' then
			load(l)
			refund(l, cost, at)
			if reservation == 'charge' then
				charge(l, cost)
			end
			store(l)
		end
	end
end
return { 1, now }
