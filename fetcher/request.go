package fetcher

import (
	"context"
	"slices"
	"sync"
	"time"
)

// request asks a source for chunks of one blob, in the order of the blob.
type request struct {
	place  place
	form   form  // in which it brings its chunk; guarded by Fetcher.mu, and written by the request itself
	route  Route // that has led to a peer; nil if the request is to an origin
	owner  bool  // the peer is asked as an owner
	ctx    context.Context
	cancel context.CancelFunc
	asked  time.Time
	demand bool  // a reader was waiting when it was made
	bytes  int64 // the part of Options.MaxBytes that it takes
	extra  bool  // it was made because another request is late, see hedge.go
	idle   bool  // it brings what Complete fetches, see complete.go

	elsewhere bool      // it is an extra request to another server of the same origin
	download  *download // it is a bundle download, which has no fetches of its own
	unpaced   bool      // its bytes come from several sources, and say nothing about one of them

	demanded chan struct{} // closed when a reader waits for one of its fetches
	once     sync.Once     // closes demanded

	// Fetcher.mu guards the fields below.
	fetches    []*fetch  // fetches that it brings, in the order of the blob
	ends       []int64   // where each fetch ends in the body
	total, got int64     // bytes of the body, and those received
	moved      time.Time // when the last bytes arrived, or when the request was sent
	began      time.Time // when the answer began; zero before that
	samples    samples   // of got, over time
	made       bool      // it was sent, because the cache did not have all the chunks
	server     string    // the server that sends the bytes, if known
	cancelled  bool
	won        bool // it is an extra request that brought its chunk first

	// What passOver has decided, once, when the peer had failed.
	passed    bool
	next      *source // the peer that comes next; nil for the origin
	nextOwner bool

	claimed time.Time // when others began to pause for it, see claimLink
	before  int64     // got at that time
	paused  time.Time // since when it has paused for others, see awaitLink
	free    time.Time // it does not pause again before this
}

func newRequest(ctx context.Context, p place) *request {
	now := time.Now()
	r := &request{place: p, asked: now, moved: now, demanded: make(chan struct{})}
	r.ctx, r.cancel = context.WithCancel(ctx)
	return r
}

// markDemand records that a reader waits for one of its fetches.
func (r *request) markDemand() { r.once.Do(func() { close(r.demanded) }) }

// brings reports whether this request is still to end a fetch.
func (r *request) brings(ft *fetch) bool {
	return ft.state == running && slices.Contains(ft.requests, r)
}

// awaited reports whether a reader waits for any of its fetches. f.mu is held.
func (r *request) awaited() bool {
	if r.download != nil {
		return len(r.download.awaited) > 0
	}
	return slices.ContainsFunc(r.fetches, func(ft *fetch) bool { return ft.demand && r.brings(ft) })
}

// expect sets which fetches the body brings.
func (r *request) expect(fetches []*fetch) {
	r.fetches, r.ends, r.total = fetches, make([]int64, len(fetches)), 0
	for i, ft := range fetches {
		r.total += r.size(ft)
		r.ends[i] = r.total
	}
}

// left returns how many bytes must still arrive until a fetch is complete.
func (r *request) left(ft *fetch) int64 {
	if i := slices.Index(r.fetches, ft); i >= 0 && i < len(r.ends) {
		return r.ends[i] - r.got
	}
	return r.size(ft)
}

// leave records that a request no longer brings the fetch.
func (ft *fetch) leave(r *request) {
	ft.requests = slices.DeleteFunc(slices.Clone(ft.requests), func(x *request) bool { return x == r })
}

// ended removes a request that has ended. f.mu is held.
func (f *Fetcher) ended(r *request) {
	r.cancel()
	delete(r.place.src.running, r)
	delete(f.mu.running, r)
	if r.idle {
		f.mu.idle--
		r.place.src.idle--
	} else {
		f.mu.calm = time.Now()
	}
	f.unclaim(r)
}

// cancelUnwanted cancels a request if no reader or prefetch wants any of its fetches
// any more. f.mu is held; the caller calls dispatch.
func (f *Fetcher) cancelUnwanted(r *request) {
	if r.cancelled {
		return
	}
	for _, ft := range r.fetches {
		if r.brings(ft) && ft.isWanted() {
			return
		}
	}
	r.cancelled = true
	if r.got < r.total {
		f.cancelled.Add(1)
	}
	r.cancel()
	for _, ft := range r.fetches {
		if !r.brings(ft) {
			continue
		}
		if ft.leave(r); len(ft.requests) == 0 {
			f.end(ft, context.Canceled)
		}
	}
}
