package fetcher

import (
	"slices"
	"time"
)

// push queues a fetch: at the peer that is to be asked for it, if there is one, and
// otherwise at all origins that have its chunk. The first origin with room for the fetch
// takes it. f.mu is held; the caller calls dispatch.
func (f *Fetcher) push(ft *fetch) {
	ft.state = queued
	if f.choosePeer(ft) {
		f.pushTo(ft, ft.peer.src)
		return
	}
	f.pushTo(ft, ft.place.src)
	for i, p := range ft.others {
		if p.src != ft.place.src && !slices.ContainsFunc(ft.others[:i], func(q place) bool { return q.src == p.src }) {
			f.pushTo(ft, p.src)
		}
	}
}

// pushTo queues a fetch at one source.
func (f *Fetcher) pushTo(ft *fetch, s *source) {
	s.queue.push(ft)
	f.addSource(s)
}

// addSource makes dispatch look at a source.
func (f *Fetcher) addSource(s *source) {
	if !s.listed {
		s.listed = true
		f.mu.sources = append(f.mu.sources, s)
	}
}

// dispatch starts requests while the bounds allow it, for each source in turn. f.mu is
// held.
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
			again = again || f.mu.moved
			f.mu.moved = false
		}
	}
	f.dispatchIdle()
	f.mu.sources = slices.DeleteFunc(f.mu.sources, func(s *source) bool {
		s.listed = s.queue.len() > 0
		return !s.listed
	})
	if n := len(f.mu.sources); n > 1 { // the first source comes last the next time
		f.mu.sources = append(f.mu.sources[1:n:n], f.mu.sources[0])
	}
}

// startNext starts the next request of a source, if there is one and the bounds allow
// it.
func (f *Fetcher) startNext(s *source, demand bool) bool {
	if !demand && s.queue.next(true) != nil {
		return false // a demand has no room, and prefetches must not take the room it waits for
	}
	first := s.queue.next(demand)
	for first != nil && s.isPeer() && !first.route.Usable(s.peer) {
		f.push(first) // elsewhere: the peer has failed meanwhile
		f.mu.moved = true
		first = s.queue.next(demand)
	}
	if first == nil || !demand && !f.keepsPace(s, first.at(s).stored(first)) {
		return false
	}
	if s.isPeer() && s.active.requests >= maxPeerRequests {
		return false
	}
	if !f.admits(s, demand, first.at(s).cost(first)) {
		f.mu.refused = true
		if !demand || !f.admits(s, true, 0) {
			return false
		}
		if first = s.queue.smaller(func(ft *fetch) bool { return f.admits(s, true, ft.at(s).cost(ft)) }); first == nil {
			return false
		}
	}
	f.startBatch(s, first, demand, f.limits(s, demand))
	return true
}

// startBatch starts a request for a fetch for which there is room, and for its
// neighbours.
func (f *Fetcher) startBatch(s *source, first *fetch, demand bool, l limits) {
	from := first.at(s)
	batch := s.queue.gather(from, first, l)
	for _, ft := range batch {
		ft.take(from)
	}
	bytes := f.costs(from, batch)
	if !f.admits(s, demand, bytes) {
		batch = []*fetch{first}
		bytes = f.costs(from, batch)
	}
	if s.isPeer() {
		for _, ft := range batch {
			ft.route, ft.owner = first.route, first.owner // what the peer says holds for all
		}
	}
	f.start(from, batch, demand, bytes)
}

// limits returns the limits of the next request to a source.
func (f *Fetcher) limits(s *source, demand bool) limits {
	l := limits{request: f.o.MaxRequest, ranges: 1, near: s.pace.near()}
	if !demand && !s.isPeer() {
		l.ranges = rangesOf(s.origin)
	}
	switch {
	case demand, s.isPeer():
		// A request to a peer brings all that is queued of a run: the owner asks the registry
		// for as much at once.
		l.bytes = s.pace.behind()
	case l.ranges == 1:
		// Several requests at once bring prefetches, so that the link is not idle
		// between a request and its answer.
		l.bytes = s.pace.run()
	default:
		l.bytes = s.pace.ranges()
	}
	l.bytes = min(l.bytes, l.request)
	return l
}

// costs returns the cost of a request. A request has only as many chunks in memory at
// once as can be decompressed at once, one that is being read, and one that waits.
func (f *Fetcher) costs(from place, batch []*fetch) (bytes int64) {
	var largest int64
	for _, ft := range batch {
		bytes += from.cost(ft)
		largest = max(largest, from.cost(ft))
	}
	return min(bytes, int64(max(cap(f.decode), f.o.Decoders)+2)*largest)
}

// start makes a request for chunks at one place.
func (f *Fetcher) start(from place, batch []*fetch, demand bool, bytes int64) {
	s := from.src
	if s.active.requests == 0 {
		s.pace.resume()
	}
	f.charge(s, demand, 1, bytes)
	f.maxInFlight.Store(max(f.maxInFlight.Load(), int64(f.mu.pool.taken.requests)))
	r := newRequest(f.ctx, from)
	r.demand, r.bytes = demand, bytes
	r.route, r.owner = batch[0].route, batch[0].owner
	if first := batch[0]; !first.demand && first.rank == idle {
		r.idle = true
		f.mu.idle++
		s.idle++
	}
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

// keepsPace reports whether a source may make one more request for prefetches of this
// many bytes. It may if the requests in flight do not keep the link busy. Requests that
// bring hardly any bytes do not keep it busy.
func (f *Fetcher) keepsPace(s *source, bytes int64) bool {
	now := time.Now()
	var left int64
	var requests int
	for r := range s.running {
		if r.download != nil || r.idle || !r.flows(now) {
			continue
		}
		left += r.total - r.got
		requests++
	}
	window := s.pace.window()
	return !f.linkIsTaken(nil, now) && (left+bytes <= window || left <= window/2 || requests < s.pace.requests(!s.isPeer() && rangesOf(s.origin) > 1))
}

// flows reports whether a request uses the link, or soon will.
func (r *request) flows(now time.Time) bool {
	if !r.paused.IsZero() || now.Sub(r.asked) < stuckAfter {
		return true
	}
	src := r.place.src
	rate, known := r.samples.lately()
	return now.Sub(r.moved) < stuckAfter && (!known || rate >= src.pace.speed/float64(8*len(src.running)))
}

// stuckAfter is how long a request without bytes counts as one that soon uses the link.
const stuckAfter = time.Second
