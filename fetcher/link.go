package fetcher

import (
	"io"
	"time"
)

// Demand goes first on the line as well. What nobody waits for is not read while
// bytes of what somebody waits for come: the sender stops when buffers are full,
// and leaves the line to the others. That pays where these take longer than the
// round trip that it costs, so a fast line knows nothing of it.
const (
	maxClaim  = 2 * time.Second        // that a request has the line for itself
	maxPause  = 2 * time.Second        // in a row, or the server may think that we are gone
	leastFree = 500 * time.Millisecond // between two such pauses
	claimDies = 250 * time.Millisecond // when nothing comes
)

// incoming is the body of an answer.
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

// arrived takes account of bytes that have come.
func (f *Fetcher) arrived(r *request, n int64) {
	now := time.Now()
	f.mu.Lock()
	defer f.mu.Unlock()
	if n > 0 {
		r.got += n
		r.moved = now
		r.place.src.pace.arrived(n, now)
	}
	f.claimLink(r, now)
	if s := r.place.src; len(s.queue.prefetch.fetches) > 0 && !f.mu.closed {
		for f.startNext(s, false) {
		}
	}
}

// claimLink has others give way to a request for as long as that pays.
func (f *Fetcher) claimLink(r *request, now time.Time) {
	if r.download != nil {
		return
	}
	var end int64 // of what somebody waits for
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

// usesLink says whether a request is worth giving way to, one of so many: it is for
// a while, and if a fair part of what the line carries is its own.
func (r *request) usesLink(now time.Time, of int) bool {
	since := now.Sub(r.claimed)
	fair := r.place.src.pace.speed / float64(8*of)
	return since <= maxClaim && (since < claimDies || float64(r.got-r.before) >= fair*since.Seconds())
}

func (f *Fetcher) unclaim(r *request) {
	if _, ok := f.mu.claims[r]; ok {
		delete(f.mu.claims, r)
		f.claimed.Store(int64(len(f.mu.claims)))
		f.wakePaused()
	}
}

// wakePaused wakes who gives way. f.mu is held.
func (f *Fetcher) wakePaused() {
	close(f.mu.resumed)
	f.mu.resumed = make(chan struct{})
}

// awaitLink returns when a request may be read.
func (f *Fetcher) awaitLink(r *request) {
	if f.claimed.Load() == 0 {
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

func (f *Fetcher) mustPause(r *request, now time.Time) bool {
	if r.awaited() || r.ctx.Err() != nil || now.Before(r.free) || !r.paused.IsZero() && now.Sub(r.paused) >= maxPause {
		return false
	}
	return f.linkIsTaken(r, now)
}

// linkIsTaken says whether a request other than r is to have the line for itself.
func (f *Fetcher) linkIsTaken(r *request, now time.Time) bool {
	for x := range f.mu.claims {
		if x != r && now.Sub(x.moved) < claimDies && now.Sub(x.claimed) <= maxClaim {
			return true
		}
	}
	return false
}
