package fetcher

import "time"

// reclaim acts if a source had no room for a request. It cancels requests that bring
// nothing, of sources that hold more than is free, and queues their chunks again.
// Otherwise the first source that hangs would keep half of the pool, and the next one
// half of the rest. f.mu is held.
func (f *Fetcher) reclaim(now time.Time) {
	if !f.mu.refused {
		return
	}
	f.mu.refused = false
	var freed load // held by cancelled requests that have not ended yet
	ends := make(map[*source]load)
	for again := true; again; {
		again = false
		stalled := make(map[*source]*request) // the youngest stalled request of each source
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

// stalls reports whether a request brings nothing, or hardly anything.
func (r *request) stalls(now time.Time) bool {
	if !r.paused.IsZero() {
		return false
	}
	rate, known := r.samples.rate()
	return now.Sub(r.moved) >= stallAfter || known && rate < leastSpeed && r.got < r.total
}

// requeue cancels a request and queues its fetches again.
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
