package fetcher

import (
	"slices"
	"time"

	"thaw/blockmap"
)

// source is where one image's chunks come from, with what is queued and in flight
// there. Sources share the Fetcher's bounds, and none can take them all: see pool.
type source struct {
	origin Origin

	demand, prefetch queue

	active       load // what its requests take
	prefetchLoad load // the part of active that nobody waited for when it was asked for
	bundles      int  // the part of both that are bundles
	running      map[*request]struct{}
	pace         *pace

	extraLoad   load      // what its extra requests take, which are not part of active
	asked       int64     // requests
	extra       int64     // extra ones
	good        time.Time // when it last brought a chunk that was right
	avoid       string    // the server behind the origin that was too slow
	avoidTill   time.Time
	useless     int // extra requests in a row that were not quicker
	uselessTill time.Time

	decoding chan struct{} // a token for each job that the decoders have of it
	listed   bool          // in Fetcher.mu.sources
}

func (f *Fetcher) newSource(o Origin) *source {
	return &source{
		origin: o, running: make(map[*request]struct{}), pace: newPace(int64(float64(f.o.MaxBytes) * f.o.PrefetchShare)),
		decoding: make(chan struct{}, f.o.Decoders),
	}
}

// queue is fetches in order of arrival. Those that have started, or are in another
// queue by now, are skipped.
type queue struct {
	fetches []*fetch
	sweep   int // the length at which those that are skipped are taken out
}

// push adds a fetch. Readers that come and go do not make the queue of a source
// that hangs grow for ever.
func (q *queue) push(ft *fetch) {
	if len(q.fetches) >= max(q.sweep, 64) {
		q.fetches = slices.DeleteFunc(q.fetches, func(x *fetch) bool { return !x.waits(ft.demand) })
		q.sweep = 2 * len(q.fetches)
	}
	q.fetches = append(q.fetches, ft)
}

// first is the one to start next, or nil.
func (q *queue) first(demand bool) *fetch {
	for len(q.fetches) > 0 && !q.fetches[0].waits(demand) {
		q.fetches[0] = nil
		q.fetches = q.fetches[1:]
	}
	if len(q.fetches) == 0 {
		return nil
	}
	return q.fetches[0]
}

// place says where the compressed bytes of a chunk are.
type place struct {
	src   *source
	table *blockmap.Table
}

// load is what requests in flight take.
type load struct {
	requests int
	bytes    int64 // of memory
}

func (l *load) add(n int, bytes int64) { l.requests += n; l.bytes += bytes }

// pool is what requests of all sources share: at most most together. A source may
// take as much as it leaves free. So one source alone takes half of the pool,
// and beside k sources that hang the next one still gets 1/(k+2).
type pool struct {
	most, taken load
}

// free is what is left when a request of so many bytes has been added.
func (p *pool) free(bytes int64) load {
	return load{p.most.requests - p.taken.requests - 1, p.most.bytes - p.taken.bytes - bytes}
}

// admits says whether who has own may make one more request.
func (p *pool) admits(own load, bytes int64) bool {
	free := p.free(bytes)
	return own.requests+1 <= free.requests && own.bytes+bytes <= free.bytes
}

// admits says whether a source may make one more request. f.mu is held.
func (f *Fetcher) admits(s *source, demand bool, bytes int64) bool {
	if demand {
		// One is always let through, however large its chunk is, and whatever hangs.
		return s.active.requests == s.prefetchLoad.requests || f.mu.pool.admits(s.active, bytes)
	}
	if s.active.requests == s.bundles {
		return true
	}
	return f.mu.pool.admits(s.active, bytes) && f.admitsPrefetch(s, bytes)
}

// admitsPrefetch says whether the part of the bounds that is for prefetches has room.
func (f *Fetcher) admitsPrefetch(s *source, bytes int64) bool {
	free := f.mu.pool.free(bytes)
	return float64(s.prefetchLoad.requests) < float64(min(f.o.MaxRequests, free.requests))*f.o.PrefetchShare &&
		float64(s.prefetchLoad.bytes+bytes) <= float64(min(f.o.MaxBytes, free.bytes))*f.o.PrefetchShare
}

// push has a fetch fetched from any of the sources that have it: the first
// that has room for it takes it. f.mu is held, and dispatch is called behind it.
func (f *Fetcher) push(ft *fetch) {
	ft.state = queued
	f.pushTo(ft, ft.place.src)
	for i, p := range ft.others {
		if p.src != ft.place.src && !slices.ContainsFunc(ft.others[:i], func(q place) bool { return q.src == p.src }) {
			f.pushTo(ft, p.src)
		}
	}
}

// pushTo queues a fetch at one source.
func (f *Fetcher) pushTo(ft *fetch, s *source) {
	if ft.demand {
		s.demand.push(ft)
	} else {
		s.prefetch.push(ft)
	}
	f.addSource(s)
}

// addSource has dispatch look at a source.
func (f *Fetcher) addSource(s *source) {
	if !s.listed {
		s.listed = true
		f.mu.sources = append(f.mu.sources, s)
	}
}

// waits says whether a fetch is to be started from a queue of that kind.
func (ft *fetch) waits(demand bool) bool { return ft.state == queued && ft.demand == demand }

// dispatch starts requests while the bounds allow, of each source in turn. f.mu
// is held.
func (f *Fetcher) dispatch() {
	if f.mu.closed {
		return
	}
	for _, demand := range []bool{true, false} {
		for again := true; again; {
			again = false
			for _, s := range f.mu.sources {
				if f.startNext(s, demand) {
					again = true
				}
			}
		}
	}
	f.mu.sources = slices.DeleteFunc(f.mu.sources, func(s *source) bool {
		s.listed = len(s.demand.fetches)+len(s.prefetch.fetches) > 0
		return !s.listed
	})
	if n := len(f.mu.sources); n > 1 { // who was first is last the next time
		f.mu.sources = append(f.mu.sources[1:n:n], f.mu.sources[0])
	}
}

// startNext starts the next request of a source, if there is one and the bounds
// allow it.
func (f *Fetcher) startNext(s *source, demand bool) bool {
	first := s.demand.first(true)
	if !demand {
		if first != nil {
			return false // what is demanded has no room, and prefetches must not take it
		}
		first = s.prefetch.first(false)
	}
	if first == nil || !demand && !f.keepsPace(s, int64(first.chunk().Stored)) {
		return false
	}
	if !f.admits(s, demand, cost(first.chunk())) {
		f.mu.refused = true
		if first = f.smaller(s, demand); first == nil {
			return false
		}
	}
	batch := f.gather(s, first)
	for _, ft := range batch {
		ft.take(first.at(s))
	}
	bytes := costs(batch)
	if !f.admits(s, demand, bytes) {
		batch = []*fetch{first} // which has room
		bytes = costs(batch)
	}
	f.start(s, batch, demand, bytes)
	return true
}

// smaller finds a fetch behind the first of what is demanded that has room where
// that has none; but not again and again, or the first would never have any.
func (f *Fetcher) smaller(s *source, demand bool) *fetch {
	first := s.demand.first(true)
	if !demand || first.passed >= maxPassed || !f.admits(s, demand, 0) {
		return nil
	}
	for _, ft := range s.demand.fetches[1:min(scanLimit, len(s.demand.fetches))] {
		if ft.waits(true) && f.admits(s, true, cost(ft.chunk())) {
			first.passed++
			return ft
		}
	}
	return nil
}

// maxPassed bounds how many fetches are started before one that has no room.
const maxPassed = 16

func costs(batch []*fetch) (bytes int64) {
	for _, ft := range batch {
		bytes += cost(ft.chunk())
	}
	return bytes
}

// start makes a request for chunks of one blob.
func (f *Fetcher) start(s *source, batch []*fetch, demand bool, bytes int64) {
	if s.active.requests == 0 {
		s.pace.resume()
	}
	f.charge(s, demand, 1, bytes)
	f.maxInFlight.Store(max(f.maxInFlight.Load(), int64(f.mu.pool.taken.requests)))
	r := newRequest(f.ctx, batch[0].place)
	r.demand, r.bytes = demand, bytes
	for _, ft := range batch {
		ft.state = running
		ft.requests = append(ft.requests, r)
		if ft.tries == 0 && !ft.started {
			ft.began, ft.started = r.asked, true
		}
	}
	r.expect(batch)
	s.asked++
	s.running[r] = struct{}{}
	f.mu.running[r] = struct{}{}
	f.watch()
	f.wg.Go(func() {
		f.run(r)
		f.mu.Lock()
		defer f.mu.Unlock()
		f.ended(r)
		f.charge(s, demand, -1, -bytes)
		f.dispatch()
	})
}

// reclaim has sources that hold more than is free take back requests that bring
// nothing, and queue their chunks again, where others are refused for want of room.
// Without that who came first would keep half of all, and the next half of the rest.
func (f *Fetcher) reclaim(now time.Time) {
	if !f.mu.refused {
		return
	}
	f.mu.refused = false
	var freed load // what ends soon
	ends := make(map[*source]load)
	for again := true; again; {
		again = false
		stalled := make(map[*source]*request) // the last of each source
		for r := range f.mu.running {
			if r.cancelled || !r.stalls(now) {
				continue
			}
			if last := stalled[r.place.src]; last == nil || r.asked.After(last.asked) {
				stalled[r.place.src] = r
			}
		}
		for s, r := range stalled {
			own := load{s.active.requests - ends[s].requests, s.active.bytes - ends[s].bytes}
			free := load{f.mu.pool.most.requests - f.mu.pool.taken.requests + freed.requests,
				f.mu.pool.most.bytes - f.mu.pool.taken.bytes + freed.bytes}
			if own.requests <= 1 || own.requests <= free.requests && own.bytes <= free.bytes {
				continue
			}
			freed.add(1, r.bytes)
			ends[s] = load{ends[s].requests + 1, ends[s].bytes + r.bytes}
			f.requeue(r)
			again = true
		}
	}
}

// stalls says whether a request brings nothing, or hardly anything.
func (r *request) stalls(now time.Time) bool {
	if !r.paused.IsZero() {
		return false
	}
	rate, known := r.samples.rate()
	return now.Sub(r.moved) >= stallAfter || known && rate < leastSpeed && r.got < r.total
}

// requeue ends a request, and queues again what it was to bring.
func (f *Fetcher) requeue(r *request) {
	r.cancelled = true
	r.cancel()
	for _, ft := range r.fetches {
		if !r.brings(ft) {
			continue
		}
		if ft.leave(r); len(ft.requests) == 0 {
			f.push(ft)
		}
	}
}

// charge takes account of a request that begins or ends.
func (f *Fetcher) charge(s *source, demand bool, n int, bytes int64) {
	f.mu.pool.taken.add(n, bytes)
	s.active.add(n, bytes)
	if !demand {
		s.prefetchLoad.add(n, bytes)
	}
}

// keepsPace says whether a source may ask for more that nobody waits for: whether
// what is on its way would not keep the line busy. What hardly moves does not.
func (f *Fetcher) keepsPace(s *source, bytes int64) bool {
	now := time.Now()
	var left int64
	var requests int
	for r := range s.running {
		if r.download != nil || !r.flows(now) {
			continue
		}
		left += r.total - r.got
		requests++
	}
	window := s.pace.window()
	return !f.linkIsTaken(nil, now) && (left+bytes <= window || left <= window/2 || requests < s.pace.requests(rangesOf(s.origin) > 1))
}

// flows says whether a request takes part of the line, or is about to.
func (r *request) flows(now time.Time) bool {
	if !r.paused.IsZero() || now.Sub(r.asked) < stuckAfter {
		return true
	}
	src := r.place.src
	rate, known := r.samples.lately()
	return now.Sub(r.moved) < stuckAfter && (!known || rate >= src.pace.speed/float64(8*len(src.running)))
}

// stuckAfter is how long a request that brings nothing counts as one that will.
const stuckAfter = time.Second
