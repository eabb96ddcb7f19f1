package sim

import (
	"math/bits"
	"slices"
	"time"

	"thaw/fetcher/zone"
)

// host is a host that starts the image.
type host struct {
	// state of each chunk of the plan: absent, resident, or the fetch that brings it.
	state  []int32
	read   int32   // the next of the plan's reads
	awaits int32   // the chunk that the program waits for, or nothing
	next   int32   // the first chunk that may have to be prefetched
	ahead  int64   // bytes of prefetches in flight
	many   int     // prefetches in flight
	live   []int32 // fetches
	claim  int32   // the demand that arrives, for which prefetches pause, or nothing
	// waiters are requests of peers that wait for chunks of this host.
	waiters []int32
	workers workers // its processors, which it may share; nil: any number
	// kept are the chunks that it has in memory as the registry has them, the next to go
	// first, and their bytes.
	kept      []int32
	keptBytes int64

	opening               bool
	straggler, dead, liar bool
	began, end            time.Duration
	zoned
}

const (
	nothing  = -1
	absent   = -1
	resident = -2
)

// fetch is a fetch of chunks of one run.
type fetch struct {
	host, run int32
	want      uint64 // the chunks of the run that it brings
	left      uint64 // those that have not come
	bytes     int64  // that count as prefetch
	demand    bool
	own       bool    // for a peer: only the registry is asked
	hedges    int     // requests that were made because others are late
	requests  []int32 // under way
	used      bool
	attempt   attempt
}

// request is one request of a fetch.
type request struct {
	fetch      int32 // nothing if the answer is of no use any more
	from, to   int32 // lines
	run        int32
	chunks     uint64 // that are asked for
	come       uint64
	flow       int32
	generation int32
	used       bool
	waits      bool // at its server, for chunks that this does not have
	connected  bool // it has a connection of the registry
	granted    bool // by the owner
	owner      bool // the server is asked as an owner
	stored     bool // the server sends the chunk as the registry has it
	asked      time.Duration
	signed     bool          // a sign of life has come
	began      time.Duration // when the first bytes came
	moved      time.Duration // when the last bytes came, or a sign of life
	quiet      time.Duration // the longest pause between these, for a reader
	answer     answer
}

// open begins a start.
func (w *world) open(h int32) {
	w.hosts[h].began = w.now
	w.hosts[h].opening = true
	if w.plan.Manifest+w.plan.Index == 0 {
		w.opened(h)
		return
	}
	w.ask(h, nothing, w.registry())
}

// opened happens when the host has the manifest, and when it has the index: then the program
// starts, and so do prefetches.
func (w *world) opened(h int32) {
	if w.index != nothing && w.hosts[h].state[w.index] != resident {
		w.hosts[h].awaits = w.index
		w.demand(h, w.index)
		return
	}
	w.hosts[h].opening = false
	w.q.push(w.now+w.plan.Reads[0].After, work, h, 0)
	w.fetchAhead(h)
}

// work runs the program to the next chunk that is absent.
func (w *world) work(at int32) {
	h := &w.hosts[at]
	for {
		c := int32(w.plan.Reads[h.read].Chunk)
		if h.state[c] != resident {
			h.awaits = c
			w.demand(at, c)
			return
		}
		h.read++
		if int(h.read) == len(w.plan.Reads) {
			h.end = w.now
			w.left--
			return
		}
		if after := w.plan.Reads[h.read].After; after > 0 {
			w.q.push(w.now+after, work, at, 0)
			return
		}
	}
}

// demand fetches a chunk that the program waits for, with those neighbours of it that would be
// prefetched soon.
func (w *world) demand(at, c int32) {
	h := &w.hosts[at]
	if id := h.state[c]; id >= 0 {
		f := &w.fetches[id]
		if !f.demand {
			f.demand = true
			w.uncount(f)
			w.resume(at)
			for _, r := range f.requests {
				w.setHedge(r)
			}
		}
		return
	}
	w.newFetch(at, c, true, false)
	w.fetchAhead(at)
}

// fetchAhead starts prefetches in the order of the plan, within the bounds.
func (w *world) fetchAhead(at int32) {
	h := &w.hosts[at]
	if h.opening || h.dead {
		return
	}
	for h.ahead < w.o.Window && h.many < w.o.Requests {
		for int(h.next) < len(h.state) && h.state[h.next] != absent {
			h.next++
		}
		if int(h.next) == len(h.state) {
			return
		}
		w.newFetch(at, w.choose(h), false, false)
	}
}

// choose picks the next chunk to prefetch: one of the first Among absent ones. Hosts that start
// at one time then ask for different chunks, so each of them soon has something that others want.
func (w *world) choose(h *host) int32 {
	if w.o.Among <= 1 {
		return h.next
	}
	n, pick := 0, h.next
	for c := h.next; int(c) < len(h.state) && n < w.o.Among; c++ {
		if h.state[c] != absent {
			continue
		}
		if n++; w.rng.IntN(n) == 0 {
			pick = c
		}
	}
	return pick
}

// newFetch fetches a chunk with its absent neighbours in the run.
func (w *world) newFetch(at, c int32, demand, own bool) {
	h := &w.hosts[at]
	run := &w.runs[w.runOf[c]]
	i := w.place[c]
	want := uint64(1) << i
	for j := i + 1; j < len(run.chunks) && h.state[run.chunks[j]] == absent && w.plan.Chunks[run.chunks[j]].Number == w.plan.Chunks[run.chunks[j-1]].Number+1; j++ {
		want |= 1 << j
	}
	if !demand {
		for j := i - 1; j >= 0 && h.state[run.chunks[j]] == absent && w.plan.Chunks[run.chunks[j]].Number == w.plan.Chunks[run.chunks[j+1]].Number-1; j-- {
			want |= 1 << j
		}
	}
	w.fetchChunks(at, w.runOf[c], want, demand, own)
}

func (w *world) fetchChunks(at, run int32, want uint64, demand, own bool) {
	var id int32
	if n := len(w.freeFetches); n > 0 {
		id = w.freeFetches[n-1]
		w.freeFetches = w.freeFetches[:n-1]
	} else {
		id = int32(len(w.fetches))
		w.fetches = append(w.fetches, fetch{})
	}
	f := &w.fetches[id]
	*f = fetch{host: at, run: run, want: want, left: want, demand: demand, own: own, used: true, requests: f.requests[:0]}
	h := &w.hosts[at]
	h.live = append(h.live, id)
	for left := want; left != 0; left &= left - 1 {
		c := w.runs[run].chunks[bits.TrailingZeros64(left)]
		h.state[c] = id
		if !demand && !own {
			f.bytes += w.plan.Chunks[c].Stored
		}
	}
	if f.bytes > 0 {
		h.ahead += f.bytes
		h.many++
	}
	w.try(id)
}

// uncount takes a fetch out of the bounds for prefetches.
func (w *world) uncount(f *fetch) {
	if f.bytes > 0 {
		h := &w.hosts[f.host]
		h.ahead -= f.bytes
		h.many--
		f.bytes = 0
	}
}

// try asks the next server for what a fetch still lacks.
func (w *world) try(id int32) {
	f := &w.fetches[id]
	to := w.registry()
	if !f.own {
		to = w.sys.next(f)
	}
	w.ask(f.host, id, to)
}

// ask sends a request. The request of no fetch is that for what a host reads from the registry
// in any case.
func (w *world) ask(from, fetch, to int32) {
	var id int32
	if n := len(w.freeRequests); n > 0 {
		id = w.freeRequests[n-1]
		w.freeRequests = w.freeRequests[:n-1]
	} else {
		id = int32(len(w.requests))
		w.requests = append(w.requests, request{})
	}
	r := &w.requests[id]
	*r = request{fetch: fetch, from: from, to: to, flow: nothing, generation: r.generation + 1, used: true, asked: w.now, moved: w.now}
	if fetch >= 0 {
		f := &w.fetches[fetch]
		r.run, r.chunks = f.run, f.left
		f.requests = append(f.requests, id)
		w.asked++
	}
	w.q.push(w.now+w.rtt(from, to)/2, asks, id, r.generation)
	if to == w.registry() {
		w.registryAsked++
		return
	}
	w.sys.began(id)
	if after := w.sys.patience(r); after > 0 {
		w.q.push(w.now+after, expires, id, r.generation)
	}
	w.setHedge(id)
}

// serveRequest happens when a request has arrived at its server.
func (w *world) serveRequest(id int32) {
	r := &w.requests[id]
	switch {
	case r.to != w.registry():
		if w.reaches(r.from, r.to) {
			w.sys.serve(id)
		}
	case w.lines[r.to].serves < w.o.Connections:
		w.connect(id)
	default:
		w.waiting = append(w.waiting, id)
	}
}

// connect gives a request a connection of the registry.
func (w *world) connect(id int32) {
	r := &w.requests[id]
	w.lines[r.to].serves++
	r.connected = true
	w.q.push(w.now+w.o.Latency, serve, id, r.generation)
}

// disconnect ends a request at the registry; the next one is served.
func (w *world) disconnect(r *request) {
	if !r.connected {
		return
	}
	r.connected = false
	w.lines[r.to].serves--
	for w.head < len(w.waiting) {
		id := w.waiting[w.head]
		w.head++
		if next := &w.requests[id]; next.used && next.to == w.registry() && !next.connected && next.flow < 0 {
			w.connect(id)
			break
		}
	}
	if w.head == len(w.waiting) {
		w.waiting, w.head = w.waiting[:0], 0
	}
}

// bytesOf returns how many bytes a chunk takes in the answer to a request.
func (w *world) bytesOf(c int32, r *request) int64 {
	if int(r.to) >= w.o.Hosts || w.o.System == Tree || r.stored {
		return w.plan.Chunks[c].Stored
	}
	return w.plan.Chunks[c].Size
}

// sendsStored reports whether a host sends what is asked of it as the registry has it: a
// single chunk that it has in memory so, or will have when its own fetch ends.
func (w *world) sendsStored(r *request) bool {
	if w.o.System != Zone || int(r.to) >= w.o.Hosts || bits.OnesCount64(r.chunks) != 1 {
		return false
	}
	h := &w.hosts[r.to]
	c := w.runs[r.run].chunks[bits.TrailingZeros64(r.chunks)]
	if w.plan.Chunks[c].Stored >= w.plan.Chunks[c].Size || w.plan.Chunks[c].Stored > w.o.Memory {
		return false
	}
	if id := h.state[c]; id >= 0 {
		for _, x := range w.fetches[id].requests {
			if q := &w.requests[x]; q.flow >= 0 {
				return int(q.to) >= w.o.Hosts || q.stored
			}
		}
		return true
	}
	i := slices.Index(h.kept, c)
	if i < 0 {
		return false
	}
	h.kept = append(slices.Delete(h.kept, i, i+1), c) // it was used last
	return true
}

// keep keeps a chunk that has come as the registry has it, within the bound.
func (w *world) keep(at, c int32) {
	h := &w.hosts[at]
	n := w.plan.Chunks[c].Stored
	if w.o.System != Zone || n > w.o.Memory || slices.Contains(h.kept, c) {
		return
	}
	for h.keptBytes+n > w.o.Memory {
		h.keptBytes -= w.plan.Chunks[h.kept[0]].Stored
		h.kept = h.kept[1:]
	}
	h.kept, h.keptBytes = append(h.kept, c), h.keptBytes+n
}

// startFlow begins the answer.
func (w *world) startFlow(id int32) {
	r := &w.requests[id]
	if r.fetch < 0 && r.chunks == 0 {
		size := w.plan.Manifest + w.plan.Index + w.o.Beside
		w.metadata += size
		r.flow = w.newFlow(id, r.to, r.from, size)
		w.flows[r.flow].ready = size
		w.push(r.flow)
		return
	}
	r.stored = w.sendsStored(r)
	var size int64
	for left := r.chunks; left != 0; left &= left - 1 {
		c := w.runs[r.run].chunks[bits.TrailingZeros64(left)]
		n := w.bytesOf(c, r)
		size += n
		if r.to == w.registry() {
			w.fromRegistry += n
			if w.seen[c] {
				w.refetched += n
			}
			w.seen[c] = true
		}
	}
	if int(r.to) < w.o.Hosts {
		w.fromPeers += size
	}
	r.flow = w.newFlow(id, r.to, r.from, size)
	w.moreReady(id)
	if r.waits {
		h := &w.hosts[r.to]
		h.waiters = append(h.waiters, id)
	}
}

// moreReady lets an answer have the chunks that its server has got.
func (w *world) moreReady(id int32) {
	r := &w.requests[id]
	f := &w.flows[r.flow]
	f.ready = f.size
	if state := w.stateOf(r.to); state != nil {
		f.ready = 0
		for left := r.chunks; left != 0; left &= left - 1 {
			c := w.runs[r.run].chunks[bits.TrailingZeros64(left)]
			if state[c] != resident {
				break
			}
			f.ready += w.bytesOf(c, r)
		}
		if w.o.Whole && f.ready < f.size {
			f.ready = 0
		}
	}
	r.waits = f.ready < f.size
	w.push(r.flow)
}

// stateOf returns what a server has; nil for the registry, which has everything.
func (w *world) stateOf(server int32) []int32 {
	if server == w.registry() {
		return nil
	}
	return w.hosts[server].state
}

// received happens when bytes of an answer have arrived.
func (w *world) received(flow int32) {
	id := w.flows[flow].request
	r := &w.requests[id]
	if r.fetch >= 0 && w.fetches[r.fetch].demand && r.signed {
		r.quiet = max(r.quiet, w.now-r.moved)
	}
	w.sign(id)
	if r.began == 0 {
		r.began = w.now
	}
	r.moved = w.now
	if r.fetch < 0 {
		if w.flows[flow].got == w.flows[flow].size {
			at := r.from
			w.endRequest(id)
			w.opened(at)
		}
		return
	}
	f := &w.fetches[r.fetch]
	if h := &w.hosts[r.from]; f.demand && h.claim < 0 && h.awaits >= 0 && h.state[h.awaits] == r.fetch {
		h.claim = r.fetch
	}
	got := w.flows[flow].got
	var end int64
	for left := r.chunks; left != 0; left &= left - 1 {
		i := bits.TrailingZeros64(left)
		c := w.runs[r.run].chunks[i]
		if end += w.bytesOf(c, r); end > got {
			return
		}
		if r.come&(1<<i) != 0 {
			continue
		}
		r.come |= 1 << i
		if int(r.to) < w.o.Hosts && w.hosts[r.to].liar {
			w.wrongs++
			w.failed(id, wrong)
			return
		}
		if r.come == r.chunks {
			w.sys.ended(id, served)
		}
		if int(r.to) >= w.o.Hosts || r.stored {
			w.keep(r.from, c)
		}
		w.take(r.from, c, int(r.to) < w.o.Hosts)
		if r = &w.requests[id]; !r.used || r.flow != flow {
			return // that was the end of the fetch, and of its requests
		}
	}
}

// chunkCame makes a chunk resident, and wakes who waits for it.
func (w *world) chunkCame(at, c int32) {
	h := &w.hosts[at]
	id := h.state[c]
	if id < 0 {
		return
	}
	h.state[c] = resident
	f := &w.fetches[id]
	f.left &^= 1 << w.place[c]
	w.wake(at, h)
	if h.awaits == c {
		h.awaits = nothing
		h.claim = nothing
		w.resume(at)
		next := work
		if h.opening {
			next = opened
		}
		w.q.push(w.now, next, at, 0)
	}
	if f = &w.fetches[id]; f.left == 0 {
		w.endFetch(id)
		w.fetchAhead(at)
	}
}

// wake lets answers to peers have what has become resident.
func (w *world) wake(at int32, h *host) {
	kept := h.waiters[:0]
	for _, id := range h.waiters {
		r := &w.requests[id]
		if !r.used || r.to != at || !r.waits || r.flow < 0 {
			continue
		}
		w.moreReady(id)
		if r.waits {
			kept = append(kept, id)
		}
	}
	h.waiters = kept
}

func (w *world) endFetch(id int32) {
	f := &w.fetches[id]
	h := &w.hosts[f.host]
	w.uncount(f)
	for len(f.requests) > 0 {
		r := f.requests[0]
		if q := &w.requests[r]; q.come != q.chunks {
			w.sys.ended(r, cancelled)
		}
		w.endRequest(r)
	}
	if h.claim == id {
		h.claim = nothing
		w.resume(f.host)
	}
	for i, x := range h.live {
		if x == id {
			h.live[i] = h.live[len(h.live)-1]
			h.live = h.live[:len(h.live)-1]
			break
		}
	}
	f.used = false
	w.freeFetches = append(w.freeFetches, id)
}

// endRequest ends a request, whatever is on the way.
func (w *world) endRequest(id int32) {
	r := &w.requests[id]
	if r.fetch >= 0 {
		f := &w.fetches[r.fetch]
		for i, x := range f.requests {
			if x == id {
				f.requests = append(f.requests[:i], f.requests[i+1:]...)
				break
			}
		}
	}
	w.sys.finished(id)
	if r.flow >= 0 {
		w.cancel(r.flow)
		r.flow = nothing
	}
	w.disconnect(r)
	r.used = false
	w.freeRequests = append(w.freeRequests, id)
}

// failed ends a request that brings no more, and asks another server for the rest.
func (w *world) failed(id int32, o outcome) {
	w.sys.ended(id, o)
	fetch := w.requests[id].fetch
	w.endRequest(id)
	if f := &w.fetches[fetch]; len(f.requests) == 0 {
		w.try(fetch)
	} else if f.demand {
		w.setHedge(f.requests[len(f.requests)-1])
	}
}

// answered happens when an answer without bytes has arrived.
func (w *world) answered(id int32) {
	if r := &w.requests[id]; !w.reaches(r.to, r.from) {
		return
	}
	w.sign(id)
	switch o := w.requests[id].answer.outcome; o {
	case busy:
		w.busies++
		w.failed(id, o)
	default:
		w.absents++
		w.failed(id, absentThere)
	}
}

// sign happens when a server shows that it is alive: by an answer or its header, by bytes, or
// by a 102. The 102s that follow are not simulated one by one.
func (w *world) sign(id int32) {
	r := &w.requests[id]
	if r.signed || r.fetch < 0 || r.to == w.registry() || !w.reaches(r.to, r.from) {
		return
	}
	r.signed = true
	r.moved = w.now
	w.sys.signed(id)
}

// lastSign returns when a request's server has last shown that it is alive.
func (w *world) lastSign(r *request) time.Duration {
	if r.signed && r.waits && r.flow >= 0 && w.reaches(r.to, r.from) && w.now-r.asked < w.o.OriginWait {
		return max(r.moved, w.now-w.now%zone.SignEvery) // a server that waits says so now and then
	}
	return r.moved
}

// expired happens when a server has had its time. It is given more while bytes or signs of
// life come.
func (w *world) expired(id int32) {
	r := &w.requests[id]
	if r.come == r.chunks {
		return // all of it is with the processors
	}
	if after := w.sys.patience(r); after > 0 {
		w.q.push(w.now+after, expires, id, r.generation)
		return
	}
	w.lates++
	w.failed(id, late)
}

// checkEvery is how often a reader looks whether what it waits for is late.
const checkEvery = 250 * time.Millisecond

// setHedge has a demand watched.
func (w *world) setHedge(id int32) {
	r := &w.requests[id]
	if w.o.System != Zone || r.fetch < 0 || r.to == w.registry() || !w.fetches[r.fetch].demand || w.fetches[r.fetch].hedges >= maxHedges {
		return
	}
	w.q.push(w.now+checkEvery, hedges, id, r.generation)
}

// maxHedges bounds the requests that are made for a chunk because others are late.
const maxHedges = 3

// hedge asks another server as well for a demand if all that are asked for it are late.
func (w *world) hedge(id int32) {
	r := &w.requests[id]
	f := &w.fetches[r.fetch]
	if f.hedges >= maxHedges || f.requests[len(f.requests)-1] != id {
		return // the last one that was asked is watched
	}
	for _, x := range f.requests {
		if q := &w.requests[x]; q.to == w.registry() {
			return
		} else if !w.sys.isLate(q) {
			w.setHedge(id)
			return
		}
	}
	if !w.sys.mayHedge(r) {
		w.setHedge(id)
		return
	}
	f.hedges++
	w.hedged++
	w.ask(f.host, r.fetch, w.sys.beside(f))
}

// paused reports whether a flow's receiver does not read it, because a demand arrives.
func (w *world) paused(flow int32) bool {
	r := &w.requests[w.flows[flow].request]
	if r.fetch < 0 {
		return false
	}
	h := &w.hosts[r.from]
	return h.claim >= 0 && h.claim != r.fetch && !w.fetches[r.fetch].demand && !w.fetches[r.fetch].own
}

// resume reads the flows that paused.
func (w *world) resume(at int32) {
	h := &w.hosts[at]
	for _, id := range h.live {
		for _, r := range w.fetches[id].requests {
			if flow := w.requests[r].flow; flow >= 0 && !w.paused(flow) {
				w.readMore(flow)
			}
		}
	}
}

// overdue happens when a holder has waited too long for its own fetch.
func (w *world) overdue(id int32) {
	r := &w.requests[id]
	if !r.waits || r.flow < 0 || w.flows[r.flow].ready > 0 {
		return
	}
	w.cancel(r.flow)
	r.flow, r.waits = nothing, false
	w.reply(id, answer{outcome: absentThere})
}

// reply sends an answer without bytes.
func (w *world) reply(id int32, a answer) {
	r := &w.requests[id]
	r.answer = a
	w.q.push(w.now+w.o.ServerTime+w.rtt(r.from, r.to)/2, answers, id, r.generation)
}
