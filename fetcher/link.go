package fetcher

import (
	"io"
	"time"
)

// Demands also go first on the link. While the bytes of a demand arrive, requests that
// no reader waits for pause: the Fetcher does not read them, so their senders stop when
// the buffers are full and leave the link to the demand. A pause costs a round trip, so
// a request claims the link only if its bytes take longer than that; on a fast link
// none does.
const (
	maxClaim  = 2 * time.Second        // how long a request may claim the link
	maxPause  = 2 * time.Second        // in a row; after a longer pause a server may think that the connection is dead
	leastFree = 500 * time.Millisecond // between two pauses of maxPause
	claimDies = 250 * time.Millisecond // a claim ends after this time without a byte
)

// incoming is the body of an answer; it pauses for demands and measures bytes.
type incoming struct {
	f    *Fetcher
	r    *request
	body io.Reader
}

func (b *incoming) Read(p []byte) (int, error) {
	b.f.awaitLink(b.r)
	n, err := b.body.Read(p[:min(len(p), readSize)])
	b.f.arrived(b.r, int64(n))
	return n, err
}

const readSize = 256 << 10

// arrived records bytes that have arrived, and starts prefetches that now have room on
// the link.
func (f *Fetcher) arrived(r *request, n int64) {
	now := time.Now()
	f.mu.Lock()
	defer f.mu.Unlock()
	if n > 0 {
		r.got += n
		r.moved = now
		if !r.unpaced {
			r.place.src.pace.arrived(n, now)
		}
	}
	f.claimLink(r, now)
	if s := r.place.src; !f.mu.closed && s.queue.next(false) != nil {
		for f.startNext(s, false) {
		}
	}
	if f.mu.moved {
		f.dispatch()
	}
}

// claimLink makes other requests pause for this one as long as that pays. f.mu is held.
func (f *Fetcher) claimLink(r *request, now time.Time) {
	if r.download != nil {
		return
	}
	var end int64 // of the last demanded chunk
	for i, ft := range r.fetches {
		if i < len(r.ends) && ft.demand && r.brings(ft) {
			end = r.ends[i]
		}
	}
	trip := r.place.src.pace.roundTrip()
	pays := trip > 0 && end-r.got > trip
	_, has := f.mu.claims[r]
	switch {
	case has && (!pays || !r.usesLink(now, len(f.mu.claims))):
		f.unclaim(r)
	case !has && pays && r.claimed.IsZero(): // once
		r.claimed, r.before = now, r.got
		f.mu.claims[r] = struct{}{}
		f.claimed.Store(int64(len(f.mu.claims)))
	}
}

// usesLink reports whether the others should continue to pause for a request that claims
// the link: for maxClaim, and while it gets a fair part of what the link carries. of is
// the number of claims.
func (r *request) usesLink(now time.Time, of int) bool {
	since := now.Sub(r.claimed)
	fair := r.place.src.pace.speed / float64(8*of)
	return since <= maxClaim && (since < claimDies || float64(r.got-r.before) >= fair*since.Seconds())
}

// unclaim ends the claim of a request. f.mu is held.
func (f *Fetcher) unclaim(r *request) {
	if _, ok := f.mu.claims[r]; ok {
		delete(f.mu.claims, r)
		f.claimed.Store(int64(len(f.mu.claims)))
		f.wakePaused()
	}
}

// wakePaused makes paused requests check whether they may continue. f.mu is held.
func (f *Fetcher) wakePaused() {
	close(f.mu.resumed)
	f.mu.resumed = make(chan struct{})
}

// awaitLink pauses a request until it may be read.
func (f *Fetcher) awaitLink(r *request) {
	if f.claimed.Load() == 0 && !r.idle {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		now := time.Now()
		if !f.mustPause(r, now) {
			if !r.paused.IsZero() {
				if now.Sub(r.paused) >= maxPause {
					r.free = now.Add(leastFree)
				}
				r.paused = time.Time{}
				r.place.src.pace.paused(now)
			}
			return
		}
		if r.paused.IsZero() {
			r.paused = now
		}
		resumed := f.mu.resumed
		f.mu.Unlock()
		t := time.NewTimer(claimDies / 4)
		select {
		case <-resumed:
		case <-t.C:
		case <-r.ctx.Done():
		}
		t.Stop()
		f.mu.Lock()
	}
}

// mustPause reports whether a request must wait for others.
func (f *Fetcher) mustPause(r *request, now time.Time) bool {
	if r.idle && r.ctx.Err() == nil && !r.awaited() && f.busy() {
		if !r.paused.IsZero() && now.Sub(r.paused) >= maxPause {
			f.requeue(r)
			return false
		}
		return true
	}
	if r.awaited() || r.ctx.Err() != nil || now.Before(r.free) || !r.paused.IsZero() && now.Sub(r.paused) >= maxPause {
		return false
	}
	return f.linkIsTaken(r, now)
}

// linkIsTaken reports whether a request other than r claims the link.
func (f *Fetcher) linkIsTaken(r *request, now time.Time) bool {
	for x := range f.mu.claims {
		if x != r && now.Sub(x.moved) < claimDies && now.Sub(x.claimed) <= maxClaim {
			return true
		}
	}
	return false
}
